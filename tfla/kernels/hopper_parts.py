"""What hopper.py does with a chunk: its copies, its exponents and products by rows, the update of
the state, the denominator."""

# mypy: disable-error-code="union-attr"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
)

from tfla.kernels.gates import FIRST_SOURCE, FLOOR, MARK, VECTORS
from tfla.kernels.parts import (
    barrier,
    columns,
    load,
    parts_of,
    scaled,
    store_parts,
    total_24,
    turned,
    view,
)

__all__ = [
    "barrier",
    "columns",
    "load",
    "scaled",
    "store_parts",
    "total_24",
    "turned",
]  # of parts.py, for hopper.py

# The same functions under the names of Triton 3.6 and of later ones.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_rows = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
LINE = gl.constexpr(256)  # what a copy moves is at most so wide
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def channel(rows, first, STAGES: gl.constexpr, PARTS: gl.constexpr = 1):
    """What comes chunk by chunk, from column ``first`` on: from where, to where, and where there
    are three parts of a number, the place of the third."""
    SHAPE: gl.constexpr = [STAGES, rows.block_shape[0], rows.block_shape[1]]
    tiles = gl.allocate_shared_memory(rows.dtype, SHAPE, rows.layout)
    if PARTS == 3:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(rows.block_shape, gl.bfloat16)
        return rows, tiles, first, gl.allocate_shared_memory(gl.bfloat16, SHAPE, LAYOUT)
    else:
        return rows, tiles, first


@gluon.constexpr_function
def _bytes(channels):
    return sum(channel[0].block_type.nbytes for channel in channels)


@gluon.jit
def fetch(channels, ready, c, chunk, wanted, STAGES: gl.constexpr):
    """Send for chunk c, the ``chunk``-th of this program, by one barrier (one each is slower)."""
    bar = ready.index(chunk % STAGES)
    mbarrier.expect(bar, _bytes(channels), pred=wanted)
    for n in gl.static_range(len(channels)):
        rows, tiles, first = channels[n][0], channels[n][1], channels[n][2]
        _load(rows, [c * rows.block_shape[0], first], bar, tiles.index(chunk % STAGES), pred=wanted)


@gluon.jit
def flat(channel, stage, SIZE: gl.constexpr):
    """What came of an operand of a few lines, as one vector."""
    return view(channel[1].index(stage), gl.float32, [SIZE], FLAT)


@gluon.jit
def tile(channel, stage):
    """What came of an operand, as products take it: itself, or of fp32 what ``split`` made of it, a
    tile for each part of its numbers."""
    whole = channel[1].index(stage)
    if whole.dtype != gl.float32:
        return (whole,)
    else:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(whole.shape, gl.bfloat16)
        both = view(whole, gl.bfloat16, [2, whole.shape[0], whole.shape[1]], LAYOUT)
        if len(channel) == 4:
            return both.index(0), both.index(1), channel[3].index(stage)
        else:
            return both.index(0), both.index(1)


@gluon.jit
def split(channel, stage, LAYOUT: gl.constexpr):
    """Of an fp32 tile, two of bf16 in its place, and a third. A fence must follow."""
    value = channel[1].index(stage).load(LAYOUT)
    barrier()
    store_parts(tile(channel, stage), value)


@gluon.jit
def product(one, other, total, ADD: gl.constexpr):
    """total + one other, or without total, while it is being made; of two parts each without the
    product of the lesser ones."""
    total = warpgroup_mma(one[0], other[0], total, use_acc=ADD, is_async=True)
    if len(one) == 2:
        total = warpgroup_mma(one[0], other[1], total, is_async=True)
        total = warpgroup_mma(one[1], other[0], total, is_async=True)
    return total


@gluon.jit
def product_24(one, other, lesser, main, ADD: gl.constexpr):
    """one other of three parts each, while it is being made, as two sums, that of the largest parts
    (``main``) and that of the five products of lesser ones that count, the smallest first. With ADD
    they go on from what they were, else from 0.

    Tensor cores cut off what a sum does not hold: sums that went on from chunk to chunk would lose
    more than fp32 does. And of inf the other parts are 0, whose products are NaN; see ``total_24``.
    """
    lesser = warpgroup_mma(one[2], other[0], lesser, use_acc=ADD, is_async=True)
    lesser = warpgroup_mma(one[0], other[2], lesser, is_async=True)
    lesser = warpgroup_mma(one[1], other[1], lesser, is_async=True)
    lesser = warpgroup_mma(one[1], other[0], lesser, is_async=True)
    lesser = warpgroup_mma(one[0], other[1], lesser, is_async=True)
    main = warpgroup_mma(one[0], other[0], main, use_acc=ADD, is_async=True)
    return lesser, main


