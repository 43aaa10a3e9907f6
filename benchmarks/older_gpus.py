"""Any program on a Hopper with the machine code of an older GPU: older_gpus.py 80 COMMAND ...

    python benchmarks/older_gpus.py 80 -m tfla bench kernels --lengths 1024,16384 --peers all
    python benchmarks/older_gpus.py 86 -m pytest -m gpu

Triton compiles for compute capability 8.0 (A100), 8.6 (RTX 30) or 8.9 (RTX 40, L4, L40S), torch
says that the GPU is one, and the assembler builds that PTX for the Hopper that is there. Tensor
cores then take mma.sync, tiles come by cp.async, and a program has the shared memory of the older
GPU: 163 KiB on 8.0, 99 KiB on 8.6 and 8.9. Right or wrong shows as it would there. Times do not:
memory, clock and the number of multiprocessors are the Hopper's, so only ratios within one run mean
anything. Give every capability a TRITON_CACHE_DIR of its own. Python processes that the program
starts are patched too: a ``sitecustomize`` on their PYTHONPATH comes here again.
"""

import atexit
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton.compiler.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.backends.nvidia.driver import CudaDriver

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376}  # bytes that a program may have
CAPABILITY = "TFLA_AS_CAPABILITY"


class Properties:
    """Those of the device, but for what an older one has."""

    def __init__(self, real: Any, capability: int) -> None:
        self._real = real
        self.major, self.minor = divmod(capability, 10)
        self.shared_memory_per_block_optin = SHARED_MEMORY[capability]
        self.name = f"{real.name} with machine code of {self.major}.{self.minor}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def patch(capability: int) -> None:
    build, properties = compiler.CUDABackend.make_cubin, torch.cuda.get_device_properties

    def make_cubin(self: Any, src: Any, metadata: Any, options: Any, _: int) -> Any:
        return build(self, src, metadata, options, 90)

    compiler.CUDABackend.make_cubin = make_cubin
    CudaDriver.get_current_target = lambda self: GPUTarget("cuda", capability, 32)
    triton.compiler.compiler.max_shared_mem = lambda device: SHARED_MEMORY[capability]
    torch.cuda.get_device_properties = lambda *a, **k: Properties(properties(*a, **k), capability)
    torch.cuda.get_device_capability = lambda *a, **k: divmod(capability, 10)


def patch_children() -> None:
    """Every Python process started from here on imports this file first, where it has torch."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "sitecustomize.py").write_text(
        "import importlib.util\n"
        "if importlib.util.find_spec('torch') and importlib.util.find_spec('triton'):\n"
        f"    spec = importlib.util.spec_from_file_location('older_gpus', {__file__!r})\n"
        "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.getenv("PYTHONPATH")])])


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdigit() or int(sys.argv[1]) not in SHARED_MEMORY:
        sys.exit(f"{__doc__}\nfirst argument: one of {', '.join(map(str, SHARED_MEMORY))}")
    os.environ[CAPABILITY] = sys.argv[1]
    patch_children()
    # What torch.compile makes of the peers is built in this process, which is patched.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if CAPABILITY in os.environ:
    patch(int(os.environ[CAPABILITY]))
if __name__ == "__main__":
    del sys.argv[:2]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        # This file stays sys.modules["__main__"]: it is what a spawned process imports again.
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
