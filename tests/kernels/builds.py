"""Ahead-of-time builds of the kernels that a call would launch, for a GPU that need not be there.

``launches`` reads them off the Programs of a call; ``build`` compiles one launch to machine code.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from tfla import plan
from tfla.kernels import planning
from tfla.kernels.program import Program
from tfla.programs import call_of, programs
from tfla.spec import CallSpec, Precision, products_of

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
class Launch:
    """One recorded launch, as the compiler needs it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        picked = {k: v for k, v in self.constants if k.isupper() and v is not None}
        return f"{self.kernel.__name__} warps={self.warps} " + " ".join(
            f"{k}={v}" for k, v in picked.items()
        )


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of the machine."""

    registers: int
    stack: int
    shared: int
    wgmma: int
    register_wgmma: int


def record(
    kernel: Any, shape: tuple[int, int], named: dict[str, Any], aligned: Collection[str] = ()
) -> Launch:
    """A launch of values by the names of parameters, a pointer as its dtype. aligned: pointers that
    are multiples of 16."""
    signature, fixed, divisible = [], [], []
    skip = set(kernel.do_not_specialize or ())
    for index, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names, strict=True)):
        value = named[name]
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and name not in skip)
        ):
            signature.append((name, "constexpr"))
            fixed.append((name, value))
        elif isinstance(value, str):
            signature.append((name, "*" + value))
            if name in aligned:
                divisible.append(index)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in skip:
                divisible.append(index)
    return Launch(kernel, tuple(signature), tuple(fixed), tuple(divisible), *shape)


def of_tensors(
    kernel: Any, shape: tuple[int, int], args: tuple[Any, ...], constants: dict[str, Any]
) -> Launch:
    """A launch of tensors, all aligned, and numbers, in the order of the kernel's parameters."""
    named = {
        name: TYPES[x.dtype] if isinstance(x, torch.Tensor) else x
        for name, x in (dict(zip(kernel.arg_names, args, strict=False)) | constants).items()
    }
    return record(kernel, shape, named, kernel.arg_names)


def of_program(program: Program) -> list[Launch]:
    """Its launches, as the compiler needs them."""
    found = []
    for x in program.launches:
        p = x.parameters
        buffers = {
            name: None if n is None else program.buffers[n]
            for name, n in (p.reads | p.updates | p.writes).items()
        }
        named = {name: None if b is None else b.dtype for name, b in buffers.items()}
        aligned = [name for name, b in buffers.items() if b is not None and b.aligned]
        rest = p.numbers | p.constants
        found.append(record(x.kernel, (x.warps, x.stages), {**named, **rest}, aligned))
    return found


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
) -> CallSpec:
    """precision: of fp32 products; None: as torch is set."""
    products = precision or products_of(dtype)
    packs = bool(packed)
    problem = plan.Problem(B, T, H, K, V, packed or B, packs, dtype.itemsize, products)
    return call_of(problem, dtype, gate, states=state, needs_grad=backward)


def launches(
    device: plan.Device, *shape: int, override: Any = None, **options: Any
) -> list[Launch]:
    """What the forward and the backward pass of one ``call`` launch on ``device``, each once.
    override: Plan -> Plan."""
    with contextlib.nullcontext() if override is None else planning.changed(override):
        both = programs(call(*shape, **options), device)
    found = [launch for one in both if one is not None for launch in of_program(one)]
    return list(dict.fromkeys(found))


def build(launch: Launch, backend: str, arch: int | str) -> Any:
    """The compiled kernel."""
    make = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = make(
        launch.kernel,
        dict(launch.signature),
        {(launch.kernel.arg_names.index(k),): v for k, v in launch.constants},
        {(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    options = {"num_warps": launch.warps} | (
        {} if backend == "hip" else {"num_stages": launch.stages}
    )
    return triton.compile(source, target=target, options=options)


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
