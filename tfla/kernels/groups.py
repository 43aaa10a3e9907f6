"""dq and dk where many heads of v, R, share a head of q and k, in Triton.

With P_h = D_h * (dh_h v_h^T + d_h) of head h, C_h the state before a tile of tokens and dC_h the
gradient of the state behind it, sums over the heads h of a group,

    dq = S k + sum_h w_h * (dh_h C_h^T + d_h n_h)      S = sum_h P_h, within a tile
    dk = S^T q + sum_h r_h * (v_h dC_h^T + dn_h)

where w is what the state before the tile weighs at a token, and r what a token weighs in the state
behind it. All sums are in fp32, in one order; no gradient of a single head is ever in memory.

    _scores_kernel    S of every tile of 2 L tokens, and row and column sums of P_h * (q k^T), the
                      shares of q . dq and k . dk that lie within the tile. Both are sums of the
                      same numbers, for the gradients of the gates are made of their difference
    _gradient_kernel  dq from S and from the states, dk likewise in reverse, each with the other
                      share of q . dq or k . dk

The scans of h and dv store the states, every CHECKPOINT_EVERY tokens. A program starts from one of
them and adds the tiles between it and its own.

Arguments that both kernels have: q, k (B, T, G, K), v, dh (B, T, H, V), ``weights`` and ``decay``
as in gates.py, d (rows, chunks, L) of a normalised call or None; scores (splits, tiles, 3, L, L),
the blocks of S that are not 0, tiles counted by checkpoint interval, group and tile of the
interval; q_dq, k_dk and dot (parts, rows, chunks, L), shares of q . dq and of k . dk. The heads of
a group are shared by ``splits`` programs.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tfla.kernels.gates import FIRST_SOURCE, VECTORS, power, scaled, within
from tfla.kernels.layout import first_checkpoint_index, first_index, interval, sequence
from tfla.kernels.program import Symbol, name_of
from tfla.kernels.scan import _spare
from tfla.kernels.weights import GateWeights, strides

LARGEST = tl.constexpr(3.0e38)  # in fp32 and in bf16; times 0 it is 0


@triton.jit
def _rows(x, stride, t, length, first, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) of x from token t, column ``first``; zeros past ``length`` and ``width``."""
    l = t + tl.arange(0, ROWS)
    column = first + tl.arange(0, BLOCK)
    seen = (l < length)[:, None] & (column < width)[None, :]
    return tl.load(x + l.to(tl.int64)[:, None] * stride + column[None, :], mask=seen, other=0.0)


