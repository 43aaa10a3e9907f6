"""Where things lie: sequences and the intervals of tokens that they are divided into, for every
kernel, without the host knowing any length.

An interval of U tokens is a chunk, the tokens between two checkpoints, or a split. Arrays have a
place for each interval of one (batch, head), or of one head when sequences are packed: vectors of
one number a token lie as (batch and head, chunk, L). A sequence of packed tokens [c_n, c_{n+1}) has
the places from c_n // U + n on: never fewer than it needs, never more than T // U + N in all, and
no prefix sum to wait for. Some places stay empty.

The host does not know the offsets of packed sequences on a GPU, so they may be anything.
``_offsets_kernel`` makes them ascend within [0, T]; every other kernel reads what it wrote, never
what the caller gave, and ``_clear_kernel`` writes the zeros of tokens that are then in no sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


#   cu_seqlens   (N + 1,) i32 or i64, ``stride`` numbers apart   offsets as the caller gave them
#   out          (N + 1,) i64   written
#   T, N         tokens, sequences
#   BLOCK        offsets at once
@triton.jit(do_not_specialize=["T", "N", "stride"])
def _offsets_kernel(cu_seqlens, out, T, N, stride, BLOCK: tl.constexpr):
    """out (N + 1,) int64: each offset within [0, T], and no less than any before it. One program,
    which has the next offsets on their way while it works on these."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros([], tl.int64)
    at = cu_seqlens + lanes.to(tl.int64) * stride
    given = tl.load(at, mask=lanes <= N, other=0).to(tl.int64)
    for first in range(0, N + 1, BLOCK):
        n = first + lanes
        at += BLOCK * stride
        following = tl.load(at, mask=n + BLOCK <= N, other=0).to(tl.int64)
        here = tl.associative_scan(tl.minimum(tl.maximum(given, 0), T), 0, _larger)
        here = tl.maximum(here, largest)
        tl.store(out + n, here, mask=n <= N)
        largest = tl.max(here, 0)
        given = following


@triton.jit
def _clear(x, width, T, start, end, BLOCK: tl.constexpr):
    """Zeros in the rows of x (T, width) before ``start`` and from ``end`` on; each program of the
    grid takes every so many blocks."""
    if x is not None:
        lanes = tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], x.dtype.element_ty)
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for at in range(first, start * width, step):
            tl.store(x + at + lanes, zeros, mask=at + lanes < start * width)
        for at in range(end * width + first, T.to(tl.int64) * width, step):
            tl.store(x + at + lanes, zeros, mask=at + lanes < T.to(tl.int64) * width)


#   offsets      (N + 1,) i64              what _offsets_kernel wrote
#   a, b, c, d, e   (T, width), any dtype   updated; None where there are fewer
#   T, N         tokens, sequences
#   width_a, width_b, width_c, width_d, width_e   their columns
#   BLOCK        numbers at once
@triton.jit(do_not_specialize=["T", "N", "width_a", "width_b", "width_c", "width_d", "width_e"])
def _clear_kernel(
    offsets, a, b, c, d, e, T, N, width_a, width_b, width_c, width_d, width_e, BLOCK: tl.constexpr
):
    """Zeros in up to five contiguous tensors (T, width), at tokens before the first sequence and
    behind the last: a GPU that has nothing to clear reads two offsets."""
    start, end = tl.load(offsets), tl.load(offsets + N)
    _clear(a, width_a, T, start, end, BLOCK)
    _clear(b, width_b, T, start, end, BLOCK)
    _clear(c, width_c, T, start, end, BLOCK)
    _clear(d, width_d, T, start, end, BLOCK)
    _clear(e, width_e, T, start, end, BLOCK)


@triton.jit
def sequence(n, cu_seqlens, T, PACKED: tl.constexpr):
    """(batch, first token, length) of sequence n."""
    if PACKED:
        start = tl.load(cu_seqlens + n)
        end = tl.load(cu_seqlens + n + 1)
        batch = start * 0
    else:
        batch = n.to(tl.int64)
        start = batch * 0
        end = start + T
    return batch, start, end - start


