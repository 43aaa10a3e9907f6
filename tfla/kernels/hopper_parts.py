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
from tfla.kernels.parts import barrier, columns, load, parts_of, store_parts, turned, view

__all__ = ["barrier", "columns", "load", "store_parts", "turned"]  # of parts.py, for hopper.py

# The same functions under the names of Triton 3.6 and of later ones.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_rows = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
LINE = gl.constexpr(256)  # what a copy moves is at most so wide
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def channel(rows, first, STAGES: gl.constexpr):
    """What comes chunk by chunk, from column ``first`` on: from where, to where."""
    SHAPE: gl.constexpr = [STAGES, rows.block_shape[0], rows.block_shape[1]]
    return rows, gl.allocate_shared_memory(rows.dtype, SHAPE, rows.layout), first


@gluon.constexpr_function
def _bytes(channels):
    return sum(rows.block_type.nbytes for rows, _, _ in channels)


@gluon.jit
def fetch(channels, ready, c, chunk, wanted, STAGES: gl.constexpr):
    """Send for chunk c, the ``chunk``-th of this program, by one barrier (one each is slower)."""
    bar = ready.index(chunk % STAGES)
    mbarrier.expect(bar, _bytes(channels), pred=wanted)
    for n in gl.static_range(len(channels)):
        rows, tiles, first = channels[n]
        _load(rows, [c * rows.block_shape[0], first], bar, tiles.index(chunk % STAGES), pred=wanted)


@gluon.jit
def flat(channel, stage, SIZE: gl.constexpr):
    """What came of an operand of a few lines, as one vector."""
    return view(channel[1].index(stage), gl.float32, [SIZE], FLAT)


@gluon.jit
def tile(channel, stage):
    """What came of an operand, as products take it: itself, or of fp32 what ``split`` made of it, a
    tile of what bf16 holds of each number and one of what that leaves."""
    whole = channel[1].index(stage)
    if whole.dtype != gl.float32:
        return (whole,)
    else:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(whole.shape, gl.bfloat16)
        both = view(whole, gl.bfloat16, [2, whole.shape[0], whole.shape[1]], LAYOUT)
        return both.index(0), both.index(1)


@gluon.jit
def split(channel, stage, LAYOUT: gl.constexpr):
    """Of an fp32 tile, two of bf16 in its place. A fence must follow."""
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
def scores(a_in, b_in, stage, L: gl.constexpr, LAYOUT: gl.constexpr, SOURCE_FIRST: gl.constexpr):
    """The products of a chunk's rows, while they are being made."""
    A, B = tile(a_in, stage), tile(b_in, stage)
    P = gl.zeros([L, L], gl.float32, layout=LAYOUT)
    if SOURCE_FIRST:
        return product(B, turned(A), P, False)
    else:
        return product(A, turned(B), P, False)


@gluon.jit
def state_share(S, A_rows, O, ADD: gl.constexpr, OPERAND: gl.constexpr):
    """O + S A^T, while it is being made."""
    operands = [gl.convert_layout(each, OPERAND) for each in parts_of(S, A_rows)]
    return product(operands, turned(A_rows), O, ADD)


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
def store_state(at, S, S_2, HALVES: gl.constexpr, SECOND: gl.constexpr):
    gl.store(at, S)
    if HALVES == 2:
        gl.store(at + SECOND, S_2)
