"""The normaliser, small and chunk-parallel: n where each chunk starts, and its share of the
backward pass.

nu = n . scale q is one more column of values, but inside the scan it would spill; here it is a sum
a chunk, a scan over the chunks and one product a chunk. The denominator then goes into the
exponents, and one scan serves all.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tfla.kernels.gates import (
    EMPTY,
    FIRST_SOURCE,
    FLOOR,
    FOLLOWED,
    GATE_STRIDES,
    LOG2E,
    LOG_F_NOTHING,
    LOG_I_NOTHING,
    MARK,
    NOTHING,
    SMALLEST,
    STEP,
    VECTORS,
    WRITE,
    _affine,
    _exp,
    _exp2,
    _log_gates,
    _pair,
    larger,
    log_scale,
    power,
    scaled,
    store_pair,
    store_weights,
    within,
)
from tfla.kernels.layout import chunk, first_index, sequence

# Where things wait for the gauge of the incoming state, among the vectors of gates.py: b of the
# stabilised gates that a chunk has by itself lies in 0 and 1, and p of them where it stays.
TOP = tl.constexpr(2)
TOP_REST = tl.constexpr(5)
TOTAL = tl.constexpr(6)
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _erases(log_f):
    """Is log_f = -inf among those of this sum?"""
    return log_f <= 0.5 * LOG_F_NOTHING


@triton.jit
def _carried(m, log_f):
    """m + log_f; where log_f erases, whatever m is, NaN too."""
    return tl.where(_erases(log_f), LOG_F_NOTHING, m + log_f)


@triton.jit
def _max_plus(decay_1, top_1, decay_2, top_2):
    return _carried(decay_1, decay_2), larger(_carried(top_1, decay_2), top_2)


@triton.jit
def _store_parts(here, rest, x):
    """An fp64 number as two of fp32; what they hold of it."""
    first = x.to(tl.float32)
    second = (x - first.to(tl.float64)).to(tl.float32)
    tl.store(here, first)
    tl.store(rest, second)
    return first.to(tl.float64) + second.to(tl.float64)


@triton.jit
def _load_parts(here, rest):
    return tl.load(here).to(tl.float64) + tl.load(rest).to(tl.float64)


@triton.jit
def _sum_up(rows, tile, weight, inside, column, sums, chunk_index, K, BLOCK_K: tl.constexpr):
    """The weighted sum of a chunk's rows (L, K), whose first ``tile`` is there already."""
    for block in range(0, K, BLOCK_K):
        total = tl.sum(scaled(tile.to(tl.float32), weight[:, None]), 0)
        tl.store(sums + chunk_index * K + block + column, total, mask=block + column < K)
        seen = inside[:, None] & (block + BLOCK_K + column < K)[None, :]
        tile = tl.load(rows[:, None] + block + BLOCK_K + column[None, :], mask=seen, other=0.0)


