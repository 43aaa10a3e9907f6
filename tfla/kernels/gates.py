"""Exponents, chunk by chunk, and the gradients of the gates: ``tfla.gates`` in Triton.

Weights of a token, in log2 units, seven vectors of L numbers a chunk, (rows, chunks, 8, L) in all:

    0, 1   target   b - ln den + ln scale as (whole, rest)
    2               exp(b) scale / den: what the incoming state weighs here
    3, 4   source   p as (whole, rest)
    5               exp(p + b_L): what the token weighs at the end of the chunk
    6      mark     sign(nu) where the normaliser is active, else 0; plus 4 where the token erases
                    what came before it

One launch makes them where there is no normaliser, three of normalizer.py where there is, or two
where the scan of h takes the denominator over (hopper.py): it is then in none of the vectors that
it reads, and

    7              exp(-m), the floor of den
"""

from __future__ import annotations

import triton
import triton.language as tl

from tfla import limits
from tfla.kernels.layout import chunk, first_checkpoint_index, first_index, interval, sequence
from tfla.spec import TritonForm

LOG2E = tl.constexpr(limits.LOG2E)
LIMIT = tl.constexpr(limits.LIMIT)
EMPTY = tl.constexpr(limits.EMPTY)
LOG_I_NOTHING = tl.constexpr(limits.LOG_I_NOTHING)
LOG_F_NOTHING = tl.constexpr(limits.LOG_F_NOTHING)
STEP = tl.constexpr(limits.STEP)
WRITE = tl.constexpr(limits.WRITE)
RESET = tl.constexpr(limits.RESET)
NOTHING = tl.constexpr(limits.NOTHING)
FOLLOWED = tl.constexpr(limits.FOLLOWED)
SMALLEST = tl.constexpr(-104.0)  # exp of less than this is 0 in fp32
FIRST_SOURCE = tl.constexpr(3)
MARK = tl.constexpr(6)
FLOOR = tl.constexpr(7)
VECTORS = tl.constexpr(8)
# Whether these are multiples of 16 may change with T, and would compile anew for nothing.
GATE_STRIDES = ("stride_ib", "stride_it", "stride_ih", "stride_fb", "stride_ft", "stride_fh")


@triton.jit
def _log_sigmoid(x):
    """log(sigmoid(x)) in fp64: what fp32 loses at an open gate, 1e-8 a token, adds up over a
    sequence."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _same(x):
    return x


@triton.jit
def _exp_gradient(dlog_i, i):
    return dlog_i


@triton.jit
def _sigmoid_gradient(dlog_i, i):
    return dlog_i / (1.0 + tl.exp(i))


# The Triton forms of the input gates that ``tfla.gates`` registers; others bring their own.
FORMS = {
    "exp": TritonForm(_same, _exp_gradient),
    "sigmoid": TritonForm(_log_sigmoid, _sigmoid_gradient),
}


def form_of(name: str) -> TritonForm:
    """The Triton form of an input gate; RuntimeError if it has none."""
    found = FORMS.get(name)
    if found is None:
        from tfla.gates import input_gate  # needs torch, as gates that are registered do

        gate = input_gate(name)
        if gate.triton is None:
            raise RuntimeError(
                f'the input gate {name!r} has no Triton form: use backend="reference", or register '
                "it with triton=."
            )
        found = FORMS[name] = gate.triton()
    return found


@triton.jit
def within(x, low, high):
    """x between low and high; NaN stays NaN, which tl.minimum and tl.maximum do not promise."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def larger(x, y):
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def scaled(x, factor):
    """factor x, and 0 where factor is 0, whatever x is."""
    return tl.where(factor == 0.0, 0.0, x * factor)


@triton.jit
def limited(log_i, log_f):
    """Log-gates within the limits of ``tfla.gates``, in fp64."""
    log_i = tl.where(log_i < -LIMIT, LOG_I_NOTHING, tl.where(log_i > LIMIT, LIMIT, log_i))
    log_f = tl.where(log_f < -LIMIT, LOG_F_NOTHING, tl.where(log_f > LIMIT, LIMIT, log_f))
    return log_i, log_f


@triton.jit
def _log_gates(i, f, inside, LOG_I: tl.constexpr, SIGMOID_F: tl.constexpr):
    """(log_i, log_f) in fp64 and within the limits; a token past the end weighs nothing and forgets
    nothing. LOG_I: the input gate's function, see ``tfla.gates.TritonForm``."""
    i = i.to(tl.float32).to(tl.float64)
    f = f.to(tl.float32).to(tl.float64)
    i = LOG_I(i)
    if SIGMOID_F:
        f = _log_sigmoid(f)
    i, f = limited(i, f)
    return tl.where(inside, i, LOG_I_NOTHING), tl.where(inside, f, 0.0)


@triton.jit
def _pair(x):
    """x (fp64) as (whole, rest), fp32: sums of the first are exact, the second stays below one
    half."""
    whole = tl.floor(x + 0.5).to(tl.float32)
    return whole, (x - whole.to(tl.float64)).to(tl.float32)


