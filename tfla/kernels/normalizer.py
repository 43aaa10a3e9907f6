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
from tfla.kernels.layout import chunk, first_slot, sequence

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
def _sum_up(rows, tile, weight, inside, column, sums, slot, K, BLOCK_K: tl.constexpr):
    """The weighted sum of a chunk's rows (L, K), whose first ``tile`` is there already."""
    for block in range(0, K, BLOCK_K):
        total = tl.sum(scaled(tile.to(tl.float32), weight[:, None]), 0)
        tl.store(sums + slot * K + block + column, total, mask=block + column < K)
        seen = inside[:, None] & (block + BLOCK_K + column < K)[None, :]
        tile = tl.load(rows[:, None] + block + BLOCK_K + column[None, :], mask=seen, other=0.0)


@triton.jit(do_not_specialize=["T", "H", "slots", *GATE_STRIDES])
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
    slots,
    K,
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
    n, j, batch, head, start, length, slot = chunk(cu_seqlens, table, T, H, slots, L, PACKED)
    if j * L >= length:
        return
    t = j * L + tl.arange(0, L)
    inside = t < length
    t = start + t
    # The first tile is on its way while the gates are worked on.
    rows = k + batch * stride_kb + t * stride_kt + head * stride_kh
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
    here = weights + slot * VECTORS * L + l
    store_pair(here, b, L)
    store_pair(here + FIRST_SOURCE * L, p, L)
    top = _store_parts(here + TOP * L, here + TOP_REST * L, top)
    _store_parts(here + TOTAL * L, here + (TOTAL + 1) * L, total)
    tl.store(chunk_f + slot, _at(total, L - 1, L))
    tl.store(chunk_p + slot, _at(top, L - 1, L))
    weight = _exp2(p + b_last)
    _sum_up(rows, tile, weight, inside, column, sums, slot, K, BLOCK_K)


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
    """What _sums_kernel left of the chunks c of a sequence."""
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
def _undivided(weights, slot, last, token, length, m_in, m_end, scale, L: tl.constexpr):
    """The vectors of the chunks up to ``last`` of a block, without den, its floor beside them. The
    programs of a sequence share them, eight at a time; the last one is done again where there are
    no more."""
    for nth in range(tl.program_id(1) * 8, last + 1, tl.num_programs(1) * 8):
        c = tl.minimum(nth + tl.arange(0, 8), last)
        l = tl.arange(0, L)[None, :]
        here = weights + (slot + c)[:, None] * (VECTORS * L) + l
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


@triton.jit(do_not_specialize=["T", "H", "slots"])
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
    slots,
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
    row = head if PACKED else batch * H + head
    first = row * slots + first_slot(n, start, L, PACKED)
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
            tl.store(gauge + first, m)
        tl.store(n_chunk + first * K + column, normalizer, mask=column < K)
    sums += first * K
    chunk_f += first
    chunk_p += first
    l = tl.arange(0, BLOCK)
    log_f, top, tile = _sums_of(sums, chunk_f, chunk_p, l, chunks, column, K)
    for block in range(0, chunks, BLOCK):
        c = block + l
        inside = c < chunks
        more = c + 1 < chunks
        last = tl.minimum(chunks - block, BLOCK) - 1
        slot = first + c
        # The next chunks are on their way while these are worked on.
        next_f, next_top, next_tile = _sums_of(sums, chunk_f, chunk_p, c + BLOCK, chunks, column, K)
        total, most = tl.associative_scan((log_f, top), 0, _max_plus)
        m_out = _gauge_after(m, total, most)
        # The gauge of a state of zeros may as well be 0.
        end = tl.where(m_out <= EMPTY, 0.0, m_out).to(tl.float32)
        m_in = tl.where(l == 0, m, tl.gather(m_out, tl.maximum(l - 1, 0), 0))
        if gauge is not None:
            tl.store(gauge + slot + 1, m_out, mask=more)
        m_end = _followed(m_in, log_f, top, tl.where(more, m_out, end.to(tl.float64)))
        keep = tl.where(_erases(log_f), 0.0, _exp(_carried(m_in, log_f) - m_end))
        take = _exp(top - m_end)
        tl.store(decay + slot, keep, mask=inside)
        seen = more[:, None] & (column < K)[None, :]
        factor = tl.broadcast_to(keep[:, None], [BLOCK, BLOCK_K])
        factor, value = tl.associative_scan((factor, scaled(tile, take[:, None])), 0, _affine)
        value += scaled(normalizer[None, :], factor)
        tl.store(n_chunk + (slot + 1)[:, None] * K + column[None, :], value, mask=seen)
        m = _at(m_out, last, BLOCK)
        normalizer = _at(value, last, BLOCK)
        if gauge is None:
            _undivided(weights, first + block, last, block * L, length, m_in, m_end, scale, L)
        log_f, top, tile = next_f, next_top, next_tile
    tl.store(n_last + state * K + column, normalizer, mask=column < K)
    tl.store(m_last + state, tl.where(m <= EMPTY, 0.0, m).to(tl.float32))


