"""Exponents, chunk by chunk, and the gradients of the gates: ``tfla.gates`` in Triton.

Weights of a token, in log2 units, seven vectors of L numbers a chunk, (row, slot, 8, L) in all:

    0, 1   target   -M - ln den + ln scale as (whole, rest)
    2               exp of it + m_in: what the incoming state weighs here
    3, 4   source   p as (whole, rest)
    5               exp(p - M_out): what the token weighs at the end of the chunk
    6      mark     sign(nu) where the normaliser is active, else 0; plus 4 where the token erases
                    what came before it

Three launches when normalised (sums of the chunks, scan over chunks, weights), one when not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tfla.kernels.layout import first_slot, sequence, unit

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-(2.0**100))  # an exponent whose power is 0, exact in fp32
SMALLEST = tl.constexpr(-104.0)  # exp of less than this is 0 in fp32
FIRST_SOURCE = tl.constexpr(3)
MARK = tl.constexpr(6)
VECTORS = tl.constexpr(8)  # with room for an eighth: a chunk's start is aligned
# Whether these are multiples of 16 may change with T, and would compile anew for nothing.
GATE_STRIDES = ("stride_ib", "stride_it", "stride_ih", "stride_fb", "stride_ft", "stride_fh")


@triton.jit
def _log_sigmoid(x):
    """log(sigmoid(x)) in fp64: what fp32 loses at an open gate, 1e-8 a token, adds up over a
    sequence."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _log_gates(i, f, inside, SIGMOID_I: tl.constexpr, SIGMOID_F: tl.constexpr):
    """(log_i, log_f) in fp64; a token past the end weighs nothing and forgets nothing.

    What is below -1e5 erases everything and what is below -1e6 weighs nothing, -inf among them;
    kept there, a chunk of 64 resets sums to less than 2^24, so that whole exponents are exact in
    fp32.
    """
    i = i.to(tl.float32).to(tl.float64)
    f = f.to(tl.float32).to(tl.float64)
    if SIGMOID_I:
        i = _log_sigmoid(i)
    if SIGMOID_F:
        f = _log_sigmoid(f)
    i = tl.where(inside, tl.maximum(i, -1e6), -1e30)
    f = tl.where(inside, tl.maximum(f, -1e5), 0.0)
    return i, f


@triton.jit
def _running_max(top_1, before_1, top_2, before_2):
    """The running maximum, and the one that ends a token earlier."""
    return tl.maximum(top_1, top_2), tl.maximum(top_1, before_2)


@triton.jit
def _pair(x):
    """x (fp64) as (whole, rest), fp32: sums of the first are exact, the second stays below one
    half."""
    whole = tl.floor(x + 0.5).to(tl.float32)
    return whole, (x - whole.to(tl.float64)).to(tl.float32)


@triton.jit
def _exp(x):
    """e^x of an fp64 exponent, in fp32 and good to its last bit or two."""
    whole, rest = _pair(tl.minimum(tl.maximum(x * LOG2E, -1000.0), 1000.0))
    return tl.exp2(whole) * tl.exp2(rest)


@triton.jit
def power(whole, rest, PRECISE: tl.constexpr):
    """2^(whole + rest). For 16-bit operands the sum may be rounded at its own size (1e-6 of the
    result at 2^30)."""
    if PRECISE:
        return tl.exp2(whole) * tl.exp2(rest)
    else:
        return tl.exp2(whole + rest)


@triton.jit
def _affine(factor_1, value_1, factor_2, value_2):
    return factor_1 * factor_2, value_1 * factor_2 + value_2


