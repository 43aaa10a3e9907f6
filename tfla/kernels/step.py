"""Decode: one token of a batch of sequences, states updated where they lie, in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfla.kernels.gates import (
    EMPTY,
    FOLLOWED,
    GATE_STRIDES,
    _log_sigmoid,
    form_of,
    larger,
    limited,
    within,
)
from tfla.kernels.planning import device_of
from tfla.kernels.runtime import launch
from tfla.spec import StepInputs, StepOptions

REGISTERS = 16384  # fp32 entries of the state that one program holds, 128 a thread, or half of it
WARPS = 4


# A program has BLOCK_V columns of one head of one row of the batch.
#
#   q, k         (B, H, K)          any float; strides by batch and head
#   v            (B, H, V)          likewise
#   i, f         (B, H)             pre-activations, any float
#   C            (rows, H, K, V)    fp32 or bf16, updated; strides of every axis
#   n            (rows, H, K)       likewise; None without a normaliser
#   m            (rows, H) fp32     updated, likewise
#   slots        (B,) i32 or i64    the row of the states of each row of the batch; None: the same
#   h            (B, H, V)          written, in v's dtype; NaN where a slot is out of range
#   arrived      (rows, H) i32      programs of a head that have read n and m; 0 between launches;
#                                   None where one program has all of V
#   scale        of q
#   H, K, V      heads, q/k head dim, v head dim
#   rows         of C, n and m
#   BLOCK_K      the power of two from K on: a program has all of K
#   BLOCK_V      columns of a program
#   STRIDE_CK    C's stride by K, a constant
#   LOG_I        the input gate's function, pre-activation -> log_i
#   SIGMOID_F    f is a pre-activation of a sigmoid, else log_f
@triton.jit(do_not_specialize=["H", "rows", *GATE_STRIDES])
def _step_kernel(
    q,
    k,
    v,
    i,
    f,
    C,
    n,
    m,
    slots,
    h,
    arrived,
    scale,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_ib,
    stride_ih,
    stride_fb,
    stride_fh,
    stride_cn,
    stride_ch,
    stride_cv,
    stride_nn,
    stride_nh,
    stride_nk,
    stride_mn,
    stride_mh,
    H,
    K,
    V,
    rows,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STRIDE_CK: tl.constexpr,
    LOG_I: tl.constexpr,
    SIGMOID_F: tl.constexpr,
):
    """C' = exp(log_f + m - m') C + exp(log_i - m') k v^T, and h, for BLOCK_V columns of one head.

    Every program of a head reads n and m, and the last one to have done so writes them. STRIDE_CK
    is constant, which saves a register in ten.
    """
    tiles = tl.cdiv(V, BLOCK_V)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = batch
    if slots is not None:
        slot = tl.load(slots + batch).to(tl.int64)
        if (slot < 0) | (slot >= rows):  # the host cannot look: h says it, no state is touched
            nothing = tl.full([BLOCK_V], float("nan"), tl.float32).to(h.dtype.element_ty)
            tl.store(h + (batch * H + head) * V + columns, nothing, mask=columns < V)
            return
    C_head = C + slot * stride_cn + head * stride_ch
    C_at = C_head + lanes[:, None] * STRIDE_CK + columns[None, :] * stride_cv
    inside = (lanes < K)[:, None] & (columns < V)[None, :]
    C_old = tl.load(C_at, mask=inside, other=0.0)
    tl.debug_barrier()  # else the compiler puts this off until the gates are there
    q_at = q + batch * stride_qb + head * stride_qh + lanes
    q_row = tl.load(q_at, mask=lanes < K, other=0.0).to(tl.float32) * scale
    k_at = k + batch * stride_kb + head * stride_kh + lanes
    k_row = tl.load(k_at, mask=lanes < K, other=0.0).to(tl.float32)
    v_at = v + batch * stride_vb + head * stride_vh + columns
    v_row = tl.load(v_at, mask=columns < V, other=0.0).to(tl.float32)
    if m is not None:
        m_at = m + slot * stride_mn + head * stride_mh
        n_at = n + slot * stride_nn + head * stride_nh + lanes * stride_nk
        m_old = within(tl.load(m_at), EMPTY, -EMPTY)
        n_old = tl.load(n_at, mask=lanes < K, other=0.0).to(tl.float32)
    log_i = tl.load(i + batch * stride_ib + head * stride_ih).to(tl.float32)
    log_f = tl.load(f + batch * stride_fb + head * stride_fh).to(tl.float32)
    log_i = LOG_I(log_i)
    if SIGMOID_F:
        log_f = _log_sigmoid(log_f)
    log_i, log_f = limited(log_i, log_f)
    if m is not None:
        carried = log_f + m_old
        m_new = larger(carried, log_i)
        m_new = tl.where(m_new < EMPTY, 0.0, m_new)  # nothing is left
        # What rounding takes from the sum: at a gauge of 1e5 it comes in steps of 0.008.
        kept = carried - log_f
        lost = (log_f - (carried - kept)) + (m_old - kept)
        decay = tl.exp(carried - m_new + tl.where(tl.abs(lost) > FOLLOWED, 0.0, lost))
        weight = tl.exp(log_i - m_new)
        n_new = decay * n_old + weight * k_row
        floor = within(tl.exp(-m_new), 2.0**-126, 2.0**126)
        den = larger(tl.abs(tl.sum(n_new * q_row, 0)), floor)
        last = batch >= 0
        if arrived is not None:
            # Relaxed: all that was read of n and m is in den, which no thread has before them all.
            at = arrived + slot * H + head
            tl.debug_barrier()
            last = tl.atomic_add(at, 1, sem="relaxed") % tiles == tiles - 1
    else:
        decay = tl.exp(log_f)
        weight = tl.exp(log_i)
    C_new = decay * C_old.to(tl.float32) + (weight * k_row)[:, None] * v_row[None, :]
    tl.store(C_at, C_new.to(C.dtype.element_ty), mask=inside)
    h_row = tl.sum(C_new * q_row[:, None], 0)
    if m is not None:
        h_row = h_row / den
        if last:
            tl.store(n_at, n_new.to(n.dtype.element_ty), mask=lanes < K)
            tl.store(m_at, m_new)
            if arrived is not None:
                tl.atomic_add(at, -tiles, sem="relaxed")
    tl.store(h + (batch * H + head) * V + columns, h_row.to(h.dtype.element_ty), mask=columns < V)


_arrivals: dict[tuple[Any, ...], Tensor] = {}


def _arrived(m: Tensor) -> Tensor:
    """Counters for (rows, H) that every launch leaves at zero. They belong to the memory of m, of
    which launches at the same time (streams, CUDA graphs) use different rows, and are never freed:
    a graph knows their address. One that is recorded before any step has counters of its own."""
    key = (m.device, m.data_ptr(), m.shape, m.stride())
    found = _arrivals.get(key)
    if found is None:
        found = m.new_zeros(m.shape, dtype=torch.int32)
        if not (m.is_cuda and torch.cuda.is_current_stream_capturing()):
            _arrivals[key] = found
    return found


def update(x: StepInputs, options: StepOptions) -> Tensor:
    """One token: writes new states over old (rows ``slots``, or all); h (B, H, V) in v's dtype."""
    q, k, v, i, f, C, n, m, slots = x
    (B, H, K), V = q.shape, v.shape[-1]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    slots = None if slots is None else slots.contiguous()
    h = v.new_empty(B, H, V)
    block_k = triton.next_power_of_2(K)
    full = B * H * triton.cdiv(V, REGISTERS // block_k) >= device_of(q).multiprocessors
    registers = REGISTERS if full else REGISTERS // 2  # one sequence: 4.4 and 4.0 us (H200)
    block_v = max(16, min(triton.next_power_of_2(V), registers // block_k))
    tiles = triton.cdiv(V, block_v)
    arrived = None if m is None or tiles == 1 else _arrived(m)
    strides = (0,) * 5 if n is None or m is None else (*n.stride(), *m.stride())
    launch(
        _step_kernel,
        (B * H * tiles,),
        (WARPS, 1),
        (q, k, v, i, f, C, n, m, slots, h, arrived),
        options.scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *i.stride(),
        *f.stride(),
        *C.stride()[:2],
        C.stride(3),
        *strides,
        H,
        K,
        V,
        C.shape[0],
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        STRIDE_CK=C.stride(2),
        LOG_I=form_of(options.input_gate).log_i,
        SIGMOID_F=options.sigmoid_f,
    )
    return h
