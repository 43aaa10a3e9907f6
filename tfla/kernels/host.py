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


def plan_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    """The plan that serves tensors of these shapes."""
    # A compiled graph is made for its sizes: int() turns symbols into guards.
    B, T, H, K, V = (int(size) for size in (*q.shape, v.shape[-1]))
    N = B if cu_seqlens is None else int(cu_seqlens.shape[0]) - 1
    problem = Problem(B, T, H, K, V, N, cu_seqlens is not None, q.element_size(), precision(q))
    return plan(problem, device_of(q))


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
        cu_seqlens,
        table,
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


def rows_of(x: Tensor) -> Tensor:
    """x with a contiguous last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def aligned(x: Tensor) -> bool:
    """Can a tensor descriptor walk over the rows of x (B, T, H, D)? They must start at multiples
    of 16 bytes."""
    size = x.element_size()
    steps = all(s * size % 16 == 0 for s in x.stride()[:3])
    return steps and x.stride(1) > 0 and x.data_ptr() % 16 == 0 and x.shape[-1] * size >= 16


def launch(
    kernel: Any, grid: tuple[int, ...], shape: tuple[int, int], *args: Any, **constants: Any
) -> None:
    """Call ``kernel`` over ``grid`` with ``shape`` = (warps, stages); an empty grid is no call."""
    if 0 in grid:
        return
    triton.set_allocator(_allocate)
    # Triton launches on the current device, which need not be that of the tensors.
    device = next(x.device for x in args if isinstance(x, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, **constants, num_warps=shape[0], num_stages=shape[1])


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory for descriptors; the caching allocator keeps it until the stream is done with
    it."""
    return torch.empty(
        size,
        dtype=torch.int8,
        device="cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda",
    )
