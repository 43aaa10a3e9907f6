"""From tensors to launches: the plan of a call, the tables of packed sequences, and the call of a
kernel."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
from torch import Tensor

from tfla.kernels.layout import _tables_kernel
from tfla.plan import Device, Plan, Problem, plan

_devices: dict[torch.device, Device] = {}


def device_of(x: Tensor) -> Device:
    """The integers of x's device; a small part where there is none (the interpreter)."""
    if x.device not in _devices:
        if x.device.type == "cuda":
            p = torch.cuda.get_device_properties(x.device)
            capability = (0, 0) if torch.version.hip else (p.major, p.minor)
            shared = getattr(p, "shared_memory_per_block_optin", 65536)
            _devices[x.device] = Device(capability, p.multi_processor_count, shared)
        else:
            _devices[x.device] = Device((0, 0), 4, 65536)
    return _devices[x.device]


def precision(x: Tensor) -> str:
    """How fp32 products are done: as torch's own matrix products on this device are set to be."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    matmul: Any = torch.backends.cuda.matmul  # allow_tf32 raises where the newer name was used
    return "tf32" if matmul.fp32_precision == "tf32" else "ieee"


_plans: dict[tuple[Any, ...], Plan] = {}


def plan_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    """The plan that serves tensors of these shapes."""
    # A compiled graph is made for its sizes: int() turns symbols into guards.
    B, T, H, K, V = (int(size) for size in (*q.shape, v.shape[-1]))
    N = B if cu_seqlens is None else int(cu_seqlens.shape[0]) - 1
    numbers = (B, T, H, K, V, N, cu_seqlens is not None, q.element_size(), precision(q))
    found = _plans.get((q.device, *numbers))
    if found is None:
        found = plan(Problem(*numbers), device_of(q))
        if len(_plans) >= 10_000:
            _plans.clear()
        _plans[q.device, *numbers] = found
    return found


def tables(cu_seqlens: Tensor | None, T: int, p: Plan) -> tuple[Tensor | None, ...]:
    """Of packed sequences: which one each slot of chunks, spans and segments belongs to, in one
    launch."""
    if cu_seqlens is None:
        return None, None, None
    N = cu_seqlens.shape[0] - 1
    units = (p.L, p.span, p.segment or p.span)
    sizes = [padded(T // unit + N) for unit in units]
    table = torch.empty(sum(sizes), dtype=torch.int32, device=cu_seqlens.device)
    launch(
        _tables_kernel,
        (triton.cdiv(sum(sizes), 256),),
        (4, 1),
        (cu_seqlens, table),
        T,
        N,
        *units,
        *sizes,
        BLOCK=256,
    )
    return table.split(sizes)


def padded(size: int) -> int:
    """The least multiple of 32 that is at least ``size``: what follows in a buffer is then aligned
    for every length, and no kernel is compiled anew, or slower, for want of it."""
    return -(-size // 32) * 32


def rows_of(x: Tensor, descriptor: bool = False) -> Tensor:
    """x with a contiguous last axis; where a ``descriptor`` shall walk over it, with rows that
    start at multiples of 16 bytes. Copied if it must be."""
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    if dense and (not descriptor or _aligned(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _aligned(x: Tensor) -> bool:
    size = x.element_size()
    b, t, h = x.stride()[:3]
    return t > 0 and x.data_ptr() % 16 == 0 and (b | t | h) * size % 16 == 0


_compiled: dict[tuple[Any, ...], tuple[Any, bool]] = {}  # and: does it want scratch memory?


def launch(
    kernel: Any, grid: tuple[int, ...], shape: tuple[int, int], tensors: tuple[Tensor | None, ...],
    *numbers: float, **constants: Any,
) -> None:  # fmt: skip
    """Call ``kernel(*tensors, *numbers, **constants)`` over ``grid`` with ``shape`` = (warps,
    stages); an empty grid is no call.

    A call that was seen before goes straight to the compiled kernel: looking up what it was
    compiled for takes the compiler's own launcher 100 to 200 us.
    """
    if 0 in grid:
        return
    pointers = [0 if x is None else x.data_ptr() for x in tensors]
    device = next(x.device for x in tensors if x is not None)
    key = (
        id(kernel), shape, device, numbers, tuple(constants.values()),
        tuple([None if x is None else x.dtype for x in tensors]), *[p & 15 for p in pointers],
    )  # fmt: skip
    known = _compiled.get(key)
    # Triton launches on the current device, which need not be that of the tensors.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        if known is None:
            triton.set_allocator(_allocate)
            options = {"num_warps": shape[0], "num_stages": shape[1]}
            compiled = kernel[grid](*tensors, *numbers, **constants, **options)
            if compiled is not None:  # not in the interpreter
                if len(_compiled) >= 10_000:  # lengths without end
                    _compiled.clear()
                _compiled[key] = compiled, getattr(compiled.metadata, "global_scratch_size", 0) > 0
            return
        compiled, scratch = known
        if scratch:
            triton.set_allocator(_allocate)
        compiled.run(
            *grid, *(1,) * (3 - len(grid)), _stream(device.index), compiled.function,
            compiled.packed_metadata, None, None, None, *pointers, *numbers, *constants.values(),
        )  # fmt: skip


def _stream(index: int) -> int:
    return triton.runtime.driver.active.get_current_stream(index)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory for descriptors; the caching allocator keeps it until the stream is done with
    it."""
    return torch.empty(
        size,
        dtype=torch.int8,
        device="cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda",
    )
