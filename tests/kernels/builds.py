"""Ahead-of-time builds of the kernels that a call would launch, for a GPU that need not be there.

``launches`` runs a call on tensors without memory and records what it would launch; ``build``
compiles one launch to machine code.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import tfla
from tfla import kernels, ops, plan
from tfla.gates import INPUT_GATES
from tfla.spec import CallSpec, Inputs, Options, products_of

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
    kernel: Any, shape: tuple[int, int], args: tuple[Any, ...], constants: dict[str, Any]
) -> Launch:
    named = dict(zip(kernel.arg_names, args, strict=False)) | constants
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
        elif isinstance(value, torch.Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            divisible.append(index)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in skip:
                divisible.append(index)
    return Launch(kernel, tuple(signature), tuple(fixed), tuple(divisible), *shape)


def launches(
    device: plan.Device,
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
    override: Any = None,
    precision: str | None = None,
) -> list[Launch]:
    """What the forward and the backward pass of one problem launch on ``device``. override: Plan
    -> Plan. precision: of fp32 products; None: as torch is set."""
    seen: list[Launch] = []

    def recorder(
        kernel: Any,
        grid: tuple[int, ...],
        shape: tuple[int, int],
        tensors: tuple[Any, ...],
        *numbers: float,
        **constants: Any,
    ) -> None:
        if 0 not in grid:
            seen.append(record(kernel, shape, (*tensors, *numbers), constants))

    def new(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    f32 = torch.float32
    N = packed or B
    normalize = INPUT_GATES[gate].normalize
    start = (
        [new(N, H, K, V, of=f32), new(N, H, K, of=f32), new(N, H, of=f32)] if state else [None] * 3
    )
    if not normalize:
        start[1:] = [None, None]
    cu_seqlens = new(N + 1, of=torch.int32) if packed else None
    x = Inputs(
        new(B, T, H, K),
        new(B, T, H, K),
        new(B, T, H, V),
        new(B, T, H, of=f32),
        new(B, T, H, of=f32),
        *start,
        cu_seqlens,
    )
    products = precision or products_of(dtype)
    options = Options(K**-0.5, gate, True, normalize, state, backward, "triton", products)
    spec = CallSpec.of(x, options)
    with contextlib.ExitStack() as stack:
        for module in (kernels, kernels.step):
            stack.enter_context(mock.patch.object(module, "launch", recorder))
        stack.enter_context(mock.patch("tfla.kernels.grid.launch", recorder))
        stack.enter_context(mock.patch("tfla.kernels.grid.device_of", lambda _: device))
        stack.enter_context(mock.patch.dict("tfla.kernels.grid._plans", clear=True))
        if override is not None:
            real = kernels.plan_of
            stack.enter_context(
                mock.patch.object(kernels, "plan_of", lambda *a: override(real(*a)))
            )
        h, *_, saved = ops.forward(x, spec)
        if backward:
            dC, dn = (start[0], start[1]) if state else (None, None)
            ops.backward(h, dC, dn, h, saved, x, spec)
    return list(dict.fromkeys(seen))


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


assert tfla