@triton.jit
def _exp2(x):
    """2^x of an fp64 exponent, in fp32 and good to its last bit or two."""
    whole, rest = _pair(within(x, -1000.0, 1000.0))
    return tl.exp2(whole) * tl.exp2(rest)


@triton.jit
def _exp(x):
    return _exp2(x * LOG2E)


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
    return scaled(factor_1, factor_2), scaled(value_1, factor_2) + value_2


@triton.jit
def store_pair(here, x, L: tl.constexpr):
    whole, rest = _pair(x)
    tl.store(here, whole)
    tl.store(here + L, rest)


@triton.jit
def log_scale(scale):
    """log2 of a scale, which may be too small for the normal numbers of fp32, in fp64; that of 0 is
    not used."""
    return tl.log2(tl.maximum(tl.zeros([], tl.float64) + scale, 2.0**-150))


@triton.jit
def store_weights(here, target, edge, source, source_edge, mark, inside, used, L: tl.constexpr):
    """The seven vectors of a chunk. here: pointers to the first. target, source: fp64, the latter
    NOTHING where a token weighs nothing."""
    store_pair(here, tl.where(used, target, NOTHING), L)
    tl.store(here + 2 * L, tl.where(inside, edge, 0.0))
    store_pair(here + FIRST_SOURCE * L, source, L)
    tl.store(here + (FIRST_SOURCE + 2) * L, source_edge)
    tl.store(here + MARK * L, mark)


