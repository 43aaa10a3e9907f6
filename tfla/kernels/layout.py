"""Where things lie: sequences, chunks and larger units of tokens, for every kernel, without the
host knowing any length.

A sequence of packed tokens [c_n, c_{n+1}) gets the slots from c_n // U + n on when it is cut into
units of U tokens: never fewer than it needs, never more than T // U + N in all, and no prefix sum
to wait for. Vectors of one number a token lie as (row, slot, L), rows being (batch, head), or
heads alone when sequences are packed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence(n, cu_seqlens, T, PACKED: tl.constexpr):
    """(batch, first token, length) of sequence n; offsets out of range are clamped into the
    buffers."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int64), start), T)
        batch = start * 0
    else:
        batch = n.to(tl.int64)
        start = batch * 0
        end = start + T
    return batch, start, end - start


@triton.jit
def unit(w, cu_seqlens, table, T, U, PACKED: tl.constexpr):
    """(sequence, index within it) of the w-th slot of units of U tokens; the index is past the end
    in a slot that is not used."""
    w = w.to(tl.int64)
    if PACKED:
        n = tl.load(table + w)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
        j = w - start // U - n
    else:
        each = tl.maximum((T + U - 1) // U, 1)
        n = w // each
        j = w - n * each
    return n, tl.where(j < 0, 1 << 30, j)


@triton.jit
def first_slot(n, start, U, PACKED: tl.constexpr):
    """The slot of the first unit of sequence n, which starts at token ``start``, in its row."""
    if PACKED:
        return start // U + n
    else:
        return start * 0


@triton.jit
def chunk(cu_seqlens, table, T, H, slots, L, PACKED: tl.constexpr):
    """(sequence, index in it, batch, head, first token, length, slot) of the chunk that a program
    of a grid over all slots has; the index is past the end in a slot that is not used."""
    head = (tl.program_id(0) % H).to(tl.int64)
    n, j = unit(tl.program_id(0) // H, cu_seqlens, table, T, L, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    row = head if PACKED else batch * H + head
    return n, j, batch, head, start, length, row * slots + first_slot(n, start, L, PACKED) + j


@triton.jit
def first_kept(n, start, SPAN, PACKED: tl.constexpr, ENDS: tl.constexpr):
    """The same of kept states: one where two spans of SPAN tokens meet, with ENDS one more at the
    end of every sequence."""
    if ENDS:
        return first_slot(n, start, SPAN, PACKED)
    elif PACKED:
        return start // SPAN
    else:
        return start * 0


@triton.jit
def reaching(decay, low, high, REVERSE: tl.constexpr):
    """(low, high, remains): the part of chunks [low, high) that the state behind them still knows,
    and what it leaves of a state before them. What came before that part (in reverse, after) is
    multiplied by decays whose product is 0 in fp32."""
    remains = (low * 0 + 1).to(tl.float32)
    known = low * 0
    while (known < high - low) & (remains > 0.0):
        for each in tl.static_range(8):  # loads that wait for none of each other
            c = (low + known + each) if REVERSE else (high - 1 - known - each)
            remains *= tl.load(decay + c, mask=(c >= low) & (c < high), other=1.0)
        known += 8
    if REVERSE:
        return low, tl.minimum(low + known, high), remains
    else:
        return tl.maximum(high - known, low), high, remains


@triton.jit
def _last(cu_seqlens, at, U, T, N, SLOTS: tl.constexpr):
    """The last n with c_n // U <= at, or with c_n // U + n <= at where sequences have slots;
    found by bisection."""
    low = at * 0
    high = low + N
    span = N
    while span > 0:
        middle = (low + high) // 2
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle).to(tl.int64), 0), T) // U
        before = (start + middle if SLOTS else start) <= at
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
        span = span // 2
    return low


@triton.jit(
    do_not_specialize=["T", "N", "unit_0", "unit_1", "unit_2", "size_0", "size_1", "size_2"]
)
def _tables_kernel(
    cu_seqlens, table, T, N, unit_0, unit_1, unit_2, size_0, size_1, size_2, BLOCK: tl.constexpr
):
    """The sequence of every slot, for three units at once."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = (slot >= size_0).to(tl.int32) + (slot >= size_0 + size_1).to(tl.int32)
    U = tl.where(which == 0, unit_0, tl.where(which == 1, unit_1, unit_2)).to(tl.int64)
    w = slot - tl.where(which == 0, 0, tl.where(which == 1, size_0, size_0 + size_1))
    n = tl.minimum(_last(cu_seqlens, w, U, T, N, True), N - 1)
    tl.store(table + slot, n, mask=slot < size_0 + size_1 + size_2)


@triton.jit(do_not_specialize=["T", "N", "H", "stride_ft", "stride_fh"])
def _joined_kernel(
    f, cu_seqlens, out, T, N, H, stride_ft, stride_fh, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr
):
    """f (T, H), closed at tokens where a sequence begins."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = _last(cu_seqlens, t, 1, T, N, False)
    begins = tl.load(cu_seqlens + n) == t
    for first in range(0, H, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        inside = (t < T)[:, None] & (head < H)[None, :]
        at = t.to(tl.int64)[:, None] * stride_ft + head.to(tl.int64)[None, :] * stride_fh
        x = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(begins[:, None], float("-inf"), x)
        tl.store(out + t.to(tl.int64)[:, None] * H + head[None, :], x, mask=inside)
