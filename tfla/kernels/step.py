"""Decode: one token of every sequence of a batch, its state updated where it lies, in one
launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfla.gates import Activations
from tfla.kernels.gates import GATE_STRIDES, _log_sigmoid
from tfla.kernels.host import launch

REGISTERS = 8192  # fp32 entries of the state that one program holds: 64 registers a thread


@triton.jit(do_not_specialize=["H", "rows", *GATE_STRIDES])
def _step_kernel(
    q, k, v, i, f, C, n, m, slots, h, arrived, scale,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ib, stride_ih,
    stride_fb, stride_fh, stride_cn, stride_ch, stride_ck, stride_cv, stride_nn, stride_nh,
    stride_nk, stride_mn, stride_mh, H, K, V, rows,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SIGMOID_I: tl.constexpr, SIGMOID_F: tl.constexpr,
):  # fmt: skip
    """C' = exp(log_f + m - m') C + exp(log_i - m') k v^T, and h, for BLOCK_V columns of one head.

    Every program of a head reads n and m, and the last one to have done so writes them.
    """
    tiles = tl.cdiv(V, BLOCK_V)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    slot = batch
    if slots is not None:
        slot = tl.load(slots + batch).to(tl.int64)
        if (slot < 0) | (
            slot >= rows
        ):  # the host cannot look: nothing outside the state is touched, and h says so
            nothing = tl.full([BLOCK_V], float("nan"), tl.float32).to(h.dtype.element_ty)
            column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            tl.store(h + (batch * H + head) * V + column, nothing, mask=column < V)
            return
    lanes = tl.arange(0, BLOCK_K)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    log_i = tl.load(i + batch * stride_ib + head * stride_ih).to(tl.float32)
    log_f = tl.load(f + batch * stride_fb + head * stride_fh).to(tl.float32)
    if SIGMOID_I:
        log_i = _log_sigmoid(log_i)
    if SIGMOID_F:
        log_f = _log_sigmoid(log_f)
    log_i = tl.maximum(log_i, -1e30)
    log_f = tl.maximum(log_f, -1e8)
    q_row = (
        tl.load(q + batch * stride_qb + head * stride_qh + lanes, mask=lanes < K, other=0.0).to(
            tl.float32
        )
        * scale
    )
    k_row = tl.load(k + batch * stride_kb + head * stride_kh + lanes, mask=lanes < K, other=0.0).to(
        tl.float32
    )
    v_row = tl.load(
        v + batch * stride_vb + head * stride_vh + columns, mask=columns < V, other=0.0
    ).to(tl.float32)
    if m is not None:
        m_at = m + slot * stride_mn + head * stride_mh
        m_old = tl.maximum(tl.load(m_at), -1e30)
        m_new = tl.maximum(log_f + m_old, log_i)
        decay = tl.exp(log_f + m_old - m_new)
        weight = tl.exp(log_i - m_new)
        n_at = n + slot * stride_nn + head * stride_nh + lanes * stride_nk
        n_new = decay * tl.load(n_at, mask=lanes < K, other=0.0).to(tl.float32) + weight * k_row
    else:
        decay = tl.exp(log_f)
        weight = tl.exp(log_i)
    C_at = (
        C
        + slot * stride_cn
        + head * stride_ch
        + lanes[:, None] * stride_ck
        + columns[None, :] * stride_cv
    )
    inside = (lanes < K)[:, None] & (columns < V)[None, :]
    C_new = (
        decay * tl.load(C_at, mask=inside, other=0.0).to(tl.float32)
        + (weight * k_row)[:, None] * v_row[None, :]
    )
    tl.store(C_at, C_new.to(C.dtype.element_ty), mask=inside)
    h_row = tl.sum(C_new * q_row[:, None], 0)
    if m is not None:
        floor = tl.minimum(tl.maximum(tl.exp(-m_new), 2.0**-126), 2.0**126)
        h_row = h_row / tl.maximum(tl.abs(tl.sum(n_new * q_row, 0)), floor)
        last = batch >= 0
        if arrived is not None:
            tl.debug_barrier()
            last = tl.atomic_add(arrived + batch * H + head, 1) == tiles - 1
        if last:
            tl.store(n_at, n_new.to(n.dtype.element_ty), mask=lanes < K)
            tl.store(m_at, m_new)
            if arrived is not None:
                tl.store(arrived + batch * H + head, 0)
    tl.store(h + (batch * H + head) * V + columns, h_row.to(h.dtype.element_ty), mask=columns < V)


_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def _arrived(q: Tensor, count: int) -> Tensor:
    """Counters that every launch leaves at zero, one set a stream; a CUDA graph has its own."""
    if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=q.device)
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.device.type == "cuda" else 0
    key = (q.device, stream)
    if key not in _arrivals or _arrivals[key].numel() < count:
        _arrivals[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=q.device)
    return _arrivals[key]


def update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    slots: Tensor | None,
    scale: float,
    activations: Activations,
) -> Tensor:
    """One token: writes the new state over the old (in the rows ``slots``, or all) and returns h
    (B, H, V) in v's dtype."""
    B, H, K = q.shape
    V = v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    h = v.new_empty(B, H, V)
    block_k = triton.next_power_of_2(K)
    block_v = max(16, min(triton.next_power_of_2(V), REGISTERS // block_k))
    tiles = triton.cdiv(V, block_v)
    arrived = None if m is None or tiles == 1 else _arrived(q, B * H)
    strides_n = (0, 0, 0) if n is None else n.stride()
    strides_m = (0, 0) if m is None else m.stride()
    launch(
        _step_kernel, (B * H * tiles,), (4, 1),
        (q, k, v, i, f, C, n, m, slots, h, arrived), scale, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], *i.stride(), *f.stride(), *C.stride(), *strides_n, *strides_m, H, K, V,
        C.shape[0], BLOCK_K=block_k, BLOCK_V=block_v,
        SIGMOID_I=activations.sigmoid_i, SIGMOID_F=activations.sigmoid_f,
    )  # fmt: skip
    return h