@gluon.jit
def scores(a_in, b_in, stage, L: gl.constexpr, LAYOUT: gl.constexpr, SOURCE_FIRST: gl.constexpr):
    """The products of a chunk's rows, while they are being made."""
    A, B = tile(a_in, stage), tile(b_in, stage)
    P = gl.zeros([L, L], gl.float32, layout=LAYOUT)
    if SOURCE_FIRST:
        return product(B, turned(A), P, False)
    else:
        return product(A, turned(B), P, False)


@gluon.jit
def operands(S, like, OPERAND: gl.constexpr):
    """The state in parts, as the left operand of a product."""
    return [gl.convert_layout(each, OPERAND) for each in parts_of(S, like)]


@gluon.jit
def state_share(S, A_rows, O, ADD: gl.constexpr, OPERAND: gl.constexpr):
    """O + S A^T, while it is being made."""
    return product(operands(S, A_rows, OPERAND), turned(A_rows), O, ADD)


@gluon.jit
def rows_at(
    y, t, stride, length, first, width, L: gl.constexpr, BLOCK: gl.constexpr, LAYOUT: gl.constexpr
):
    """Rows from t and columns from ``first``, by all threads; zeros past ``length`` and
    ``width``."""
    t += gl.arange(0, L, layout=gl.SliceLayout(1, LAYOUT))
    column = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
    seen = (t < length)[:, None] & (column < width)[None, :]
    return gl.load(y + t.to(gl.int64)[:, None] * stride + column[None, :], mask=seen, other=0.0)


@gluon.jit
def exponents_of(
    vectors,
    ROW: gl.constexpr,
    COL: gl.constexpr,
    L: gl.constexpr,
    TARGETS: gl.constexpr,
    SOURCES: gl.constexpr,
):
    """Of targets and sources, each as (whole, rest)."""
    return (
        gl.expand_dims(vectors.slice(ROW * L, L).load(TARGETS), TARGETS.dim),
        gl.expand_dims(vectors.slice((ROW + 1) * L, L).load(TARGETS), TARGETS.dim),
        gl.expand_dims(vectors.slice(COL * L, L).load(SOURCES), SOURCES.dim),
        gl.expand_dims(vectors.slice((COL + 1) * L, L).load(SOURCES), SOURCES.dim),
    )


