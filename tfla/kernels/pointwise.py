"""What a model does between its matrix products, each in one launch and one pass over memory; no
gradients. Rows lie in dense memory, or in columns of a wider matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfla.kernels.host import launch


@triton.jit
def _swiglu_kernel(x, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    g = tl.load(x + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * F + columns, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


def swiglu(x: Tensor) -> Tensor:
    """silu(g) * u (..., F) of x = [g | u] (..., 2 F)."""
    x = x.contiguous()
    F = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], F)
    grid = (out.numel() // F, triton.cdiv(F, 1024))
    launch(_swiglu_kernel, grid, (4, 1), (x, out), F, BLOCK=1024)
    return out


@triton.jit
def _head_norm_kernel(h, o, weight, out, stride_o, eps, V, BLOCK: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < V
    columns = head * V + lanes
    x = tl.load(h + row * heads * V + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, 0) / V, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / V + eps)
    x = x * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(o + row * stride_o + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(gate)
    tl.store(out + row * heads * V + columns, y.to(out.dtype.element_ty), mask=inside)


def head_norm(h: Tensor, o: Tensor, weight: Tensor, eps: float) -> Tensor:
    """sigmoid(o) * weight * (layer norm of each head of h): h (..., H, V), o and weight (..., H V),
    o with rows at one distance."""
    H, V = h.shape[-2:]
    h, o = h.contiguous(), o.flatten(0, -2)
    out = h.new_empty(*h.shape[:-2], H * V)
    grid, warps = (o.shape[0], H), 1 if V <= 256 else 2
    block = triton.next_power_of_2(V)
    tensors = (h, o, weight, out)
    launch(_head_norm_kernel, grid, (warps, 1), tensors, o.stride(0), eps, V, BLOCK=block)
    return out


@triton.jit
def _gates_kernel(
    y, bias, active, out, cap, H, BLOCK: tl.constexpr, CAPPED: tl.constexpr, CLOSED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < 2 * H
    x = tl.load(y + row * 2 * H + lanes, mask=inside, other=0.0)
    x = x + tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:  # in fp64 the difference loses nothing near 0
        x = (cap * (1.0 - 2.0 / (tl.exp(2.0 * x.to(tl.float64) / cap) + 1.0))).to(tl.float32)
    if active is not None:
        idle = tl.load(active + row) == 0
        x = tl.where(idle, tl.where(lanes < H, -CLOSED, CLOSED), x)
    tl.store(out + row * 2 * H + lanes, x, mask=inside)


def gates(
    y: Tensor, bias: Tensor, cap: float | None, active: Tensor | None, closed: float
) -> Tensor:
    """cap tanh((y + bias) / cap) for y (..., 2 H) fp32; where `active` (...) is False: -closed for
    the first H, closed for the last."""
    y, active = y.contiguous(), None if active is None else active.contiguous().view(torch.uint8)
    out, H = torch.empty_like(y), y.shape[-1] // 2
    launch(
        _gates_kernel, (y.numel() // (2 * H),), (1, 1), (y, bias, active, out), cap or 1.0, H,
        BLOCK=triton.next_power_of_2(2 * H), CAPPED=cap is not None, CLOSED=closed,
    )  # fmt: skip
    return out
