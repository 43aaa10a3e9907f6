"""Decode: one token of a batch of sequences, states updated where they lie, in one launch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from tfla.kernels.gates import (
    EMPTY,
    FOLLOWED,
    GATE_STRIDES,
    _log_sigmoid,
    larger,
    limited,
    within,
)

REGISTERS = 16384  # fp32 entries of the state that one program holds, 128 a thread, or half of it
WARPS = 4


# A program has BLOCK_V columns of one head of one row of the batch.
#
#   q, k         (B, H / R, K)      any float; strides by batch and head
#   v            (B, H, V)          likewise
#   i, f         (B, H)             pre-activations, any float
#   slots        (B,) i32 or i64    the row of the states of each row of the batch; None: the same
#   C            (rows, H, K, V)    fp32 or bf16, updated, or read; strides of every axis
#   n            (rows, H, K)       likewise; None without a normaliser
#   m            (rows, H) fp32     likewise
#   arrived      (rows, H) i32      programs of a head that have read n and m; 0 between launches;
#                                   None where one program has all of V
#   C_out, n_out, m_out             where the new state is written, laid out as the old one and
#                                   perhaps the same memory; None: over the old one
#   h            (B, H, V)          written, in v's dtype; NaN where a slot is out of range
#   scale        of q
#   H, K, V      heads, q/k head dim, v head dim
#   R            heads that share one of q and k
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
    slots,
    C,
    n,
    m,
    arrived,
    C_out,
    n_out,
    m_out,
    h,
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
    R,
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
    C_to = C_at
    if C_out is not None:
        C_to = C_out + slot * stride_cn + head * stride_ch
        C_to = C_to + lanes[:, None] * STRIDE_CK + columns[None, :] * stride_cv
    C_old = tl.load(C_at, mask=inside, other=0.0)
    tl.debug_barrier()  # else the compiler puts this off until the gates are there
    q_at = q + batch * stride_qb + head // R * stride_qh + lanes
    q_row = tl.load(q_at, mask=lanes < K, other=0.0).to(tl.float32) * scale
    k_at = k + batch * stride_kb + head // R * stride_kh + lanes
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
    tl.store(C_to, C_new.to(C.dtype.element_ty), mask=inside)
    h_row = tl.sum(C_new * q_row[:, None], 0)
    if m is not None:
        h_row = h_row / den
        if last:
            if n_out is not None:
                m_at = m_out + slot * stride_mn + head * stride_mh
                n_at = n_out + slot * stride_nn + head * stride_nh + lanes * stride_nk
            tl.store(n_at, n_new.to(n.dtype.element_ty), mask=lanes < K)
            tl.store(m_at, m_new)
            if arrived is not None:
                tl.atomic_add(at, -tiles, sem="relaxed")
    tl.store(h + (batch * H + head) * V + columns, h_row.to(h.dtype.element_ty), mask=columns < V)


class Tiles(NamedTuple):
    """How the state of each head is divided among programs."""

    block_k: int  # all of K
    block_v: int
    number: int  # along V


@functools.lru_cache(maxsize=1024)
def tiles_of(B: int, H: int, K: int, V: int, multiprocessors: int, most: int) -> Tiles:
    """most: entries of the state that one program may hold, ``REGISTERS``."""
    block_k = triton.next_power_of_2(K)
    full = B * H * triton.cdiv(V, most // block_k) >= multiprocessors
    registers = most if full else most // 2  # one sequence: 4.4 and 4.0 us (H200)
    block_v = max(16, min(triton.next_power_of_2(V), registers // block_k))
    return Tiles(block_k, block_v, triton.cdiv(V, block_v))