# BH: batch entries times heads, or heads where packed.
#
#   k            (B, T, H / R, K), bf16, fp16 or fp32   keys; stride_.. by batch, token, head
#   i, f         (B, T, H), any float               pre-activations, likewise
#   cu_seqlens   (N + 1,) i64   offsets of packed sequences, or None
#   table        i32            the sequence of each chunk, where packed
#   sums         (BH, chunks_per_head, K) fp32       written: the weighted sum of keys of each chunk
#   chunk_f      (BH, chunks_per_head) fp64          written: its sum of log_f
#   chunk_p      (BH, chunks_per_head) fp64          written: its gauge at the end, without a state
#   weights      (BH, chunks_per_head, 8, L) fp32    written: what waits for the gauge, see above
#   T, H, chunks_per_head, K   tokens, heads, places of chunks for each of BH, columns of k
#   R            heads that share one of k
#   L, BLOCK_K   tokens of a chunk; columns of k at once
#   LOG_I, SIGMOID_F, PACKED   as in gates._weights_kernel
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head", *GATE_STRIDES])
def _sums_kernel(
    k,
    i,
    f,
    cu_seqlens,
    table,
    sums,
    chunk_f,
    chunk_p,
    weights,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    T,
    H,
    chunks_per_head,
    K,
    R,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_I: tl.constexpr,
    SIGMOID_F: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Of each chunk: the sum of log_f, the gauge at its end without a state before it (``top``),
    and sum_s exp(log-weight of s at the end - top) k_s.

    What the vectors need of the gates waits where they will lie: of each token the sum of log_f up
    to it, its gauge without a state, and the exponents b and p in that gauge.
    """
    n, j, batch, head, start, length, chunk_index = chunk(
        cu_seqlens, table, T, H, chunks_per_head, L, PACKED
    )
    if j * L >= length:
        return
    t = j * L + tl.arange(0, L)
    inside = t < length
    t = start + t
    # The first tile is on its way while the gates are worked on.
    rows = k + batch * stride_kb + t * stride_kt + head // R * stride_kh
    column = tl.arange(0, BLOCK_K)
    seen = inside[:, None] & (column < K)[None, :]
    tile = tl.load(rows[:, None] + column[None, :], mask=seen, other=0.0)
    log_i, log_f = _log_gates(
        tl.load(i + batch * stride_ib + t * stride_it + head * stride_ih, mask=inside, other=0.0),
        tl.load(f + batch * stride_fb + t * stride_ft + head * stride_fh, mask=inside, other=0.0),
        inside,
        LOG_I,
        SIGMOID_F,
    )
    l = tl.arange(0, L)
    total, top = tl.associative_scan((log_f, log_i), 0, _max_plus)
    carried = _carried(tl.gather(top, tl.maximum(l - 1, 0), 0), log_f)
    # Stabilised gates. Where what came before has won, its decay is 0, not a difference of
    # roundings.
    won = (log_i < top) | (l == 0)
    a = tl.where(won, 0.0, within((carried - log_i) * LOG2E, -STEP, 0.0))
    b = tl.cumsum(a, 0)
    b_last = tl.sum(a, 0)
    p = within((log_i - top) * LOG2E, -WRITE, 0.0) - b
    p = tl.where(log_i <= LOG_I_NOTHING, NOTHING, p)
    here = weights + chunk_index * VECTORS * L + l
    store_pair(here, b, L)
    store_pair(here + FIRST_SOURCE * L, p, L)
    top = _store_parts(here + TOP * L, here + TOP_REST * L, top)
    _store_parts(here + TOTAL * L, here + (TOTAL + 1) * L, total)
    tl.store(chunk_f + chunk_index, _at(total, L - 1, L))
    tl.store(chunk_p + chunk_index, _at(top, L - 1, L))
    weight = _exp2(p + b_last)
    _sum_up(rows, tile, weight, inside, column, sums, chunk_index, K, BLOCK_K)


@triton.jit
def _at(x, position, BLOCK: tl.constexpr):
    """The entry of x at ``position`` along axis 0."""
    chosen = tl.arange(0, BLOCK) == position
    if len(x.shape) == 2:
        return tl.sum(tl.where(chosen[:, None], x, 0.0), 0)
    else:
        return tl.sum(tl.where(chosen, x, 0.0), 0)


@triton.jit
def _sums_of(sums, chunk_f, chunk_p, c, chunks, column, K):
    """What _sums_kernel stored of the chunks c of a sequence."""
    inside = c < chunks
    seen = inside[:, None] & (column < K)[None, :]
    return (
        tl.load(chunk_f + c, mask=inside, other=0.0),
        tl.load(chunk_p + c, mask=inside, other=LOG_I_NOTHING),
        tl.load(sums + c.to(tl.int64)[:, None] * K + column[None, :], mask=seen, other=0.0),
    )


@triton.jit
def _gauge_after(m_in, log_f, top):
    """The gauge after tokens whose log_f add up to log_f, and that make ``top`` of an empty
    state."""
    return larger(larger(_carried(m_in, log_f), top), EMPTY)


@triton.jit
def _followed(m_in, log_f, top, m_out):
    """The gauge at the end of a chunk that its weights are made with: m_out, or where rounding took
    more from it than they can follow what it was before."""
    m = _gauge_after(m_in, log_f, top)
    return tl.where(tl.abs(m - m_out) > FOLLOWED, m, m_out)


@triton.jit
def _in_gauge(here, l, m_in, m_end, L: tl.constexpr):
    """What waits for the gauge m_in of the incoming state, and what that says of each token: b in
    log2 units, the same as the incoming state is weighed with it, the floor exp(-m) of den, the
    mark, p, exp(p + b_L). here: pointers to the
    tokens l. m_end: the gauge at the end of the chunk."""
    first = here - l
    total = _load_parts(here + TOTAL * L, here + (TOTAL + 1) * L)
    top = _load_parts(here + TOP * L, here + TOP_REST * L)
    b, p = (
        _load_parts(here, here + L),
        _load_parts(here + FIRST_SOURCE * L, here + (FIRST_SOURCE + 1) * L),
    )
    before = tl.load(here - 1, mask=l > 0, other=0.0).to(tl.float64)
    before += tl.load(here + L - 1, mask=l > 0, other=0.0).to(tl.float64)
    last = first + (L - 1)
    b_last = _load_parts(last, last + L)
    top_last = _load_parts(last + TOP * L, last + TOP_REST * L)
    m = _gauge_after(m_in, total, top)
    from_state = (_carried(m_in, total) - m) * LOG2E
    from_state = tl.where(_erases(total), NOTHING, from_state)
    lifted = within((top - m) * LOG2E, -STEP, 0.0)
    decay = tl.where(l == 0, -STEP, lifted + (b - before))
    erased = larger(from_state, decay) < SMALLEST * LOG2E
    floor = within(_exp(-m), 2.0**-126, 2.0**126)
    at_end = _exp2(p + b_last + within((top_last - m_end) * LOG2E, -STEP, STEP))
    return b + lifted, from_state, floor, tl.where(erased, 4.0, 0.0), p, at_end


@triton.jit
def _store_weights_without_den(
    weights, first_chunk, last, token, length, m_in, m_end, scale, L: tl.constexpr
):
    """The vectors of the chunks up to ``last`` of a block, without den, its floor beside them. The
    programs of a sequence share them, eight at a time; the last one is done again where there are
    no more."""
    for nth in range(tl.program_id(1) * 8, last + 1, tl.num_programs(1) * 8):
        c = tl.minimum(nth + tl.arange(0, 8), last)
        l = tl.arange(0, L)[None, :]
        here = weights + (first_chunk + c)[:, None] * (VECTORS * L) + l
        inside = token + c[:, None] * L + l < length
        before, after = tl.gather(m_in, c, 0)[:, None], tl.gather(m_end, c, 0)[:, None]
        b, from_state, floor, mark, p, at_end = _in_gauge(here, l, before, after, L)
        edge = _exp2(from_state)
        target = b + log_scale(scale)
        tl.debug_barrier()
        store_weights(
            here, target, edge * scale, p, at_end, mark, inside, inside & (scale > 0.0), L
        )
        tl.store(here + FLOOR * L, floor)


# BH: batch entries times heads, or heads where packed. A program has BLOCK_K columns of one head of
# one sequence.
#
#   cu_seqlens   (N + 1,) i64   offsets of packed sequences, or None
#   sums, chunk_f, chunk_p      what _sums_kernel wrote
#   n_first      (N, H, K) fp32   n before the first token, where HAS_N
#   m_first      (N, H) fp32      its gauge, where HAS_M
#   weights      (BH, chunks_per_head, 8, L) fp32   updated where gauge is None: vectors without den
#   gauge        (BH, chunks_per_head) fp64         written: m before each chunk; or None
#   decay        (BH, chunks_per_head) fp32         written: what a chunk leaves of a state
#   n_chunk      (BH, chunks_per_head, K) fp32      written: n before each chunk
#   n_last       (N, H, K) fp32   written: n after the last token
#   m_last       (N, H) fp32      written: its gauge
#   T, H, chunks_per_head, K   tokens, heads, places of chunks for each of BH, columns of n
#   scale        of q
#   L            tokens of a chunk
#   BLOCK        chunks at once
#   BLOCK_K      columns of n of a program
#   HAS_N, HAS_M, PACKED   there is an n_first, an m_first; sequences are packed
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head"])
def _gauge_kernel(
    cu_seqlens,
    sums,
    chunk_f,
    chunk_p,
    n_first,
    m_first,
    weights,
    gauge,
    decay,
    n_chunk,
    n_last,
    m_last,
    T,
    H,
    chunks_per_head,
    K,
    scale,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_N: tl.constexpr,
    HAS_M: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Over the chunks of each sequence: the gauge m_in (a max-plus scan, fp64) and the normaliser
    n that enter each of them. Where gauge is None the scan of h makes nu itself, and the vectors
    are made here."""
    n = tl.program_id(0) // H
    head = (tl.program_id(0) % H).to(tl.int64)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    bh = head if PACKED else batch * H + head
    first_chunk = bh * chunks_per_head + first_index(n, start, L, PACKED)
    chunks = ((length + L - 1) // L).to(tl.int32)
    state = n.to(tl.int64) * H + head
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.full([], EMPTY, tl.float64)
    if HAS_M:
        m = within(tl.load(m_first + state).to(tl.float64), EMPTY, -EMPTY)
    normalizer = tl.zeros([BLOCK_K], tl.float32)
    if HAS_N:
        normalizer = tl.load(n_first + state * K + column, mask=column < K, other=0.0)
    if chunks > 0:
        if gauge is not None:
            tl.store(gauge + first_chunk, m)
        tl.store(n_chunk + first_chunk * K + column, normalizer, mask=column < K)
    sums += first_chunk * K
    chunk_f += first_chunk
    chunk_p += first_chunk
    l = tl.arange(0, BLOCK)
    log_f, top, tile = _sums_of(sums, chunk_f, chunk_p, l, chunks, column, K)
    for block in range(0, chunks, BLOCK):
        c = block + l
        inside = c < chunks
        more = c + 1 < chunks
        last = tl.minimum(chunks - block, BLOCK) - 1
        chunk_index = first_chunk + c
        # The next chunks are on their way while these are worked on.
        next_f, next_top, next_tile = _sums_of(sums, chunk_f, chunk_p, c + BLOCK, chunks, column, K)
        total, most = tl.associative_scan((log_f, top), 0, _max_plus)
        m_out = _gauge_after(m, total, most)
        # The gauge of a state of zeros may as well be 0.
        end = tl.where(m_out <= EMPTY, 0.0, m_out).to(tl.float32)
        m_in = tl.where(l == 0, m, tl.gather(m_out, tl.maximum(l - 1, 0), 0))
        if gauge is not None:
            tl.store(gauge + chunk_index + 1, m_out, mask=more)
        m_end = _followed(m_in, log_f, top, tl.where(more, m_out, end.to(tl.float64)))
        chunk_decay = tl.where(_erases(log_f), 0.0, _exp(_carried(m_in, log_f) - m_end))
        sum_weight = _exp(top - m_end)
        tl.store(decay + chunk_index, chunk_decay, mask=inside)
        seen = more[:, None] & (column < K)[None, :]
        factor = tl.broadcast_to(chunk_decay[:, None], [BLOCK, BLOCK_K])
        factor, value = tl.associative_scan((factor, scaled(tile, sum_weight[:, None])), 0, _affine)
        value += scaled(normalizer[None, :], factor)
        tl.store(n_chunk + (chunk_index + 1)[:, None] * K + column[None, :], value, mask=seen)
        m = _at(m_out, last, BLOCK)
        normalizer = _at(value, last, BLOCK)
        if gauge is None:
            _store_weights_without_den(
                weights, first_chunk + block, last, block * L, length, m_in, m_end, scale, L
            )
        log_f, top, tile = next_f, next_top, next_tile
    tl.store(n_last + state * K + column, normalizer, mask=column < K)
    tl.store(m_last + state, tl.where(m <= EMPTY, 0.0, m).to(tl.float32))


# BH: batch entries times heads, or heads where packed. A program has one chunk of one head.
#
#   q, k         (B, T, H / R, K), bf16, fp16 or fp32   stride_.. by batch, token, head
#   cu_seqlens   (N + 1,) i64   offsets of packed sequences, or None
#   table        i32            the sequence of each chunk, where packed
#   gauge, m_last, n_chunk      what _gauge_kernel wrote
#   chunk_f, chunk_p            what _sums_kernel wrote
#   weights      (BH, chunks_per_head, 8, L) fp32   updated: in, what _sums_kernel wrote; out,
#                the seven vectors of gates.py, with den
#   T, H, chunks_per_head, K   tokens, heads, places of chunks for each of BH, columns of q and k
#   R            heads that share one of q and k
#   scale        of q
#   L, BLOCK_K   tokens of a chunk; columns at once
#   PACKED       sequences are packed
#   PRECISION    of products of fp32: "ieee", "tf32x3", or "fp64", sums in fp64 too
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head"])
def _denominator_kernel(
    q,
    k,
    cu_seqlens,
    table,
    gauge,
    m_last,
    n_chunk,
    chunk_f,
    chunk_p,
    weights,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    T,
    H,
    chunks_per_head,
    K,
    R,
    scale,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """nu and den of every token, and with them the seven vectors of the chunk."""
    n, j, batch, head, start, length, chunk_index = chunk(
        cu_seqlens, table, T, H, chunks_per_head, L, PACKED
    )
    if j * L >= length:
        return
    l = tl.arange(0, L)
    inside = j * L + l < length
    t = start + j * L + l
    PRECISE: tl.constexpr = q.dtype.element_ty == tl.float32
    # nu may lie next to 0, where an fp32 sum of its terms is off by more than the recurrence is by
    # luck; where fp64 is fast it is summed in that.
    WIDE: tl.constexpr = tl.float64 if PRECISION == "fp64" else tl.float32
    scores = tl.zeros([L, L], WIDE)
    nu = tl.zeros([L], WIDE)
    q_rows = q + batch * stride_qb + t * stride_qt + head // R * stride_qh
    k_rows = k + batch * stride_kb + t * stride_kt + head // R * stride_kh
    for block in range(0, K, BLOCK_K):
        column = block + tl.arange(0, BLOCK_K)
        seen = inside[:, None] & (column < K)[None, :]
        q_tile = tl.load(q_rows[:, None] + column[None, :], mask=seen, other=0.0)
        k_tile = tl.load(k_rows[:, None] + column[None, :], mask=seen, other=0.0)
        n_tile = tl.load(n_chunk + chunk_index * K + column, mask=column < K, other=0.0)
        if PRECISION == "fp64":
            k_tile = tl.trans(k_tile.to(tl.float64))
            scores = tl.dot(q_tile.to(tl.float64), k_tile, scores, out_dtype=tl.float64)
        elif PRECISE:  # sums of BLOCK_K terms, added: half the rounding of one sum of 512
            scores += tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        else:
            scores = tl.dot(q_tile, tl.trans(k_tile), scores, input_precision=PRECISION)
        nu += tl.sum(q_tile.to(WIDE) * n_tile.to(WIDE)[None, :], 1)
    here = weights + chunk_index * VECTORS * L + l
    if (j + 1) * L >= length:
        m_out = tl.load(m_last + n.to(tl.int64) * H + head).to(tl.float64)
    else:
        m_out = tl.load(gauge + chunk_index + 1)
    m_in = tl.load(gauge + chunk_index)
    m_end = _followed(m_in, tl.load(chunk_f + chunk_index), tl.load(chunk_p + chunk_index), m_out)
    b, from_state, floor, mark, p, at_end = _in_gauge(here, l, m_in, m_end, L)
    edge = _exp2(from_state)
    row, row_rest = _pair(b)
    col, col_rest = _pair(p)
    causal = l[:, None] >= l[None, :]
    if PRECISION == "fp64":
        # Powers of rests by token, in fp64; those of sums of whole numbers are exact in fp32.
        whole = tl.exp2(row[:, None] + col[None, :])
        weighed = causal & (whole != 0.0)
        terms = scores * (tl.exp((p - col) * LN2)[None, :] * whole.to(tl.float64))
        own = tl.sum(tl.where(weighed, terms, 0.0), 1)
        before = scaled(nu, tl.where(edge == 0.0, 0.0, tl.exp(from_state * LN2)))
        nu = (before + tl.exp((b - row) * LN2) * own) * scale
        nu = nu.to(tl.float32)
    else:
        D = power(row[:, None] + col[None, :], row_rest[:, None] + col_rest[None, :], PRECISE)
        if not PRECISE:
            scores *= scale
        weighed = causal & (D != 0.0)
        nu = scaled(nu * scale, edge) + tl.sum(tl.where(weighed, scores * D, 0.0), 1)
    den = larger(tl.abs(nu), floor)
    mark += tl.where(tl.abs(nu) > floor, tl.where(nu > 0.0, 1.0, -1.0), 0.0)
    # Where q is 0, den may be 2^-126: what it divides is 0 and must stay so.
    edge = scaled(within(scale / den, 0.0, 2.0**126), edge)
    if PRECISE:  # the fp32 logarithm is off by 2e-7
        factor = log_scale(scale) - tl.log2(den.to(tl.float64))
    else:
        factor = (log_scale(scale).to(tl.float32) - tl.log2(den)).to(tl.float64)
    target = b + within(factor, -1000.0, 126.0)
    tl.debug_barrier()  # all have read what waited
    store_weights(here, target, edge, p, at_end, mark, inside, inside & (scale > 0.0), L)


# BH: batch entries times heads, or heads where packed. A program has one chunk of one head.
#
#   dh, h        (B, T, H, V), bf16, fp16 or fp32   None where dh_h is there; stride_d., stride_h.
#   q            (B, T, H / R, K), likewise         stride_q. by batch, token, head
#   dh_h         (PARTS, BH, chunks_per_head, L) fp32   dh . h in parts to be added, of the scan dv
#   cu_seqlens   (N + 1,) i64   offsets of packed sequences, or None
#   table        i32            the sequence of each chunk, where packed
#   weights      (BH, chunks_per_head, 8, L) fp32   the vectors of gates.py, with den
#   d            (BH, chunks_per_head, L) fp32      written: d of each token
#   sums         (BH, chunks_per_head, K) fp32      written: the chunk's share of dn
#   T, H, chunks_per_head   tokens, heads, places of chunks for each of BH
#   size         BH chunks_per_head L, the numbers of a part of dh_h
#   K, V         columns of q; of dh and h
#   R            heads that share one of q
#   L, BLOCK_K, BLOCK_V   tokens of a chunk; columns at once
#   PARTS        of dh_h; 0: it is made here
#   PACKED       sequences are packed
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head"])
def _column_kernel(
    dh,
    h,
    q,
    dh_h,
    cu_seqlens,
    table,
    weights,
    d,
    sums,
    stride_db,
    stride_dt,
    stride_dh,
    stride_hb,
    stride_ht,
    stride_hh,
    stride_qb,
    stride_qt,
    stride_qh,
    T,
    H,
    chunks_per_head,
    size,
    K,
    V,
    R,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """d_t = -sign(nu_t) (dh_t . h_t) where the normaliser is active, and the chunk's sum of
    exp(m_in - M_t) d_t scale q_t / den_t, its share of dn. dh_h: dh . h in PARTS to be added; with
    none it is made here."""
    n, j, batch, head, start, length, chunk_index = chunk(
        cu_seqlens, table, T, H, chunks_per_head, L, PACKED
    )
    if j * L >= length:
        return
    l = tl.arange(0, L)
    inside = j * L + l < length
    t = start + j * L + l
    here = chunk_index * L + l
    # The first tile is on its way while the vectors are worked on.
    rows = q + batch * stride_qb + t * stride_qt + head // R * stride_qh
    column = tl.arange(0, BLOCK_K)
    seen = inside[:, None] & (column < K)[None, :]
    tile = tl.load(rows[:, None] + column[None, :], mask=seen, other=0.0)
    dot = tl.zeros([L], tl.float32)
    for part in tl.static_range(PARTS):
        dot += tl.load(dh_h + part * size.to(tl.int64) + here)
    if not PARTS:
        dh_rows = dh + batch * stride_db + t * stride_dt + head * stride_dh
        h_rows = h + batch * stride_hb + t * stride_ht + head * stride_hh
        for block in range(0, V, BLOCK_V):
            value = block + tl.arange(0, BLOCK_V)
            there = inside[:, None] & (value < V)[None, :]
            dh_tile = tl.load(dh_rows[:, None] + value[None, :], mask=there, other=0.0)
            h_tile = tl.load(h_rows[:, None] + value[None, :], mask=there, other=0.0)
            dot += tl.sum(dh_tile.to(tl.float32) * h_tile.to(tl.float32), 1)
    own = weights + chunk_index * VECTORS * L + l
    mark = tl.load(own + MARK * L)
    sign = tl.where(mark > 2.0, mark - 4.0, mark)
    d_row = -scaled(dot, sign)
    tl.store(d + here, d_row)
    weight = scaled(d_row, tl.load(own + 2 * L))
    _sum_up(rows, tile, weight, inside, column, sums, chunk_index, K, BLOCK_K)


@triton.jit
def _column_sums_of(sums, decay, c, column, K):
    """Decay of the chunks c of a sequence and what _column_kernel stored of them."""
    seen = (c >= 0)[:, None] & (column < K)[None, :]
    return (
        tl.load(decay + c, mask=c >= 0, other=0.0),
        tl.load(sums + c.to(tl.int64)[:, None] * K + column[None, :], mask=seen, other=0.0),
    )


# BH: batch entries times heads, or heads where packed. A program has BLOCK_K columns of one head of
# one sequence.
#
#   cu_seqlens   (N + 1,) i64   offsets of packed sequences, or None
#   sums         (BH, chunks_per_head, K) fp32   what _column_kernel wrote
#   decay        (BH, chunks_per_head) fp32      what a chunk leaves of the state before it
#   dn_last      (N, H, K) fp32   dn after the last token, where HAS_DN
#   dn_chunk     (BH, chunks_per_head, K) fp32   written: dn after each chunk
#   dn_first     (N, H, K) fp32   written: dn before the first token
#   T, H, chunks_per_head, K   tokens, heads, places of chunks for each of BH, columns of n
#   L            tokens of a chunk
#   BLOCK        chunks at once
#   BLOCK_K      columns of a program
#   HAS_DN, PACKED   there is a dn_last; sequences are packed
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head"])
def _column_state_kernel(
    cu_seqlens,
    sums,
    decay,
    dn_last,
    dn_chunk,
    dn_first,
    T,
    H,
    chunks_per_head,
    K,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dn at the end of every chunk, from the last one back: dn <- decay dn + sums."""
    n = tl.program_id(0) // H
    head = (tl.program_id(0) % H).to(tl.int64)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    bh = head if PACKED else batch * H + head
    first_chunk = bh * chunks_per_head + first_index(n, start, L, PACKED)
    chunks = ((length + L - 1) // L).to(tl.int32)
    state = n.to(tl.int64) * H + head
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dn = tl.zeros([BLOCK_K], tl.float32)
    if HAS_DN:
        dn = tl.load(dn_last + state * K + column, mask=column < K, other=0.0)
    if chunks > 0:
        tl.store(dn_chunk + (first_chunk + chunks - 1) * K + column, dn, mask=column < K)
    sums += first_chunk * K
    c = chunks - 1 - tl.arange(0, BLOCK)
    chunk_decay, tile = _column_sums_of(sums, decay + first_chunk, c, column, K)
    for block in range(0, chunks, BLOCK):
        c = chunks - 1 - block - tl.arange(0, BLOCK)
        next_decay, next_tile = _column_sums_of(sums, decay + first_chunk, c - BLOCK, column, K)
        factor, value = tl.associative_scan(
            (tl.broadcast_to(chunk_decay[:, None], [BLOCK, BLOCK_K]), tile), 0, _affine
        )
        value += scaled(dn[None, :], factor)
        seen = (c >= 1)[:, None] & (column < K)[None, :]
        tl.store(dn_chunk + (first_chunk + c - 1)[:, None] * K + column[None, :], value, mask=seen)
        dn = _at(value, tl.minimum(chunks - block, BLOCK) - 1, BLOCK)
        chunk_decay, tile = next_decay, next_tile
    tl.store(dn_first + state * K + column, dn, mask=column < K)