# BH: batch entries times heads, or heads where packed.
#
#   i, f         (B, T, H), any float   pre-activations; stride_.. by batch, token, head
#   cu_seqlens   (N + 1,) i64           offsets of packed sequences, or None
#   table        i32                    the sequence of each chunk, where packed
#   weights      (BH, chunks_per_head, 8, L) fp32   written: the vectors above
#   decay        (BH, chunks_per_head) fp32         written: exp(b_L)
#   T, H, chunks_per_head   tokens, heads, places of chunks for each of BH
#   scale        of q
#   L            tokens of a chunk
#   LOG_I        the input gate's function, pre-activation -> log_i
#   SIGMOID_F    f is a pre-activation of a sigmoid, else log_f
#   PACKED       sequences are packed
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head", *GATE_STRIDES])
def _weights_kernel(
    i,
    f,
    cu_seqlens,
    table,
    weights,
    decay,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    T,
    H,
    chunks_per_head,
    scale,
    L: tl.constexpr,
    LOG_I: tl.constexpr,
    SIGMOID_F: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The seven vectors of a chunk and what it leaves of the state, without a normaliser."""
    n, j, batch, head, start, length, chunk_index = chunk(
        cu_seqlens, table, T, H, chunks_per_head, L, PACKED
    )
    if j * L >= length:
        return
    l = tl.arange(0, L)
    inside = j * L + l < length
    t = start + j * L + l
    log_i, log_f = _log_gates(
        tl.load(i + batch * stride_ib + t * stride_it + head * stride_ih, mask=inside, other=0.0),
        tl.load(f + batch * stride_fb + t * stride_ft + head * stride_fh, mask=inside, other=0.0),
        inside,
        LOG_I,
        SIGMOID_F,
    )
    a = tl.where(log_f <= LOG_F_NOTHING, -RESET, within(log_f * LOG2E, -STEP, STEP))
    b = tl.cumsum(a, 0)
    b_last = tl.sum(a, 0)
    p = within(log_i * LOG2E, -WRITE, STEP) - b
    p = tl.where(log_i <= LOG_I_NOTHING, NOTHING, p)
    log_s = log_scale(scale)
    tl.store(decay + chunk_index, _exp2(b_last))
    store_weights(
        weights + chunk_index * VECTORS * L + l,
        b + log_s,
        tl.where(scale > 0.0, _exp2(b + log_s), 0.0),
        p,
        _exp2(p + b_last),
        tl.where(log_f < SMALLEST, 4.0, 0.0),
        inside,
        inside & (scale > 0.0),
        L,
    )


# BH: batch entries times heads, or heads where packed.
#
#   i, f, cu_seqlens   as in _weights_kernel
#   table        i32                    the sequence of each interval of checkpoints, where packed
#   weights      (BH, chunks_per_head, 8, L) fp32   the marks of tokens that erase are read
#   q_dq         (Q_PARTS, BH, chunks_per_head, L) fp32   q . dq, in parts to be added
#   k_dk         (K_PARTS, BH, chunks_per_head, L) fp32   k . dk, likewise
#   C_checkpoints, dC_checkpoints   (BH, checkpoints_per_head, state) fp32 or bf16   C and dC there
#   n_chunk      (BH, chunks_per_head, K) fp32   n before each chunk; None without a normaliser
#   n_last       (N, H, K) fp32                 n after the last token
#   dn_chunk     (BH, chunks_per_head, K) fp32   dn after each chunk
#   di, df       (B, T, H), dtypes of i and f   written
#   T, H, chunks_per_head, checkpoints_per_head   tokens, heads, places for each of BH
#   size         BH chunks_per_head L, the numbers of a part
#   K            columns of n
#   state        numbers of a checkpoint
#   L, CHECKPOINT_EVERY   tokens of a chunk, and of the interval of a program
#   BLOCK_K      columns of n at once
#   GRADIENT_I   the input gate's function, (dlog_i, pre-activation) -> di
#   SIGMOID_F, PACKED     as in _weights_kernel
#   NORMALIZE    there is a normaliser
#   AT_SEQUENCE_END       there is a checkpoint at the end of each sequence too
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head", "checkpoints_per_head", *GATE_STRIDES])
def _gradients_kernel(
    i,
    f,
    cu_seqlens,
    table,
    weights,
    q_dq,
    k_dk,
    C_checkpoints,
    dC_checkpoints,
    n_chunk,
    n_last,
    dn_chunk,
    di,
    df,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    T,
    H,
    chunks_per_head,
    checkpoints_per_head,
    size,
    K,
    state,
    L: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    Q_PARTS: tl.constexpr,
    K_PARTS: tl.constexpr,
    GRADIENT_I: tl.constexpr,
    SIGMOID_F: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    AT_SEQUENCE_END: tl.constexpr,
):
    """dlog_i = k . dk; dlog_f is the sum of q . dq - k . dk from each token to the
    checkpoint after it, CHECKPOINT_EVERY tokens apart, and of the states that meet there; it
    restarts at tokens that erase what came before. BLOCK: the power of two that holds so many."""
    w = tl.program_id(0) // H
    head = (tl.program_id(0) % H).to(tl.int64)
    size = size.to(tl.int64)
    n, j = interval(w, cu_seqlens, table, T, CHECKPOINT_EVERY, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    if j * CHECKPOINT_EVERY >= length:
        return
    bh = head if PACKED else batch * H + head
    checkpoint = (
        bh * checkpoints_per_head
        + first_checkpoint_index(n, start, CHECKPOINT_EVERY, PACKED, AT_SEQUENCE_END)
        + j
    )
    if not AT_SEQUENCE_END:  # dC is 0 where a sequence ends
        state = tl.where((j + 1) * CHECKPOINT_EVERY < length, state, 0)
    first_chunk = bh * chunks_per_head + first_index(n, start, L, PACKED)
    # Tokens from the last to the first_chunk: the scan runs forward.
    end_of_chunks = tl.minimum((j + 1) * CHECKPOINT_EVERY, ((length + L - 1) // L * L).to(tl.int32))
    position = end_of_chunks - 1 - tl.arange(0, BLOCK)
    inside = (position >= j * CHECKPOINT_EVERY) & (position < length)
    here = first_chunk * L + position
    dlog_i = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(K_PARTS):
        dlog_i += tl.load(k_dk + part * size + here, mask=inside, other=0.0)
    for part in tl.static_range(Q_PARTS):
        dot += tl.load(q_dq + part * size + here, mask=inside, other=0.0)
    meet = tl.zeros([1024], tl.float32)
    for block in range(0, state, 1024):
        entry = block + tl.arange(0, 1024)
        at = checkpoint * state + entry
        C = tl.load(C_checkpoints + at, mask=entry < state, other=0.0).to(tl.float32)
        meet += C * tl.load(dC_checkpoints + at, mask=entry < state, other=0.0).to(tl.float32)
    total = tl.sum(meet, 0).to(tl.float64)
    end = tl.minimum((j + 1) * CHECKPOINT_EVERY, length)
    if NORMALIZE:
        chunk_index = first_chunk + (end + L - 1) // L
        for block in range(0, K, BLOCK_K):
            column = block + tl.arange(0, BLOCK_K)
            if end == length:
                n_end = tl.load(
                    n_last + (n.to(tl.int64) * H + head) * K + column, mask=column < K, other=0.0
                )
            else:
                n_end = tl.load(n_chunk + chunk_index * K + column, mask=column < K, other=0.0)
            dn_end = tl.load(dn_chunk + (chunk_index - 1) * K + column, mask=column < K, other=0.0)
            total += tl.sum(n_end * dn_end, 0).to(tl.float64)
    mark = weights + (first_chunk + position // L) * (VECTORS * L) + MARK * L + position % L
    erased = tl.load(mark, mask=inside, other=0.0) > 2.0
    factor = tl.where(erased, 0.0, 1.0).to(tl.float64)
    value = tl.where(erased, 0.0, dot - dlog_i).to(tl.float64)
    factor, value = tl.associative_scan((factor, value), 0, _affine)
    dlog_f = (scaled(total, factor) + value).to(tl.float32)
    t = start + position
    x = tl.load(
        i + batch * stride_ib + t * stride_it + head * stride_ih, mask=inside, other=0.0
    ).to(tl.float32)  # not read where GRADIENT_I does not use it
    dlog_i = GRADIENT_I(dlog_i, x)
    if SIGMOID_F:
        x = tl.load(
            f + batch * stride_fb + t * stride_ft + head * stride_fh, mask=inside, other=0.0
        ).to(tl.float32)
        dlog_f = dlog_f / (1.0 + tl.exp(x))
    out = (batch * T + t) * H + head
    tl.store(di + out, dlog_i, mask=inside)
    tl.store(df + out, dlog_f, mask=inside)
