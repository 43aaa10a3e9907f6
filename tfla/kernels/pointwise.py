"""What a model does between its large matrix products, each in one launch and one pass over memory;
no gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfla.kernels.runtime import launch


#   x       (rows, 2 F), any float   [g | u]
#   out     (rows, F), x's dtype     written: silu(g) * u
#   F       columns of out
#   BLOCK   columns of a program
@triton.jit
def _swiglu_kernel(g, u, out, stride_g, stride_u, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    a = tl.load(g + row * stride_g + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(u + row * stride_u + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * F + columns, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=inside)


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u (..., F), g and u each with rows at one distance, as halves of one tensor are."""
    out, F = g.new_empty(g.shape), g.shape[-1]
    g, u = ((x if x.stride(-1) == 1 else x.contiguous()).flatten(0, -2) for x in (g, u))
    grid, strides = (g.shape[0], triton.cdiv(F, 1024)), (g.stride(0), u.stride(0))
    launch(_swiglu_kernel, grid, (4, 1), (g, u, out), *strides, F, BLOCK=1024)
    return out


#   x, y    (rows, D), any float   summands
#   weight  (D,), any float        of the norm
#   total   (rows, D), x's dtype   written: x + y
#   out     (rows, D), x's dtype   written: the RMS norm of total, times weight
#   eps     added to the mean square
#   D       columns
#   BLOCK   the power of two from D on: a program has a row
@triton.jit
def _add_norm_kernel(x, y, weight, total, out, eps, D, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    inside = lanes < D
    at = tl.program_id(0).to(tl.int64) * D + lanes
    w = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    rounded = a.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    a = rounded.to(tl.float32)
    a = a * tl.rsqrt(tl.sum(a * a, 0) / D + eps) * w
    tl.store(out + at, a.to(out.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y (..., D) as torch rounds it, and the RMS norm of that, times weight (D,)."""
    x, y, D = x.contiguous(), y.contiguous(), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    tensors, block = (x, y, weight, total, out), triton.next_power_of_2(D)
    warps = min(16, max(1, block // 256))
    launch(_add_norm_kernel, (x.numel() // D,), (warps, 1), tensors, eps, D, BLOCK=block)
    return total, out


#   h         (rows, heads, V), any float   one head of one row is normed by a program
#   o         (rows, heads V), any float    pre-activation of the output gate; rows stride_o apart
#   weight    (heads V,), any float         of the norm
#   out       (rows, heads V), h's dtype    written
#   eps       added to the variance
#   V         columns of a head
#   BLOCK     the power of two from V on
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
    tensors, block = (h, o, weight, out), triton.next_power_of_2(V)
    launch(_head_norm_kernel, grid, (warps, 1), tensors, o.stride(0), eps, V, BLOCK=block)
    return out


#   x        (N, D), any float       rows of the batch
#   weight   (2 H, D), any float     of the input gate, then of the forget gate
#   bias     (2 H,), any float
#   active   (N,) u8, or None        rows where it is 0 get closed gates
#   out      (N, 2 H) fp32           written: pre-activations
#   cap      the gates' soft cap, where CAPPED
#   D, H     columns of x; heads
#   BLOCK    the power of two from D on: a program has one gate of one row
#   CLOSED   what closes a gate: -CLOSED for the input gate, CLOSED for the forget gate
@triton.jit
def _gates_kernel(
    x,
    weight,
    bias,
    active,
    out,
    cap,
    D,
    H,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    CLOSED: tl.constexpr,
):
    row, gate = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < D
    a = tl.load(x + row * D + lanes, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(weight + gate * D + lanes, mask=inside, other=0.0).to(tl.float32)
    y = tl.sum(a * b, 0) + tl.load(bias + gate).to(tl.float32)
    if CAPPED:  # in fp64 the difference loses nothing near 0
        y = (cap * (1.0 - 2.0 / (tl.exp(2.0 * y.to(tl.float64) / cap) + 1.0))).to(tl.float32)
    if active is not None:
        y = tl.where(tl.load(active + row) == 0, tl.where(gate < H, -CLOSED, CLOSED), y)
    tl.store(out + row * 2 * H + gate, y)


def gates(
    x: Tensor, weight: Tensor, bias: Tensor, cap: float | None, active: Tensor | None, closed: float
) -> Tensor:
    """cap tanh((W x + b) / cap) (N, 2 H) in fp32 for x (N, D); where `active` (N,) is False -closed
    in the first H, closed in the last. For few rows: each one reads all of W."""
    x, weight = x.contiguous(), weight.contiguous()
    active = None if active is None else active.contiguous().view(torch.uint8)
    (N, D), G = x.shape, weight.shape[0]
    out = x.new_empty(N, G, dtype=torch.float32)
    launch(
        _gates_kernel,
        (N, G),
        (4 if D <= 4096 else 8, 1),
        (x, weight, bias, active, out),
        cap or 1.0,
        D,
        G // 2,
        BLOCK=triton.next_power_of_2(D),
        CAPPED=cap is not None,
        CLOSED=closed,
    )
    return out