@gluon.jit
def row_factors(
    A_rows,
    n_in,
    X_rows,
    y_in,
    stage,
    BLOCK_A: gl.constexpr,
    WIDE_A: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Of the row products q . n, with n as it is, in fp32; without n, of dh . h."""
    if n_in is None:
        return load(X_rows, LAYOUT), y_in[1].index(stage).load(LAYOUT)
    else:
        n_row = flat(n_in, stage, WIDE_A).slice(0, BLOCK_A).load(gl.SliceLayout(0, LAYOUT))
        return load(A_rows, LAYOUT), n_row[None, :]


@gluon.jit
def products(one, other):
    return gl.sum(one.to(gl.float32) * other.to(gl.float32), 1)


@gluon.jit
def store_products(at, one, other):
    rows = products(one, other)
    gl.store(at + gl.arange(0, rows.shape[0], layout=rows.type.layout), rows)


@gluon.jit
def weighted(X_rows, like, edge, LAYOUT: gl.constexpr):
    """X^T by the weights of its tokens at the end of the chunk, in parts."""
    col_edge = edge.load(gl.SliceLayout(0, LAYOUT))
    return parts_of(scaled(load(turned(X_rows), LAYOUT), col_edge[None, :]), like)


@gluon.jit
def updated(
    S,
    S_2,
    X_rows,
    B,
    edge,
    chunk_decay,
    HALF: gl.constexpr,
    HALVES: gl.constexpr,
    SOURCE: gl.constexpr,
):
    """The state after a chunk, while it is being made."""
    col_edge = edge.load(gl.SliceLayout(0, SOURCE))
    X_low = parts_of(load(turned(X_rows), SOURCE).to(gl.float32) * col_edge[None, :], B)
    S = product(X_low, columns(B, 0, HALF), S * chunk_decay, True)
    if HALVES == 2:
        S_2 = product(X_low, columns(B, HALF, HALF), S_2 * chunk_decay, True)
    return S, S_2


@gluon.jit
def over_den(vectors, n_q_s, sums_s, L: gl.constexpr, LAYOUT: gl.constexpr):
    """(sign of nu where it is above the floor of den, 1 / den) of a chunk's tokens."""
    edge = vectors.slice(2 * L, L).load(LAYOUT)
    # What is forgotten is 0, whatever it was.
    nu = gl.where(edge == 0.0, 0.0, edge * n_q_s.load(LAYOUT))
    nu += gl.sum(sums_s.load(LAYOUT.parent), 0)
    floor = vectors.slice(FLOOR * L, L).load(LAYOUT)
    sign = gl.where(gl.abs(nu) > floor, gl.where(nu > 0.0, 1.0, -1.0), 0.0)
    # Where q is 0, den may be 2^-126: what it divides is 0 and must stay so.
    return sign, gl.minimum(1.0 / gl.maximum(gl.abs(nu), floor), 2.0**126)


@gluon.jit
def store_weights_with_den(
    weights_with_den, vectors, sign, factor, chunk_index, L: gl.constexpr, LAYOUT: gl.constexpr
):
    """The vectors of a chunk with the denominator in them, for the backward pass."""
    here = weights_with_den + chunk_index * (VECTORS * L) + gl.arange(0, L, layout=LAYOUT)
    rest = vectors.slice(L, L).load(LAYOUT) + gl.log2(factor)
    carry = gl.floor(rest + 0.5)
    gl.store(here, vectors.slice(0, L).load(LAYOUT) + carry)
    gl.store(here + L, rest - carry)
    edge = vectors.slice(2 * L, L).load(LAYOUT)
    gl.store(here + 2 * L, gl.where(edge == 0.0, 0.0, edge * factor))
    for each in gl.static_range(FIRST_SOURCE, MARK):
        gl.store(here + each * L, vectors.slice(each * L, L).load(LAYOUT))
    gl.store(here + MARK * L, vectors.slice(MARK * L, L).load(LAYOUT) + sign)


@gluon.jit
def load_state(at, second, rows, columns, lanes, X, HALF: gl.constexpr, HALVES: gl.constexpr):
    """(S, S_2) from pointers to the entries of S, those of S_2 ``second`` behind; zeros beyond
    ``rows`` of A and X columns."""
    valid = (columns < X)[:, None] & (lanes < rows)[None, :]
    S = gl.load(at, mask=valid, other=0.0).to(gl.float32)
    S_2 = S
    if HALVES == 2:
        valid = (columns < X)[:, None] & (lanes + HALF < rows)[None, :]
        S_2 = gl.load(at + second, mask=valid, other=0.0).to(gl.float32)
    return S, S_2


@gluon.jit
def store_final(
    at, second, S, S_2, rows, columns, lanes, X, HALF: gl.constexpr, HALVES: gl.constexpr
):
    """What ``load_state`` would load."""
    gl.store(at, S, mask=(columns < X)[:, None] & (lanes < rows)[None, :])
    if HALVES == 2:
        inside = (columns < X)[:, None] & (lanes + HALF < rows)[None, :]
        gl.store(at + second, S_2, mask=inside)


@gluon.jit
def is_at_checkpoint(
    c,
    low,
    high,
    chunks,
    L: gl.constexpr,
    CHECKPOINT_EVERY: gl.constexpr,
    REVERSE: gl.constexpr,
    AT_SEQUENCE_END: gl.constexpr,
):
    """Is the state before chunk c one to store? Not if this split started from it."""
    if REVERSE:
        edge = ((c + 1) * L % CHECKPOINT_EVERY == 0) & (c + 1 < high)
        if AT_SEQUENCE_END:
            edge |= c + 1 == chunks
        return edge
    else:
        return (c * L % CHECKPOINT_EVERY == 0) & (c > low)


@gluon.jit
def add_column(O, row_vector, d_now, REVERSE: gl.constexpr, OUTPUT: gl.constexpr):
    """O + n d^T for dq, O + dn 1^T for dk: weighted as the state's share is."""
    if REVERSE:
        return O + row_vector[:, None]
    else:
        return O + row_vector[:, None] * d_now.load(gl.SliceLayout(0, OUTPUT))[None, :]


@gluon.jit
def store_state(at, S, S_2, HALVES: gl.constexpr, SECOND: gl.constexpr):
    gl.store(at, S)
    if HALVES == 2:
        gl.store(at + SECOND, S_2)