@triton.jit(do_not_specialize=["T", "H", "slots"])
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
    slots,
    K,
    scale,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """nu and den of every token, and with them the seven vectors of the chunk."""
    n, j, batch, head, start, length, slot = chunk(cu_seqlens, table, T, H, slots, L, PACKED)
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
    q_rows = q + batch * stride_qb + t * stride_qt + head * stride_qh
    k_rows = k + batch * stride_kb + t * stride_kt + head * stride_kh
    for block in range(0, K, BLOCK_K):
        column = block + tl.arange(0, BLOCK_K)
        seen = inside[:, None] & (column < K)[None, :]
        q_tile = tl.load(q_rows[:, None] + column[None, :], mask=seen, other=0.0)
        k_tile = tl.load(k_rows[:, None] + column[None, :], mask=seen, other=0.0)
        n_tile = tl.load(n_chunk + slot * K + column, mask=column < K, other=0.0)
        if PRECISION == "fp64":
            k_tile = tl.trans(k_tile.to(tl.float64))
            scores = tl.dot(q_tile.to(tl.float64), k_tile, scores, out_dtype=tl.float64)
        elif PRECISE:  # sums of BLOCK_K terms, added: half the rounding of one sum of 512
            scores += tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        else:
            scores = tl.dot(q_tile, tl.trans(k_tile), scores, input_precision=PRECISION)
        nu += tl.sum(q_tile.to(WIDE) * n_tile.to(WIDE)[None, :], 1)
    here = weights + slot * VECTORS * L + l
    if (j + 1) * L >= length:
        m_out = tl.load(m_last + n.to(tl.int64) * H + head).to(tl.float64)
    else:
        m_out = tl.load(gauge + slot + 1)
    m_in = tl.load(gauge + slot)
    m_end = _followed(m_in, tl.load(chunk_f + slot), tl.load(chunk_p + slot), m_out)
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


@triton.jit(do_not_specialize=["T", "H", "slots"])
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
    slots,
    size,
    K,
    V,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """d_t = -sign(nu_t) (dh_t . h_t) where the normaliser is active, and the chunk's sum of
    exp(m_in - M_t) d_t scale q_t / den_t, its share of dn. dh_h: dh . h in PARTS to be added; with
    none it is made here."""
    n, j, batch, head, start, length, slot = chunk(cu_seqlens, table, T, H, slots, L, PACKED)
    if j * L >= length:
        return
    l = tl.arange(0, L)
    inside = j * L + l < length
    t = start + j * L + l
    here = slot * L + l
    # The first tile is on its way while the vectors are worked on.
    rows = q + batch * stride_qb + t * stride_qt + head * stride_qh
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
    own = weights + slot * VECTORS * L + l
    mark = tl.load(own + MARK * L)
    sign = tl.where(mark > 2.0, mark - 4.0, mark)
    d_row = -scaled(dot, sign)
    tl.store(d + here, d_row)
    weight = scaled(d_row, tl.load(own + 2 * L))
    _sum_up(rows, tile, weight, inside, column, sums, slot, K, BLOCK_K)


@triton.jit
def _kept_of(sums, decay, c, column, K):
    """Decay of the chunks c of a sequence and what _column_kernel left of them."""
    seen = (c >= 0)[:, None] & (column < K)[None, :]
    return (
        tl.load(decay + c, mask=c >= 0, other=0.0),
        tl.load(sums + c.to(tl.int64)[:, None] * K + column[None, :], mask=seen, other=0.0),
    )


@triton.jit(do_not_specialize=["T", "H", "slots"])
def _column_state_kernel(
    cu_seqlens,
    sums,
    decay,
    dn_last,
    dn_chunk,
    dn_first,
    T,
    H,
    slots,
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
    row = head if PACKED else batch * H + head
    first = row * slots + first_slot(n, start, L, PACKED)
    chunks = ((length + L - 1) // L).to(tl.int32)
    state = n.to(tl.int64) * H + head
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dn = tl.zeros([BLOCK_K], tl.float32)
    if HAS_DN:
        dn = tl.load(dn_last + state * K + column, mask=column < K, other=0.0)
    if chunks > 0:
        tl.store(dn_chunk + (first + chunks - 1) * K + column, dn, mask=column < K)
    sums += first * K
    c = chunks - 1 - tl.arange(0, BLOCK)
    keep, tile = _kept_of(sums, decay + first, c, column, K)
    for block in range(0, chunks, BLOCK):
        c = chunks - 1 - block - tl.arange(0, BLOCK)
        next_keep, next_tile = _kept_of(sums, decay + first, c - BLOCK, column, K)
        factor, value = tl.associative_scan(
            (tl.broadcast_to(keep[:, None], [BLOCK, BLOCK_K]), tile), 0, _affine
        )
        value += scaled(dn[None, :], factor)
        seen = (c >= 1)[:, None] & (column < K)[None, :]
        tl.store(dn_chunk + (first + c - 1)[:, None] * K + column[None, :], value, mask=seen)
        dn = _at(value, tl.minimum(chunks - block, BLOCK) - 1, BLOCK)
        keep, tile = next_keep, next_tile
    tl.store(dn_first + state * K + column, dn, mask=column < K)
