"""The scan: one kernel body for h, dq, dk and dv, and for the states where splits of T begin.

    scores = (A B^T + d) * D                     (L, L)     D = exp2(row + column exponents),
    causal or anti-causal out    = edge * (A S + column) + scores X    (L, X)
    S      = decay S + (edge B)^T X              (A, X)     on chip from the first chunk of a
    split to its last

A program owns BLOCK_X columns of one head of one split of a sequence and walks over its chunks,
forward or in reverse. Which vector is the row and which the column exponent is all that the
direction changes (``math.md``). TRANSPOSED keeps S as (X, A), the register operand of the next
product, where it would otherwise pass through shared memory. Where a group of heads shares q and k,
the gradients of these are made for each head and added, or of large groups in groups.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tfla.kernels.gates import FIRST_SOURCE, VECTORS, power, scaled
from tfla.kernels.layout import (
    chunks_of_split,
    effective_chunks,
    first_checkpoint_index,
    first_index,
    first_places,
    is_past_the_end,
    place_of,
    sequence,
)


@triton.jit
def _tile(
    x,
    width,
    stride,
    t,
    length,
    start,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """(L, BLOCK) of x from token t, column ``start``; zeros past the end of the sequence and past
    ``width``."""
    if DESCRIPTOR:
        return x.load([t, start])
    else:
        l = t + tl.arange(0, L)
        column = start + tl.arange(0, BLOCK)
        seen = (l < length)[:, None] & (column < width)[None, :]
        return tl.load(x + l.to(tl.int64)[:, None] * stride + column[None, :], mask=seen, other=0.0)


@triton.jit
def _spare(x, AXIS: tl.constexpr):
    """What power of two the rows of x along AXIS are divided by so that fp16 holds them: 0 where it
    does anyway."""
    most = tl.max(tl.abs(x), AXIS)
    power = tl.floor(tl.log2(tl.maximum(most, 1.0))) - 14.0
    power = tl.where((power > 0.0) & (most < float("inf")), power, 0.0)
    return tl.expand_dims(power, AXIS)


# The arguments, of h | dq | dv | dk. BH: batch entries times heads, or heads where packed. E: bf16,
# fp16 or fp32. What is None in a launch is neither read nor written.
#
#   a            (B, T, H / R, A) E     rows of targets: q | dh | k | v; None where out is None
#   b            (B, T, H / R, A) E     rows of sources: k | v | q | dh
#   x            (B, T, H / R_X, X) E   payload of sources: v | k | dh | q
#   y            (B, T, H / R_X, X) E   what the row dot products are with: - | q | - | k
#   partial      (B, T, H, X) fp32   out of the slices of the contraction before this one
#   weights      (BH, chunks_per_head, 8, L) fp32   the vectors of gates.py
#   decay        (BH, chunks_per_head) fp32         what a chunk leaves of the state before it
#   d            (BH, chunks_per_head, L) fp32      the normaliser's column, added to the scores
#   vector       (BH, chunks_per_head, X) fp32      the state of that column: n for dq, dn for dk
#   state        (N, H, A, X) fp32   the state before the first token (in reverse, after the last)
#   cu_seqlens   (N + 1,) i64        offsets of packed sequences
#   table        i32                 the sequence of each split, where packed
#   checkpoints  (BH, checkpoints_per_head, rows, columns) fp32 or bf16   states, of
#                stride_checkpoint numbers each: written by h and dv, read by dq and dk
#   final        (N, H, A, X) fp32   written: the state at the other end of the sequence
#   out          (B, T, H, X) E      written: h | dq | dv | dk; fp32 of slices but the last
#   dot          (tiles, BH, chunks_per_head, L) fp32   written: out . y of the columns of each tile
#   split_decay  (splits, H) fp32    written where out is None: the product of the decays of a split
#
#   stride_..    elements: a, b, x, y by batch, token, head; state (s), final (f) by n, head, a, x
#   T, H         tokens (of a sequence, or of all that are packed), heads
#   chunks_per_head, checkpoints_per_head   places in the arrays above for each of BH
#   split_len    tokens of a split, where SPLIT_T; of dq and dk CHECKPOINT_EVERY
#   size         numbers of dot for each tile: BH chunks_per_head L
#   first_a      the first column of a and b of this slice; None for 0
#   A, X         columns of this slice; columns of out
#   R, R_X       heads that share one of a and b, of x and y
#
#   L, BLOCK_A, BLOCK_X   tokens of a chunk; columns of a and b, of x, of a program
#   CHECKPOINT_EVERY      tokens between checkpoints
#   REVERSE               dv and dk: chunks are walked from the last to the first
#   SPLIT_T               programs have a split of a sequence, not all of it
#   STORE_STATES          write checkpoints on the way
#   AT_SEQUENCE_END       there is a checkpoint at the end of each sequence too
#   TRANSPOSED            hold S as (X, A)
#   DESCRIPTOR            copy tiles by descriptors (TMA)
#   PRECISION             of products of fp32: "ieee" or "tf32"
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head", "checkpoints_per_head", "split_len"])
def _scan_kernel(
    a,
    b,
    x,
    y,
    partial,
    weights,
    decay,
    d,
    vector,
    state,
    cu_seqlens,
    table,
    checkpoints,
    final,
    out,
    dot,
    split_decay,
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
    stride_fn,
    stride_fh,
    stride_fa,
    stride_fx,
    T,
    H,
    chunks_per_head,
    checkpoints_per_head,
    split_len,
    size,
    stride_checkpoint,
    first_a,
    A,
    X,
    R,
    R_X,
    L: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr,
    STRIDE_CHECKPOINT_A: tl.constexpr,
    STRIDE_CHECKPOINT_X: tl.constexpr,
    REVERSE: tl.constexpr,
    SPLIT_T: tl.constexpr,
    STORE_STATES: tl.constexpr,
    AT_SEQUENCE_END: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PRECISE: tl.constexpr = x.dtype.element_ty == tl.float32
    # 1 / den and what it is summed up to may be beyond fp16, and a sum that one inf spoils would
    # spoil the gate gradients of all earlier tokens: operands of products are divided by powers of
    # two where they must be, the sums multiplied.
    FITTED: tl.constexpr = x.dtype.element_ty == tl.float16
    ROW: tl.constexpr = FIRST_SOURCE if REVERSE else 0
    COL: tl.constexpr = 0 if REVERSE else FIRST_SOURCE
    place = place_of(cu_seqlens, table, T, H, X, split_len, L, BLOCK_X, SPLIT_T)
    tile, head = place.tile, place.head
    n, batch, start, length = place.n, place.batch, place.start, place.length
    chunks, low, high = place.chunks, 0, place.chunks
    if SPLIT_T:
        if is_past_the_end(place, split_len, L):
            return
        low, high = chunks_of_split(place, split_len, L)
        if out is None:  # nothing starts from what the last split leaves
            if (low == 0) if REVERSE else (high == chunks):
                return
    first_chunk, first_checkpoint = first_places(
        place,
        cu_seqlens,
        chunks_per_head,
        checkpoints_per_head,
        L,
        CHECKPOINT_EVERY,
        AT_SEQUENCE_END,
    )
    size = size.to(tl.int64)
    if split_decay is not None:
        next_checkpoint = (low if REVERSE else high) * L // CHECKPOINT_EVERY - 1
        low, high, decay_of_split = effective_chunks(decay + first_chunk, low, high, REVERSE)
        tl.store(split_decay + place.split * H + head, decay_of_split)

    first_x = tile * BLOCK_X
    columns = first_x + tl.arange(0, BLOCK_X)
    lanes = tl.arange(0, BLOCK_A)
    if first_a is not None:
        b += first_a
        if out is not None:
            a += first_a
    b_rows = b + batch * stride_bb + start * stride_bt + head // R * stride_bh
    x_rows = x + batch * stride_xb + start * stride_xt + head // R_X * stride_xh
    out_at = ((batch * T + start) * H + head) * X
    if out is not None:
        a_rows = a + batch * stride_ab + start * stride_at + head // R * stride_ah
        out_rows = out + out_at
    if y is not None:
        y_rows = y + batch * stride_yb + start * stride_yt + head // R_X * stride_yh
    if DESCRIPTOR:
        n_rows = tl.maximum(length, 1).to(tl.int32)  # 0 is no size, though nothing is read
        b_rows = tl.make_tensor_descriptor(b_rows, [n_rows, A], [stride_bt, 1], [L, BLOCK_A])
        x_rows = tl.make_tensor_descriptor(x_rows, [n_rows, X], [stride_xt, 1], [L, BLOCK_X])
        if out is not None:
            a_rows = tl.make_tensor_descriptor(a_rows, [n_rows, A], [stride_at, 1], [L, BLOCK_A])
            out_rows = tl.make_tensor_descriptor(
                out_rows, [n_rows, X], [H.to(tl.int64) * X, 1], [L, BLOCK_X]
            )

    if checkpoints is not None and first_a is not None:
        checkpoints += first_a * STRIDE_CHECKPOINT_A
    # The state, in the orientation that it has on chip. In ``checkpoints`` it has strides that are
    # constants, so that the addresses of checkpoints take no registers; only the base moves.
    if TRANSPOSED:
        S = tl.zeros([BLOCK_X, BLOCK_A], tl.float32)
        entry = (
            tl.arange(0, BLOCK_X)[:, None] * STRIDE_CHECKPOINT_X
            + lanes[None, :] * STRIDE_CHECKPOINT_A
        )
        inside = (columns < X)[:, None] & (lanes < A)[None, :]
    else:
        S = tl.zeros([BLOCK_A, BLOCK_X], tl.float32)
        entry = (
            lanes[:, None] * STRIDE_CHECKPOINT_A
            + tl.arange(0, BLOCK_X)[None, :] * STRIDE_CHECKPOINT_X
        )
        inside = (lanes < A)[:, None] & (columns < X)[None, :]
    if out is not None and state is not None:
        rows = A
        if SPLIT_T:  # the splits after the first start from a checkpoint
            rows = tl.where((high == chunks) if REVERSE else (low == 0), A, 0)
        state += n.to(tl.int64) * stride_sn + head * stride_sh
        if first_a is not None:
            state += first_a * stride_sa
        if TRANSPOSED:
            at = columns[:, None] * stride_sx + lanes[None, :] * stride_sa
            first = (columns < X)[:, None] & (lanes < rows)[None, :]
        else:
            at = lanes[:, None] * stride_sa + columns[None, :] * stride_sx
            first = (lanes < rows)[:, None] & (columns < X)[None, :]
        S = tl.load(state + at, mask=first, other=0.0)
    if out is not None and SPLIT_T:
        if (high < chunks) if REVERSE else (low > 0):
            before = (high if REVERSE else low) * L // CHECKPOINT_EVERY - 1
            checkpoint = (
                checkpoints
                + (first_checkpoint + before) * stride_checkpoint
                + first_x * STRIDE_CHECKPOINT_X
                + entry
            )
            S = tl.load(checkpoint, mask=inside, other=0.0).to(tl.float32)

    l = tl.arange(0, L)
    for step in range(0, high - low):
        c = (high - 1 - step) if REVERSE else (low + step)
        t = c * L
        B = _tile(b_rows, A, stride_bt, t, length, 0, L, BLOCK_A, DESCRIPTOR)
        XX = _tile(x_rows, X, stride_xt, t, length, first_x, L, BLOCK_X, DESCRIPTOR)
        here = weights + (first_chunk + c) * (VECTORS * L) + l
        col_edge = tl.load(here + (COL + 2) * L)
        chunk_decay = tl.load(decay + first_chunk + c)
        if out is not None:
            AA = _tile(a_rows, A, stride_at, t, length, 0, L, BLOCK_A, DESCRIPTOR)
            row_whole = tl.load(here + ROW * L)
            row_rest = tl.load(here + (ROW + 1) * L)
            row_edge = tl.load(here + (ROW + 2) * L)
            col_whole = tl.load(here + COL * L)
            col_rest = tl.load(here + (COL + 1) * L)
            if TRANSPOSED:
                P = tl.dot(B, tl.trans(AA), input_precision=PRECISION)
                whole = row_whole[None, :] + col_whole[:, None]
                rest = row_rest[None, :] + col_rest[:, None]
                target, source = l[None, :], l[:, None]
            else:
                P = tl.dot(AA, tl.trans(B), input_precision=PRECISION)
                whole = row_whole[:, None] + col_whole[None, :]
                rest = row_rest[:, None] + col_rest[None, :]
                target, source = l[:, None], l[None, :]
            causal = (target <= source) if REVERSE else (target >= source)
            if d is not None:
                d_here = tl.load(d + (first_chunk + c) * L + l)
                if REVERSE == TRANSPOSED:
                    P += d_here[:, None]
                else:
                    P += d_here[None, :]
            D = power(whole, rest, PRECISE)
            # What weighs nothing is 0, also where the product has overflowed.
            P = tl.where(causal & (D != 0.0), P * D, 0.0)
            if FITTED:
                P_spare = _spare(P, 0 if TRANSPOSED else 1)
                P *= tl.exp2(-P_spare)
                S_spare = _spare(S, 1 if TRANSPOSED else 0)
                S_low = (S * tl.exp2(-S_spare)).to(B.dtype)
            else:
                S_low = S.to(B.dtype)
            P = P.to(XX.dtype)
            if TRANSPOSED:
                O = tl.dot(S_low, tl.trans(AA), input_precision=PRECISION)
                O = scaled(O, row_edge[None, :])
                if FITTED:
                    O *= tl.exp2(S_spare) * tl.exp2(-P_spare)
                O = tl.dot(tl.trans(XX), P, O, input_precision=PRECISION)
                if FITTED:
                    O *= tl.exp2(P_spare)
                O = tl.trans(O)
            else:
                O = tl.dot(AA, S_low, input_precision=PRECISION)
                O = scaled(O, row_edge[:, None])
                if FITTED:
                    O *= tl.exp2(S_spare) * tl.exp2(-P_spare)
                O = tl.dot(P, XX, O, input_precision=PRECISION)
                if FITTED:
                    O *= tl.exp2(P_spare)
            if d is not None:  # last: the state in low precision has left the registers
                row_vector = tl.load(
                    vector + (first_chunk + c) * X + columns, mask=columns < X, other=0.0
                )
                row_d = row_edge if REVERSE else scaled(d_here, row_edge)
                O += scaled(row_vector[None, :], row_d[:, None])
            seen = (t + l < length)[:, None] & (columns < X)[None, :]
            token = (t + l).to(tl.int64)[:, None] * H * X + columns[None, :]
            if partial is not None:
                O += tl.load(partial + out_at + token, mask=seen, other=0.0)
            if DESCRIPTOR:
                out_rows.store([t, first_x], O.to(out.dtype.element_ty))
            else:
                tl.store(out_rows + token, O.to(out.dtype.element_ty), mask=seen)
            if y is not None:
                Y = _tile(y_rows, X, stride_yt, t, length, first_x, L, BLOCK_X, False)
                tl.store(
                    dot + tile * size + (first_chunk + c) * L + l, tl.sum(O * Y.to(tl.float32), 1)
                )
        if STORE_STATES:
            # The state at the end of the chunk, unless it is where another split of the sequence
            # starts from.
            edge = ((c + 1) * L % CHECKPOINT_EVERY == 0) & (c + 1 < high)
            if AT_SEQUENCE_END:
                edge |= c + 1 == chunks
            checkpoint = (
                checkpoints
                + (first_checkpoint + c * L // CHECKPOINT_EVERY) * stride_checkpoint
                + first_x * STRIDE_CHECKPOINT_X
                + entry
            )
        if STORE_STATES and REVERSE:
            if edge:
                tl.store(checkpoint, S)
        S = scaled(S, chunk_decay)
        X_weighed = scaled(XX.to(tl.float32), col_edge[:, None])
        if FITTED:
            X_spare = _spare(X_weighed, 0)
            X_weighed *= tl.exp2(-X_spare)
            if TRANSPOSED:
                X_spare = tl.trans(X_spare)
            S *= tl.exp2(-X_spare)
        XX = X_weighed.to(XX.dtype)
        if TRANSPOSED:
            S = tl.dot(tl.trans(XX), B, S, input_precision=PRECISION)
        else:
            S = tl.dot(tl.trans(B), XX, S, input_precision=PRECISION)
        if FITTED:
            S *= tl.exp2(X_spare)
        if STORE_STATES and not REVERSE:
            if edge:
                tl.store(checkpoint, S)

    if out is None:
        # What this split makes of an empty state, to where the next one starts from.
        tl.store(
            checkpoints
            + (first_checkpoint + next_checkpoint) * stride_checkpoint
            + first_x * STRIDE_CHECKPOINT_X
            + entry,
            S,
        )
    if final is not None:
        if (low == 0) if REVERSE else (high == chunks):
            last = final + n.to(tl.int64) * stride_fn + head * stride_fh
            if first_a is not None:
                last += first_a * stride_fa
            if TRANSPOSED:
                last += columns[:, None] * stride_fx + lanes[None, :] * stride_fa
            else:
                last += lanes[:, None] * stride_fa + columns[None, :] * stride_fx
            tl.store(last, S, mask=inside)


#   split_decay  (splits, H) fp32    the product of the decays of each split
#   state        (N, H, A, X) fp32   the state before the first split, or None
#   cu_seqlens   (N + 1,) i64        offsets of packed sequences, or None
#   checkpoints  as in _scan_kernel; updated: in, what each split makes of an empty state, where the
#                next one starts; out, the state there
#   stride_..    of state by n, head, a, x
#   T, H, checkpoints_per_head, split_len, stride_checkpoint, first_a, A, X, CHECKPOINT_EVERY,
#   STRIDE_CHECKPOINT_A, REVERSE, AT_SEQUENCE_END   as in _scan_kernel
#   BLOCK        entries of the state of a program
@triton.jit(do_not_specialize=["T", "H", "chunks_per_head", "checkpoints_per_head", "split_len"])
def _join_splits_kernel(
    split_decay,
    state,
    cu_seqlens,
    checkpoints,
    stride_sn,
    stride_sh,
    stride_sa,
    stride_sx,
    T,
    H,
    checkpoints_per_head,
    split_len,
    stride_checkpoint,
    first_a,
    A,
    X,
    CHECKPOINT_EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE_CHECKPOINT_A: tl.constexpr,
    REVERSE: tl.constexpr,
    AT_SEQUENCE_END: tl.constexpr,
):
    """From what each split of a sequence makes of an empty state to the state at its end (its
    start in reverse), in place."""
    PACKED: tl.constexpr = cu_seqlens is not None
    n = tl.program_id(0) // H
    head = (tl.program_id(0) % H).to(tl.int64)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    bh = head if PACKED else batch * H + head
    first_checkpoint = bh * checkpoints_per_head + first_checkpoint_index(
        n, start, CHECKPOINT_EVERY, PACKED, AT_SEQUENCE_END
    )
    splits = ((length + split_len - 1) // split_len).to(tl.int32)
    each = tl.maximum((T + split_len - 1) // split_len, 1)
    first = first_index(n, start, split_len, PACKED) if PACKED else n.to(tl.int64) * each
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane, column = entry // X, entry % X
    inside = entry < A * X
    S = tl.zeros([BLOCK], tl.float32)
    if first_a is not None:
        checkpoints += first_a * STRIDE_CHECKPOINT_A
    if state is not None:
        first_at = n.to(tl.int64) * stride_sn + head * stride_sh
        first_at += lane * stride_sa + column * stride_sx
        if first_a is not None:
            first_at += first_a * stride_sa
        S = tl.load(state + first_at, mask=inside, other=0.0)
    for step in range(0, splits - 1):
        split = (splits - 1 - step) if REVERSE else step
        end = (split if REVERSE else split + 1) * (split_len // CHECKPOINT_EVERY) - 1
        at = (
            checkpoints
            + (first_checkpoint + end) * stride_checkpoint
            + lane * STRIDE_CHECKPOINT_A
            + column
        )
        decay_of_split = tl.load(split_decay + (first + split) * H + head)
        S = scaled(S, decay_of_split) + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, S, mask=inside)