@triton.jit(do_not_specialize=["T", "H", "slots", *GATE_STRIDES])
def _weights_kernel(
    q, k, i, f, cu_seqlens, table, gauge, m_last, n_chunk, weights, decay,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh,
    T, H, slots, K, scale,
    L: tl.constexpr, BLOCK_K: tl.constexpr, SIGMOID_I: tl.constexpr, SIGMOID_F: tl.constexpr,
    NORMALIZE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The seven vectors of a chunk and what it leaves of the state; when normalised also nu, and
    den goes into the exponents."""
    w = tl.program_id(0) // H
    head = (tl.program_id(0) % H).to(tl.int64)
    n, j = unit(w, cu_seqlens, table, T, L, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    if j * L >= length:
        return
    row = head if PACKED else batch * H + head
    slot = (row * slots + first_slot(n, start, L, PACKED)) + j
    l = tl.arange(0, L)
    inside = j * L + l < length
    t = start + j * L + l
    if NORMALIZE:  # the products first: what follows is long and in fp64
        scores = tl.zeros([L, L], tl.float32)
        nu = tl.zeros([L], tl.float32)
        q_rows = q + batch * stride_qb + t * stride_qt + head * stride_qh
        k_rows = k + batch * stride_kb + t * stride_kt + head * stride_kh
        for block in range(0, K, BLOCK_K):
            column = block + tl.arange(0, BLOCK_K)
            seen = inside[:, None] & (column < K)[None, :]
            q_tile = tl.load(q_rows[:, None] + column[None, :], mask=seen, other=0.0)
            k_tile = tl.load(k_rows[:, None] + column[None, :], mask=seen, other=0.0)
            n_tile = tl.load(n_chunk + slot * K + column, mask=column < K, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k_tile), scores, input_precision=PRECISION)
            nu += tl.sum(q_tile.to(tl.float32) * n_tile[None, :], 1)
    log_i, log_f = _log_gates(
        tl.load(i + batch * stride_ib + t * stride_it + head * stride_ih, mask=inside, other=0.0),
        tl.load(f + batch * stride_fb + t * stride_ft + head * stride_fh, mask=inside, other=0.0),
        inside, SIGMOID_I, SIGMOID_F,
    )  # fmt: skip
    b = tl.cumsum(log_f, 0)
    p = log_i - b
    b_last = tl.sum(log_f, 0)
    here = weights + slot * VECTORS * L + l
    mark = tl.zeros([L], tl.float32)
    if NORMALIZE:
        m_in = tl.load(gauge + slot).to(tl.float64)
        if (j + 1) * L >= length:
            m_out = tl.load(m_last + n.to(tl.int64) * H + head)
        else:
            m_out = tl.load(gauge + slot + 1)
        M_out = m_out.to(tl.float64) - b_last
        top, before = tl.associative_scan((p, tl.full([L], -1e300, tl.float64)), 0, _running_max)
        M = tl.maximum(top, m_in)
        erased = tl.maximum(before, m_in) - M < SMALLEST
    else:
        m_in = tl.zeros([], tl.float64)
        M_out = -b_last
        M = -b
        erased = log_f < SMALLEST
        tl.store(decay + slot, _exp(b_last))
    weight = _exp(m_in - M) * scale
    target = -M * LOG2E + tl.log2(tl.maximum(scale, 1e-30).to(tl.float64))
    used = inside & (scale > 0.0)
    if NORMALIZE:
        row, row_rest = _pair(-M * LOG2E)
        col, col_rest = _pair(p * LOG2E)
        D = power(
            row[:, None] + col[None, :],
            row_rest[:, None] + col_rest[None, :],
            q.dtype.element_ty == tl.float32,
        )
        nu = nu * weight + tl.sum(tl.where(l[:, None] >= l[None, :], scores * D, 0.0), 1) * scale
        floor = _exp(-(b + M))
        floor = tl.minimum(tl.maximum(floor, 2.0**-126), 2.0**126)
        den = tl.maximum(tl.abs(nu), floor)
        mark = tl.where(tl.abs(nu) > floor, tl.where(nu > 0.0, 1.0, -1.0), 0.0)
        weight = weight / den
        target -= tl.log2(den.to(tl.float64))
    row, row_rest = _pair(tl.where(used, target, NOTHING))
    col, col_rest = _pair(tl.where(inside, p * LOG2E, NOTHING))
    tl.store(here, row)
    tl.store(here + L, row_rest)
    tl.store(here + 2 * L, tl.where(inside, weight, 0.0))
    source = here + FIRST_SOURCE * L
    tl.store(source, col)
    tl.store(source + L, col_rest)
    tl.store(source + 2 * L, _exp(p - M_out))
    tl.store(here + MARK * L, mark + tl.where(erased, 4.0, 0.0))


@triton.jit(do_not_specialize=["T", "H", "slots", "spans", *GATE_STRIDES])
def _gradients_kernel(
    i, f, cu_seqlens, table, weights, q_dq, k_dk, C_ends, dC_ends, n_chunk, n_last, dn_chunk, di,
    df, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh,
    T, H, slots, spans, size, K, state,
    L: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, Q_PARTS: tl.constexpr,
    K_PARTS: tl.constexpr, SIGMOID_I: tl.constexpr, SIGMOID_F: tl.constexpr,
    NORMALIZE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dlog_i = k . dk; dlog_f is the sum of q . dq - k . dk from each token to the end of its span
    of SPAN tokens, and of the states that meet there; it restarts at tokens that erase what came
    before."""
    w = tl.program_id(0) // H
    head = (tl.program_id(0) % H).to(tl.int64)
    size = size.to(tl.int64)
    n, j = unit(w, cu_seqlens, table, T, SPAN, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    if j * SPAN >= length:
        return
    row = head if PACKED else batch * H + head
    span = row * spans + first_slot(n, start, SPAN, PACKED) + j
    first = row * slots + first_slot(n, start, L, PACKED)
    # Tokens from the last to the first: the scan runs forward.
    position = (
        tl.minimum((j + 1) * SPAN, ((length + L - 1) // L * L).to(tl.int32))
        - 1
        - tl.arange(0, SPAN)
    )
    inside = (position >= j * SPAN) & (position < length)
    here = first * L + position
    dlog_i = tl.zeros([SPAN], tl.float32)
    dot = tl.zeros([SPAN], tl.float32)
    for part in tl.static_range(K_PARTS):
        dlog_i += tl.load(k_dk + part * size + here, mask=inside, other=0.0)
    for part in tl.static_range(Q_PARTS):
        dot += tl.load(q_dq + part * size + here, mask=inside, other=0.0)
    meet = tl.zeros([1024], tl.float32)
    for block in range(0, state, 1024):
        entry = block + tl.arange(0, 1024)
        C = tl.load(C_ends + span * state + entry, mask=entry < state, other=0.0)
        meet += C * tl.load(dC_ends + span * state + entry, mask=entry < state, other=0.0)
    total = tl.sum(meet, 0).to(tl.float64)
    end = tl.minimum((j + 1) * SPAN, length)
    if NORMALIZE:
        slot = first + (end + L - 1) // L
        for block in range(0, K, BLOCK_K):
            column = block + tl.arange(0, BLOCK_K)
            if end == length:
                n_end = tl.load(
                    n_last + (n.to(tl.int64) * H + head) * K + column, mask=column < K, other=0.0
                )
            else:
                n_end = tl.load(n_chunk + slot * K + column, mask=column < K, other=0.0)
            dn_end = tl.load(dn_chunk + (slot - 1) * K + column, mask=column < K, other=0.0)
            total += tl.sum(n_end * dn_end, 0).to(tl.float64)
    mark = weights + (first + position // L) * (VECTORS * L) + MARK * L + position % L
    erased = tl.load(mark, mask=inside, other=0.0) > 2.0
    keep = tl.where(erased, 0.0, 1.0).to(tl.float64)
    factor, value = tl.associative_scan((keep, keep * (dot - dlog_i).to(tl.float64)), 0, _affine)
    dlog_f = (factor * total + value).to(tl.float32)
    t = start + position
    if SIGMOID_I:
        x = tl.load(
            i + batch * stride_ib + t * stride_it + head * stride_ih, mask=inside, other=0.0
        ).to(tl.float32)
        dlog_i = dlog_i / (1.0 + tl.exp(x))
    if SIGMOID_F:
        x = tl.load(
            f + batch * stride_fb + t * stride_ft + head * stride_fh, mask=inside, other=0.0
        ).to(tl.float32)
        dlog_f = dlog_f / (1.0 + tl.exp(x))
    out = (batch * T + t) * H + head
    tl.store(di + out, dlog_i, mask=inside)
    tl.store(df + out, dlog_f, mask=inside)