@triton.jit
def _widened(x, OPAQUE: tl.constexpr):
    """x in fp32. What is the same for all heads the compiler would widen once, and hold in twice as
    many registers. OPAQUE: it cannot know that x is the same."""
    if OPAQUE:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def _of_head(
    x,
    head,
    stride_h,
    stride_t,
    t,
    length,
    first,
    V,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """The same of a head of x, v or dh; DESCRIPTOR: the copy engine has x as (T, H V)."""
    if DESCRIPTOR:
        return x.load([t, head.to(tl.int32) * V + first])
    else:
        return _rows(x + head * stride_h, stride_t, t, length, first, V, ROWS, BLOCK)


@triton.jit
def _vector(weights, chunk, chunks, WHICH: tl.constexpr, L: tl.constexpr):
    """One of the vectors of a chunk of a sequence; zeros behind the last one. weights: of the
    first."""
    at = weights + chunk.to(tl.int64) * (VECTORS * L) + WHICH * L + tl.arange(0, L)
    return tl.load(at, mask=chunk < chunks, other=0.0)


@triton.jit
def _edges(weights, decay, chunk, chunks, SOURCES: tl.constexpr, L: tl.constexpr):
    """What the state before a tile weighs at its 2 L tokens, or with SOURCES what they weigh in the
    state behind it. chunk: the first of its two."""
    l = tl.arange(0, 2 * L)
    c = chunk + l // L
    which: tl.constexpr = FIRST_SOURCE + 2 if SOURCES else 2
    at = weights + c.to(tl.int64) * (VECTORS * L) + which * L + l % L
    edge = tl.load(at, mask=c < chunks, other=0.0)
    between = chunk + 1 if SOURCES else chunk
    keep = tl.load(decay + between, mask=between < chunks, other=1.0)
    crosses = (l < L) if SOURCES else (l >= L)
    return tl.where(crosses, scaled(edge, keep), edge)


@triton.jit
def _decay_of(decay, chunk, chunks):
    """What a tile leaves of the state before it."""
    first = tl.load(decay + chunk, mask=chunk < chunks, other=1.0)
    return scaled(first, tl.load(decay + chunk + 1, mask=chunk + 1 < chunks, other=1.0))


@triton.jit
def _factors(
    weights,
    decay,
    own,
    chunk,
    chunks,
    UPDATES: tl.constexpr,
    REVERSE: tl.constexpr,
    L: tl.constexpr,
):
    """What a gradient takes of a head besides its operands: what the state weighs at the tokens of
    the tile; of each tile between them and the checkpoint, what its tokens weigh in the state
    behind it, and what it leaves of the one before. own: the first chunk of the sequence and head,
    among all."""
    here = weights + own * (VECTORS * L)
    decay += own
    in_states = ()
    keeps = ()
    for step in tl.static_range(UPDATES):
        c = chunk + (UPDATES - step if REVERSE else step - UPDATES) * 2
        in_states += (_edges(here, decay, c, chunks, not REVERSE, L),)
        keeps += (_decay_of(decay, c, chunks),)
    return _edges(here, decay, chunk, chunks, REVERSE, L), in_states, keeps


@triton.jit
def _exponents(weights, chunk, chunks, L: tl.constexpr):
    """Of targets and of sources of a chunk, each as (whole, rest)."""
    return (
        _vector(weights, chunk, chunks, 0, L),
        _vector(weights, chunk, chunks, 1, L),
        _vector(weights, chunk, chunks, FIRST_SOURCE, L),
        _vector(weights, chunk, chunks, FIRST_SOURCE + 1, L),
    )


@triton.jit
def _vectors_of(weights, d, own, chunk, chunks, L: tl.constexpr):
    """What the scores of a tile take of a head besides v and dh: exponents of both chunks, what the
    state between them weighs at targets, what sources weigh in it, d of both. own: as in
    ``_factors``."""
    here = weights + own * (VECTORS * L)
    d_1 = tl.zeros([L], tl.float32)
    d_2 = d_1
    if d is not None:
        at = d + (own + chunk) * L + tl.arange(0, L)
        d_1 = tl.load(at)
        d_2 = tl.load(at + L, mask=chunk + 1 < chunks, other=0.0)
    return (
        _exponents(here, chunk, chunks, L),
        _exponents(here, chunk + 1, chunks, L),
        _vector(here, chunk + 1, chunks, 2, L),
        _vector(here, chunk, chunks, FIRST_SOURCE + 2, L),
        d_1,
        d_2,
    )


@triton.jit
def _within_chunk(P, exponents, L: tl.constexpr, PRECISE: tl.constexpr):
    """D * P of targets and sources of one chunk."""
    row, row_rest, col, col_rest = exponents
    D = power(row[:, None] + col[None, :], row_rest[:, None] + col_rest[None, :], PRECISE)
    l = tl.arange(0, L)
    # What weighs nothing is 0, also where the product has overflowed.
    return tl.where((l[:, None] >= l[None, :]) & (D != 0.0), P * D, 0.0)


@triton.jit
def _product(
    a,
    b,
    stride_a,
    stride_b,
    t_a,
    t_b,
    length,
    width,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(L, L) rows of a from token t_a times rows of b from token t_b."""
    P = tl.zeros([L, L], tl.float32)
    for first in range(0, width, BLOCK):
        A = _rows(a, stride_a, t_a, length, first, width, L, BLOCK)
        B = _rows(b, stride_b, t_b, length, first, width, L, BLOCK)
        P = tl.dot(A, tl.trans(B), P, input_precision=PRECISION)
    return P


@triton.jit
def _scores_of(
    q,
    k,
    stride_q,
    stride_k,
    t_q,
    t_k,
    length,
    K,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q k^T, finite so that 0 times it is 0; of bf16 in bf16, which takes half of the registers."""
    P = _product(q, k, stride_q, stride_k, t_q, t_k, length, K, L, BLOCK_K, PRECISION)
    P = within(P, -LARGEST, LARGEST)
    if q.dtype.element_ty == tl.bfloat16:
        return P.to(tl.bfloat16)
    else:
        return P


@triton.jit(do_not_specialize=["T", "chunks_per_head"])
def _scores_kernel(
    q,
    k,
    v,
    dh,
    weights,
    d,
    cu_seqlens,
    table,
    scores,
    q_dq,
    k_dk,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_db,
    stride_dt,
    stride_dh,
    T,
    H,
    chunks_per_head,
    K,
    V,
    R,
    HEADS,
    L: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    OPAQUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S of a tile, chunks one and two: three products of L x L a head, for what the second chunk
    writes does not reach the first. HEADS: of a group that a program has. ONE_BLOCK: V fits into a
    block."""
    PACKED: tl.constexpr = cu_seqlens is not None
    PRECISE: tl.constexpr = q.dtype.element_ty == tl.float32
    TILES: tl.constexpr = CHECKPOINT_EVERY // (2 * L)
    split = tl.program_id(1)
    G = H // R
    tile = tl.program_id(0) % TILES
    group = (tl.program_id(0) // TILES) % G
    n, j = interval(tl.program_id(0) // TILES // G, cu_seqlens, table, T, CHECKPOINT_EVERY, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    first = j * CHECKPOINT_EVERY + tile * (2 * L)
    if first >= length:
        return
    length = length.to(tl.int32)
    one = first.to(tl.int32)
    two = one + L
    chunk = one // L
    chunks = (length + L - 1) // L
    first_chunk = first_index(n, start, L, PACKED)
    q += batch * stride_qb + start * stride_qt + group.to(tl.int64) * stride_qh
    k += batch * stride_kb + start * stride_kt + group.to(tl.int64) * stride_kh
    v += batch * stride_vb + start * stride_vt
    dh += batch * stride_db + start * stride_dt
    if DESCRIPTOR:
        v = tl.make_tensor_descriptor(v, [length, H * V], [stride_vt, 1], [L, BLOCK_V])
        dh = tl.make_tensor_descriptor(dh, [length, H * V], [stride_dt, 1], [L, BLOCK_V])
    QK = _scores_of(q, k, stride_qt, stride_kt, one, one, length, K, L, BLOCK_K, PRECISION)
    QK_2 = _scores_of(q, k, stride_qt, stride_kt, two, two, length, K, L, BLOCK_K, PRECISION)
    QK_21 = _scores_of(q, k, stride_qt, stride_kt, two, one, length, K, L, BLOCK_K, PRECISION)
    S = tl.zeros([L, L], tl.float32)
    S_2 = tl.zeros([L, L], tl.float32)
    S_21 = tl.zeros([L, L], tl.float32)
    l = tl.arange(0, L)
    low = split * HEADS
    high = tl.minimum(low + HEADS, R)
    first_head = (group * R + tl.minimum(low, R - 1)).to(tl.int64)
    bh = first_head if PACKED else batch * H + first_head
    own = bh * chunks_per_head + first_chunk
    vectors = _vectors_of(weights, d, own, chunk, chunks, L)
    for r in range(low, high):
        head = (group * R + r).to(tl.int64)
        one_of, two_of, target, source, d_1, d_2 = vectors
        # Those of the next head are on their way while this one is worked on.
        following = own + tl.where(r + 1 < high, chunks_per_head, 0)
        vectors = _vectors_of(weights, d, following, chunk, chunks, L)
        if ONE_BLOCK:
            V_1 = _of_head(v, head, stride_vh, stride_vt, one, length, 0, V, L, BLOCK_V, DESCRIPTOR)
            V_2 = _of_head(v, head, stride_vh, stride_vt, two, length, 0, V, L, BLOCK_V, DESCRIPTOR)
            dh_1 = _of_head(
                dh, head, stride_dh, stride_dt, one, length, 0, V, L, BLOCK_V, DESCRIPTOR
            )
            dh_2 = _of_head(
                dh, head, stride_dh, stride_dt, two, length, 0, V, L, BLOCK_V, DESCRIPTOR
            )
            P_21 = tl.dot(dh_2, tl.trans(V_1), input_precision=PRECISION)
            P_2 = tl.dot(dh_2, tl.trans(V_2), input_precision=PRECISION)
            P = tl.dot(dh_1, tl.trans(V_1), input_precision=PRECISION)
        else:
            v_head = v + head * stride_vh
            dh_head = dh + head * stride_dh
            P_21 = _product(
                dh_head, v_head, stride_dt, stride_vt, two, one, length, V, L, BLOCK_V, PRECISION
            )
            P_2 = _product(
                dh_head, v_head, stride_dt, stride_vt, two, two, length, V, L, BLOCK_V, PRECISION
            )
            P = _product(
                dh_head, v_head, stride_dt, stride_vt, one, one, length, V, L, BLOCK_V, PRECISION
            )
        if d is not None:
            P_21 += d_2[:, None]
            P_2 += d_2[:, None]
            P += d_1[:, None]
        at = (own + chunk) * L + l
        there = chunk + 1 < chunks
        P_21 = scaled(scaled(P_21, target[:, None]), source[None, :])
        S_21 += P_21
        W_21 = P_21 * _widened(QK_21, OPAQUE)
        P_2 = _within_chunk(P_2, two_of, L, PRECISE)
        S_2 += P_2
        W_2 = P_2 * _widened(QK_2, OPAQUE)
        tl.store(q_dq + at + L, tl.sum(W_21 + W_2, 1), mask=there)
        tl.store(k_dk + at + L, tl.sum(W_2, 0), mask=there)
        P = _within_chunk(P, one_of, L, PRECISE)
        S += P
        W = P * _widened(QK, OPAQUE)
        tl.store(q_dq + at, tl.sum(W, 1))
        tl.store(k_dk + at, tl.sum(W + W_21, 0))
        own = following
    scores += (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (3 * L * L)
    at = scores + l[:, None] * L + l[None, :]
    tl.store(at, S.to(scores.dtype.element_ty))
    tl.store(at + L * L, S_21.to(scores.dtype.element_ty))
    tl.store(at + 2 * L * L, S_2.to(scores.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "chunks_per_head", "checkpoints_per_head", "rows"])
def _gradient_kernel(
    a,
    b,
    x,
    y,
    weights,
    decay,
    d,
    vector,
    state,
    cu_seqlens,
    table,
    checkpoints,
    scores,
    dot,
    out,
    stride_ab,
    stride_at,
    stride_ah,
    stride_bb,
    stride_bt,
    stride_bh,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_sn,
    stride_sh,
    stride_sa,
    stride_sx,
    T,
    H,
    chunks_per_head,
    checkpoints_per_head,
    size,
    rows,
    stride_checkpoint,
    stride_split,
    K,
    V,
    R,
    HEADS,
    L: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STRIDE_CHECKPOINT_K: tl.constexpr,
    TILE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    REVERSE: tl.constexpr,
    AT_SEQUENCE_END: tl.constexpr,
    OPAQUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_K columns of dq of a tile, with a = dh, b = v, x = k and y = q; with REVERSE of dk,
    with a = v, b = dh, x = q and y = k. The state lies as (V, K), a product's right operand; of
    what was kept it reads (K, V)."""
    PACKED: tl.constexpr = cu_seqlens is not None
    FITTED: tl.constexpr = a.dtype.element_ty == tl.float16
    UPDATES: tl.constexpr = CHECKPOINT_EVERY // (2 * L) - 1 - TILE if REVERSE else TILE
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(1) % blocks
    split = tl.program_id(1) // blocks
    G = H // R
    group = tl.program_id(0) % G
    n, j = interval(tl.program_id(0) // G, cu_seqlens, table, T, CHECKPOINT_EVERY, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    first = j * CHECKPOINT_EVERY + TILE * (2 * L)
    if first >= length:
        return
    is_kept = j > 0
    kept = j - 1
    if REVERSE:
        is_kept = AT_SEQUENCE_END or ((j + 1) * CHECKPOINT_EVERY < length)
        kept = j
    length = length.to(tl.int32)
    token = first.to(tl.int32)
    chunk = token // L
    chunks = (length + L - 1) // L
    first_chunk = first_index(n, start, L, PACKED)
    kept += first_checkpoint_index(n, start, CHECKPOINT_EVERY, PACKED, AT_SEQUENCE_END)
    k_first = block * BLOCK_K
    column = k_first + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_V)
    l = tl.arange(0, 2 * L)
    a += batch * stride_ab + start * stride_at
    b += batch * stride_bb + start * stride_bt
    x += batch * stride_xb + start * stride_xt + group.to(tl.int64) * stride_xh
    y += batch * stride_yb + start * stride_yt + group.to(tl.int64) * stride_yh
    X = _rows(x, stride_xt, token, length, k_first, K, 2 * L, BLOCK_K)
    Y = _rows(y, stride_yt, token, length, k_first, K, 2 * L, BLOCK_K)
    # The sums S, of which the blocks of targets in the second chunk lie behind that of the first.
    place = split * tl.num_programs(0) + tl.program_id(0)
    scores += (place.to(tl.int64) * (CHECKPOINT_EVERY // (2 * L)) + TILE) * (3 * L * L)
    target, source = (l[None, :], l[:, None]) if REVERSE else (l[:, None], l[None, :])
    entry = (target // L + source // L) * (L * L) + target % L * L + source % L
    P = tl.load(scores + entry, mask=target >= source, other=0.0)
    if FITTED:
        P_spare = _spare(P, 1)
        total = tl.dot((P * tl.exp2(-P_spare)).to(X.dtype), X) * tl.exp2(P_spare)
    else:
        total = tl.dot(P, X, input_precision=PRECISION)
    # Tiles between the checkpoint and this one; behind the sequence there are zeros.
    others = ()
    for step in tl.static_range(UPDATES):
        t = token + (UPDATES - step if REVERSE else step - UPDATES) * (2 * L)
        others += (_rows(x, stride_xt, t, length, k_first, K, 2 * L, BLOCK_K),)
    if DESCRIPTOR:
        a = tl.make_tensor_descriptor(a, [length, H * V], [stride_at, 1], [2 * L, BLOCK_V])
        b = tl.make_tensor_descriptor(b, [length, H * V], [stride_bt, 1], [2 * L, BLOCK_V])
        rows_kept = stride_checkpoint // STRIDE_CHECKPOINT_K  # of one state
        last = (rows * checkpoints_per_head * rows_kept).to(tl.int32)
        checkpoints = tl.make_tensor_descriptor(
            checkpoints, [last, STRIDE_CHECKPOINT_K], [STRIDE_CHECKPOINT_K, 1], [BLOCK_K, BLOCK_V]
        )
    low = split * HEADS
    high = tl.minimum(low + HEADS, R)
    first_head = (group * R + tl.minimum(low, R - 1)).to(tl.int64)
    bh = first_head if PACKED else batch * H + first_head
    factors = _factors(
        weights, decay, bh * chunks_per_head + first_chunk, chunk, chunks, UPDATES, REVERSE, L
    )
    for r in range(low, high):
        head = (group * R + r).to(tl.int64)
        own = bh * chunks_per_head + first_chunk
        edge, in_states, keeps = factors
        # Those of the next head are on their way while this one is worked on.
        following = bh + tl.where(r + 1 < high, 1, 0)
        factors = _factors(
            weights,
            decay,
            following * chunks_per_head + first_chunk,
            chunk,
            chunks,
            UPDATES,
            REVERSE,
            L,
        )
        U = tl.zeros([2 * L, BLOCK_K], tl.float32)
        for v_first in range(0, BLOCK_V if ONE_BLOCK else V, BLOCK_V):
            value = v_first + lane
            inside = (value < V)[:, None] & (column < K)[None, :]
            if DESCRIPTOR:  # before the first one there are zeros
                first_row = tl.where(
                    is_kept, (bh * checkpoints_per_head + kept) * rows_kept + k_first, -BLOCK_K
                )
                S = tl.trans(checkpoints.load([first_row.to(tl.int32), v_first]))
            else:
                at = checkpoints + (bh * checkpoints_per_head + kept) * stride_checkpoint
                at += column[None, :] * STRIDE_CHECKPOINT_K + value[:, None]
                S = tl.load(at, mask=inside & is_kept, other=0.0)
            if state is not None:
                initial = state + n.to(tl.int64) * stride_sn + head * stride_sh
                initial += value[:, None] * stride_sa + column[None, :] * stride_sx
                S = S.to(tl.float32) + tl.load(initial, mask=inside & (j == 0), other=0.0)
            for step in tl.static_range(UPDATES):
                t = token + (UPDATES - step if REVERSE else step - UPDATES) * (2 * L)
                B = _of_head(
                    b, head, stride_bh, stride_bt, t, length, v_first, V, 2 * L, BLOCK_V, DESCRIPTOR
                )
                B_weighed = scaled(B.to(tl.float32), in_states[step][:, None])
                S = S.to(tl.float32)
                S = S * keeps[step] if DESCRIPTOR else scaled(S, keeps[step])
                if FITTED:
                    B_spare = _spare(B_weighed, 0)
                    B_weighed *= tl.exp2(-B_spare)
                    S *= tl.exp2(-tl.trans(B_spare))
                B_low = tl.trans(B_weighed.to(B.dtype))
                S = tl.dot(B_low, others[step], S, input_precision=PRECISION)
                if FITTED:
                    S *= tl.exp2(tl.trans(B_spare))
            A = _of_head(
                a, head, stride_ah, stride_at, token, length, v_first, V, 2 * L, BLOCK_V, DESCRIPTOR
            )
            if FITTED:
                S_spare = _spare(S, 0)
                U += tl.dot(A, (S * tl.exp2(-S_spare)).to(A.dtype)) * tl.exp2(S_spare)
            else:
                U = tl.dot(A, S.to(A.dtype), U, input_precision=PRECISION)
        there = chunk + l // L < chunks
        here_l = (own + chunk) * L + l
        if d is not None:
            if REVERSE:
                last_chunk = own + tl.minimum(chunk + 1, chunks - 1)
                dn = tl.load(vector + last_chunk * K + column, mask=column < K, other=0.0)
                U += dn[None, :]
            else:
                n_row = tl.load(vector + (own + chunk) * K + column, mask=column < K, other=0.0)
                U += tl.load(d + here_l, mask=there, other=0.0)[:, None] * n_row[None, :]
        if not DESCRIPTOR:  # on Hopper the state is multiplied by 0, as in hopper.py
            U = tl.where(edge[:, None] == 0.0, 0.0, U)
        total += U * edge[:, None]
        U_y = tl.sum(U * _widened(Y, OPAQUE), 1) * edge
        tl.store(dot + (1 + block) * size.to(tl.int64) + here_l, U_y, mask=there)
        bh = following
    token_l = token + l
    to = (batch * T + start + token_l)[:, None] * (G * K) + group * K + column[None, :]
    seen = (token_l < length)[:, None] & (column < K)[None, :]
    out += split.to(tl.int64) * stride_split
    tl.store(out + to, total.to(out.dtype.element_ty), mask=seen)


@triton.jit
def _add_kernel(parts, out, size, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out (size / width, width), the sum of parts (size / width, PARTS, width)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    parts += at // width * PARTS * width + at % width
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(parts, mask=at < size, other=0.0).to(tl.float32)
        parts += width
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


# ---------------------------------------------------------------- launches


class Scores(NamedTuple):
    """What ``_scores_kernel`` makes for both gradients."""

    sums: Symbol  # ``scores``
    q_dq: Symbol  # (parts, rows, chunks, L), of which it is the first
    k_dk: Symbol


def _intervals(weights: GateWeights) -> int:
    """Checkpoint intervals of all sequences and groups."""
    spec, every = weights.spec, weights.plan.checkpoint_every
    each = spec.T // every + spec.N if spec.packed else spec.N * -(-spec.T // every)
    return each * spec.G


def _tiles(weights: GateWeights) -> int:
    """Of a checkpoint interval."""
    return weights.plan.checkpoint_every // (2 * weights.plan.L)


def _precision(weights: GateWeights) -> str:
    """Of products of fp32: where TF32 is allowed, three of its products in place of one, for
    dlog_f is a difference."""
    return "ieee" if weights.spec.precision == "ieee" else "tf32x3"


def _is_opaque(weights: GateWeights) -> bool:
    """See ``_widened``: is there bf16 to hold in pairs, and an assembler that knows the word?"""
    nvidia = weights.vectors.builder.device.capability[0] > 0
    return nvidia and name_of(weights.spec.dtype) == "bf16"


def _has_descriptors(weights: GateWeights, *tensors: Symbol) -> bool:
    """Can the copy engine have v and dh as (T, H V), and are their heads whole blocks of that?"""
    spec, plan = weights.spec, weights.plan
    assert plan.group is not None
    whole = plan.h.descriptor and spec.V == plan.group.block_v and spec.dtype.itemsize == 2
    return whole and all(x.strides[2] == spec.V for x in tensors) and weights.sizes.checkpoints > 0


def scores(
    q: Symbol, k: Symbol, v: Symbol, dh: Symbol, d: Symbol | None, weights: GateWeights
) -> Scores:
    """The sums S of all tiles, and the shares of q . dq and k . dk within them."""
    spec, plan, builder = weights.spec, weights.plan, q.builder
    tile = plan.group
    assert tile is not None
    rows = weights.sizes.rows, weights.sizes.chunks, plan.L
    parts = 1 + -(-spec.K // tile.block_k)
    low = "bf16" if q.dtype == "bf16" else "fp32"
    tiles = _intervals(weights) * _tiles(weights)
    made = Scores(
        builder.new("scores", tile.splits, tiles, 3, plan.L, plan.L, dtype=low),
        builder.new("dq dot", parts, *rows),
        builder.new("dk dot", parts, *rows),
    )
    builder.launch(
        "scores",
        _scores_kernel,
        (tiles, tile.splits),
        tile.scores_warps,
        tile.scores_stages,
        reads={
            "q": q,
            "k": k,
            "v": v,
            "dh": dh,
            "weights": weights.vectors,
            "d": d,
            "cu_seqlens": weights.cu_seqlens,
            "table": weights.tables[1],
        },
        writes={"scores": made.sums, "q_dq": made.q_dq, "k_dk": made.k_dk},
        numbers=strides("q", q)
        | strides("k", k)
        | strides("v", v)
        | strides("d", dh)
        | weights.common
        | {"K": spec.K, "V": spec.V, "R": spec.R, "HEADS": -(-spec.R // tile.splits)},
        constants={
            "L": plan.L,
            "CHECKPOINT_EVERY": plan.checkpoint_every,
            "BLOCK_K": tile.block_k,
            "BLOCK_V": tile.block_v,
            "ONE_BLOCK": spec.V <= tile.block_v,
            "DESCRIPTOR": _has_descriptors(weights, v, dh),
            "OPAQUE": _is_opaque(weights),
            "PRECISION": _precision(weights),
        },
    )
    return made


class Operands(NamedTuple):
    """What the gradient of q or of k is made of; see ``_gradient_kernel``."""

    a: Symbol  # (B, T, H, V)
    b: Symbol  # (B, T, H, V)
    x: Symbol  # (B, T, G, K)
    y: Symbol  # (B, T, G, K)
    state: Symbol | None  # (N, H, V, K)
    d: Symbol | None  # (rows, chunks, L) of a normalised call
    vector: Symbol | None  # (rows, chunks, K) n before each chunk, dn behind it, likewise


def gradient(x: Operands, made: Scores, weights: GateWeights, *, reverse: bool) -> Symbol:
    """dq, or with ``reverse`` dk, (B, T, G, K); the shares of q . dq or k . dk beyond the tiles go
    to the others in ``made``."""
    spec, plan, builder = weights.spec, weights.plan, x.a.builder
    tile = plan.group
    checkpoints = weights.dC_checkpoints if reverse else weights.C_checkpoints
    assert tile is not None and checkpoints is not None
    name = "dk" if reverse else "dq"
    shape = spec.B, spec.T, spec.G, spec.K
    out = builder.new(name, *shape, dtype=x.x.dtype)
    whole = out if tile.splits == 1 else builder.new(f"{name} parts", tile.splits, *shape)
    dot = made.k_dk if reverse else made.q_dq
    # dC at the end of a sequence is among what was kept.
    state = None if reverse else x.state
    for place in range(_tiles(weights)):
        is_first = place == 0
        updates = _tiles(weights) - 1 - place if reverse else place
        builder.launch(
            name,
            _gradient_kernel,
            (_intervals(weights), -(-spec.K // tile.block_k) * tile.splits),
            tile.gradient_warps,
            tile.gradient_stages[updates],
            reads={
                "a": x.a,
                "b": x.b,
                "x": x.x,
                "y": x.y,
                "weights": weights.vectors,
                "decay": weights.decay,
                "d": x.d,
                "vector": x.vector,
                "state": state,
                "cu_seqlens": weights.cu_seqlens,
                "table": weights.tables[1],
                "checkpoints": checkpoints,
                "scores": made.sums,
            },
            updates={"dot": dot} | ({} if is_first else {"out": whole}),
            writes={"out": whole} if is_first else {},
            numbers=strides("a", x.a)
            | strides("b", x.b)
            | strides("x", x.x)
            | strides("y", x.y)
            | (strides("s", state, "nhax") if state else {f"stride_s{axis}": 0 for axis in "nhax"})
            | weights.common
            | {
                "checkpoints_per_head": weights.sizes.checkpoints,
                "size": weights.size,
                "rows": weights.sizes.rows,
                "stride_checkpoint": plan.checkpoint_shape[0] * plan.checkpoint_shape[1],
                "stride_split": out.numel,
                "K": spec.K,
                "V": spec.V,
                "R": spec.R,
                "HEADS": -(-spec.R // tile.splits),
            },
            constants={
                "L": plan.L,
                "CHECKPOINT_EVERY": plan.checkpoint_every,
                "BLOCK_K": tile.block_k,
                "BLOCK_V": tile.block_v,
                "STRIDE_CHECKPOINT_K": plan.checkpoint_shape[1],
                "TILE": place,
                "ONE_BLOCK": spec.V <= tile.block_v,
                "DESCRIPTOR": _has_descriptors(weights, x.a, x.b),
                "REVERSE": reverse,
                "AT_SEQUENCE_END": spec.at_sequence_end,
                "OPAQUE": _is_opaque(weights),
                "PRECISION": _precision(weights),
            },
        )
    if whole is not out:
        add(name, whole, out, tile.splits, out.numel)
    return out


def add(name: str, parts: Symbol, out: Symbol, count: int, width: int) -> None:
    """The launch that makes out (..., width) of parts (..., count, width), in fp32."""
    out.builder.launch(
        name,
        _add_kernel,
        (-(-out.numel // 1024),),
        4,
        1,
        reads={"parts": parts},
        writes={"out": out},
        numbers={"size": out.numel, "width": width},
        constants={"PARTS": count, "BLOCK": 1024},
    )
