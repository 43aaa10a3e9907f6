"""Ahead-of-time builds of the kernels that a call would launch, for a GPU that need not be there.

``launches`` reads them off the Programs of a call; ``build`` compiles one launch to machine code.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tfla import plan
from tfla.dtypes import products_of
from tfla.kernels import planning
from tfla.kernels.compile import Source, compiled, source, source_of_launch
from tfla.kernels.program import Program
from tfla.programs import call_of, programs
from tfla.spec import CallSpec, Precision

DEVICES = {
    ("cuda", 80): plan.Device((8, 0), 108, 166912),
    ("cuda", 86): plan.Device((8, 6), 82, 101376),
    ("cuda", 89): plan.Device((8, 9), 128, 101376),
    ("cuda", 90): plan.Device((9, 0), 132, 232448),
    ("cuda", 100): plan.Device((10, 0), 148, 232448),
    ("cuda", 120): plan.Device((12, 0), 170, 101376),
    ("hip", "gfx942"): plan.Device((0, 0), 304, 65536),
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of the machine."""

    registers: int
    stack: int
    shared: int
    wgmma: int
    register_wgmma: int


def of_tensors(
    kernel: Any, shape: tuple[int, int], args: tuple[Any, ...], constants: dict[str, Any]
) -> Source:
    """A launch of tensors, all aligned, and numbers, in the order of the kernel's parameters."""
    named = {
        name: TYPES[x.dtype] if isinstance(x, torch.Tensor) else x
        for name, x in (dict(zip(kernel.arg_names, args, strict=False)) | constants).items()
    }
    return source(kernel, shape, named, kernel.arg_names)


def of_program(program: Program) -> list[Source]:
    """Its launches, as the compiler needs them."""
    return [source_of_launch(x, program.buffers) for x in program.launches]


def call(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    gate: str = "exp",
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = True,
    state: bool = False,
    packed: int = 0,
    precision: Precision | None = None,
    groups: int | None = None,
) -> CallSpec:
    """precision: of fp32 products; None: as torch is set. groups: heads of q and k; None: H."""
    products = precision or products_of(dtype)
    packs = bool(packed)
    problem = plan.Problem(B, T, H, K, V, packed or B, packs, dtype.itemsize, products, groups)
    return call_of(problem, dtype, gate, states=state, needs_grad=backward)


def launches(
    device: plan.Device, *shape: int, override: Any = None, **options: Any
) -> list[Source]:
    """What the forward and the backward pass of one ``call`` launch on ``device``, each once.
    override: Plan -> Plan."""
    with contextlib.nullcontext() if override is None else planning.changed(override):
        both = programs(call(*shape, **options), device)
    found = [launch for one in both if one is not None for launch in of_program(one)]
    return list(dict.fromkeys(found))


def build(launch: Source, backend: str, arch: int | str) -> Any:
    """The compiled kernel."""
    return compiled(launch, backend, arch)


def binary(compiled: Any, tool: str, *options: str) -> str:
    """What one of CUDA's tools, which come with Triton, says of the machine code."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def resources(compiled: Any, backend: str) -> Resources:
    """Registers, stack and shared memory of a compiled kernel, and its warp-group products."""
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text))
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        return Resources(registers, 4 * spilled, compiled.metadata.shared, 0, 0)
    usage = binary(compiled, "cuobjdump", "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    ptx = compiled.asm["ptx"]
    products = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    return Resources(
        registers,
        stack,
        compiled.metadata.shared,
        len(products),
        sum("}, {" in p for p in products),
    )