@triton.jit
def interval(w, cu_seqlens, table, T, U, PACKED: tl.constexpr):
    """(sequence, index within it) of the w-th place for intervals of U tokens; the index is past
    the end where the place is empty."""
    w = w.to(tl.int64)
    if PACKED:
        n = tl.load(table + w)
        start = tl.load(cu_seqlens + n)
        j = w - start // U - n
    else:
        each = tl.maximum((T + U - 1) // U, 1)
        n = w // each
        j = w - n * each
    return n, tl.where(j < 0, 1 << 30, j)


@triton.jit
def first_index(n, start, U, PACKED: tl.constexpr):
    """The place of the first interval of sequence n, which starts at token ``start``."""
    if PACKED:
        return start // U + n
    else:
        return start * 0


@triton.jit
def chunk(cu_seqlens, table, T, H, chunks_per_head, L, PACKED: tl.constexpr):
    """(sequence, index in it, batch, head, first token, length, index in arrays) of the chunk of a
    program in a grid over all places; the index is past the end where the place is empty."""
    head = (tl.program_id(0) % H).to(tl.int64)
    n, j = interval(tl.program_id(0) // H, cu_seqlens, table, T, L, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    bh = head if PACKED else batch * H + head
    return (
        n,
        j,
        batch,
        head,
        start,
        length,
        bh * chunks_per_head + first_index(n, start, L, PACKED) + j,
    )


@triton.jit
def first_checkpoint_index(
    n, start, CHECKPOINT_EVERY, PACKED: tl.constexpr, AT_SEQUENCE_END: tl.constexpr
):
    """The place of its first checkpoint: one lies after every CHECKPOINT_EVERY tokens inside of a
    sequence, with AT_SEQUENCE_END one more at its end."""
    if AT_SEQUENCE_END:
        return first_index(n, start, CHECKPOINT_EVERY, PACKED)
    elif PACKED:
        return start // CHECKPOINT_EVERY
    else:
        return start * 0


@triton.jit
def effective_chunks(decay, low, high, REVERSE: tl.constexpr):
    """(low, high, split_decay): the part of chunks [low, high) that has weight in the state after
    them (in reverse, before), and the product of their decays. What lies beyond that part is
    multiplied by decays whose product is 0 in fp32."""
    split_decay = (low * 0 + 1).to(tl.float32)
    known = low * 0
    while (known < high - low) & (split_decay > 0.0):
        for each in tl.static_range(8):  # loads that wait for none of each other
            c = (low + known + each) if REVERSE else (high - 1 - known - each)
            split_decay *= tl.load(decay + c, mask=(c >= low) & (c < high), other=1.0)
        known += 8
    if REVERSE:
        return low, tl.minimum(low + known, high), split_decay
    else:
        return tl.maximum(high - known, low), high, split_decay


class Place(NamedTuple):
    """Where a program of a scan works."""

    tile: Any  # which BLOCK_X columns of x and out
    tiles: Any  # how many such tiles x has
    head: Any
    split: Any  # its split, or its sequence, among all of them
    n: Any  # sequence
    j: Any  # its split among those of the sequence
    batch: Any
    start: Any  # the first token of the sequence, in its batch entry
    length: Any  # tokens of the sequence
    bh: Any  # batch entry and head, or head where sequences are packed
    chunks: Any  # of the sequence


@triton.jit
def place_of(
    cu_seqlens,
    table,
    T,
    H,
    X,
    split_len,
    L: tl.constexpr,
    BLOCK_X: tl.constexpr,
    SPLIT_T: tl.constexpr,
):
    """The ``Place`` of this program of a scan, in a grid of tiles, heads and sequences, or with
    SPLIT_T splits of split_len tokens."""
    PACKED: tl.constexpr = cu_seqlens is not None
    tiles = (X + BLOCK_X - 1) // BLOCK_X
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    split = (tl.program_id(0) // tiles // H).to(tl.int64)
    n, j = split, 0
    if SPLIT_T:
        n, j = interval(split, cu_seqlens, table, T, split_len, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    bh = head if PACKED else batch * H + head
    chunks = ((length + L - 1) // L).to(tl.int32)
    return Place(tile, tiles, head, split, n, j, batch, start, length, bh, chunks)


@triton.jit
def is_past_the_end(place, split_len, L: tl.constexpr):
    """Has the sequence no such split?"""
    return (place.j > 0) & (place.j >= (place.chunks * L + split_len - 1) // split_len)


@triton.jit
def chunks_of_split(place, split_len, L: tl.constexpr):
    """The chunks [low, high) of the split of this program."""
    low = (place.j * (split_len // L)).to(tl.int32)
    return low, tl.minimum(place.chunks, (low + split_len // L).to(tl.int32))


@triton.jit
def first_places(
    place,
    cu_seqlens,
    chunks_per_head,
    checkpoints_per_head,
    L: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr,
    AT_SEQUENCE_END: tl.constexpr,
):
    """Where the first chunk of the sequence and its first checkpoint lie in arrays."""
    PACKED: tl.constexpr = cu_seqlens is not None
    first_chunk = place.bh * chunks_per_head + first_index(place.n, place.start, L, PACKED)
    first_checkpoint = place.bh * checkpoints_per_head + first_checkpoint_index(
        place.n, place.start, CHECKPOINT_EVERY, PACKED, AT_SEQUENCE_END
    )
    return first_chunk, first_checkpoint


@triton.jit
def _last(cu_seqlens, at, U, N, PLACES: tl.constexpr):
    """The last n with c_n // U <= at, or with PLACES with c_n // U + n <= at; by bisection."""
    low = at * 0
    high = low + N
    width = N
    while width > 0:
        middle = (low + high) // 2
        start = tl.load(cu_seqlens + middle) // U
        before = (start + middle if PLACES else start) <= at
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
        width = width // 2
    return low


#   cu_seqlens   (N + 1,) i64   offsets of packed sequences
#   table_0, table_1, table_2   (count_0,), (count_1,), (count_2,) i32   written: the sequence of
#                each place for chunks, for intervals between checkpoints, and for splits
#   N            sequences
#   length_0, length_1, length_2   tokens of an interval of each kind
#   count_0, count_1, count_2      places of each kind
#   BLOCK        places of a program
@triton.jit(
    do_not_specialize=["N", "length_0", "length_1", "length_2", "count_0", "count_1", "count_2"]
)
def _tables_kernel(
    cu_seqlens,
    table_0,
    table_1,
    table_2,
    N,
    length_0,
    length_1,
    length_2,
    count_0,
    count_1,
    count_2,
    BLOCK: tl.constexpr,
):
    """The sequence of every place, for intervals of three lengths at once."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = (place >= count_0).to(tl.int32) + (place >= count_0 + count_1).to(tl.int32)
    U = tl.where(which == 0, length_0, tl.where(which == 1, length_1, length_2)).to(tl.int64)
    w = place - tl.where(which == 0, 0, tl.where(which == 1, count_0, count_0 + count_1))
    n = tl.minimum(_last(cu_seqlens, w, U, N, True), N - 1)
    tl.store(table_0 + w, n, mask=which == 0)
    tl.store(table_1 + w, n, mask=which == 1)
    tl.store(table_2 + w, n, mask=(which == 2) & (w < count_2))


#   f            (T, H), any float   forget gates, pre-activations or log_f; stride_ft, stride_fh
#   cu_seqlens   (N + 1,) i64        offsets of packed sequences
#   out          (T, H) fp32         written: f, -inf where a sequence begins
#   out_offsets  (2,) i64            written: the offsets of all sequences as one
#   T, N, H      tokens, sequences, heads
#   BLOCK, BLOCK_H   tokens of a program; heads at once
@triton.jit(do_not_specialize=["T", "N", "H", "stride_ft", "stride_fh"])
def _fold_packing_kernel(
    f,
    cu_seqlens,
    out,
    out_offsets,
    T,
    N,
    H,
    stride_ft,
    stride_fh,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """f (T, H), closed at tokens where a sequence begins; and where the first begins and the last
    one ends, the offsets of the one sequence that they are then."""
    if tl.program_id(0) == 0:
        tl.store(out_offsets, tl.load(cu_seqlens))
        tl.store(out_offsets + 1, tl.load(cu_seqlens + N))
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = _last(cu_seqlens, t, 1, N, False)
    begins = tl.load(cu_seqlens + n) == t
    for first in range(0, H, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        inside = (t < T)[:, None] & (head < H)[None, :]
        at = t.to(tl.int64)[:, None] * stride_ft + head.to(tl.int64)[None, :] * stride_fh
        x = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(begins[:, None], float("-inf"), x)
        tl.store(out + t.to(tl.int64)[:, None] * H + head[None, :], x, mask=inside)
