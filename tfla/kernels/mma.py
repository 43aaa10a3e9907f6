"""The scan on mma.sync, for Ampere, Ada and consumer Blackwell: the algorithm of scan.py in its
transposed form, with every layout chosen by hand. 16-bit operands, and fp32: a number is split
where it arrives into three bf16 (24 bits), of which six products count, or where TF32 is allowed
into two (16 bits), of which three do.

What a chunk of L tokens takes, in the order of the loop; | is a barrier:

    | copies of the next chunk begin, and of y for this one
      P = (B A^T) * D          (source, target), to shared memory
      O = (S A^T) * edge       (X, target), the state from registers
    | O = O + X^T P            what P is to all warps lies in shared memory now
      O to shared memory, S = decay S + (X edge)^T B
    | O to global memory, by whole rows

Each warp owns rows of S, (X, A): the accumulator of the state's update is, register for register,
the left operand of the product that reads the state, so the state never passes through shared
memory. The compiler's own pipeline of scan.py with the same shape took 1.28 ms for h where this one
takes 0.85 (compiled for 8.0, run on an H200: 4 x 16,384 tokens, 16 heads 128/256).
"""

# mypy: disable-error-code="union-attr,assignment,index"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from tfla.kernels import parts
from tfla.kernels.gates import FIRST_SOURCE, VECTORS
from tfla.kernels.layout import (
    chunks_of_split,
    effective_chunks,
    first_places,
    is_past_the_end,
    place_of,
)

# The same function under the names of Triton 3.6 and of later ones.
_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SLICE = gl.constexpr(32)  # columns of the state in one product: few operands in registers at once


@gluon.constexpr_function
def _per_copy(dtype):
    """Numbers in 16 bytes, what a thread copies at once."""
    return 128 // dtype.primitive_bitwidth


@gluon.constexpr_function
def _tile_layout(width, dtype):
    """Rows of ``width`` numbers in shared memory, in pieces of 16 bytes that eight rows have at
    different places: ldmatrix reads them without a conflict of banks."""
    each = 128 // dtype.primitive_bitwidth
    return gl.SwizzledSharedLayout(
        each, max(1, 8 * each // width), max(1, min(8, width // each)), [1, 0]
    )


@gluon.constexpr_function
def _rows_layout(width, dtype, warps):
    """Rows of ``width`` numbers over threads that hold 16 bytes each."""
    each = 128 // dtype.primitive_bitwidth
    lanes = min(32, width // each)
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _rows_at(
    x, stride, t, tokens, first, width, L: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr
):
    """(pointers to rows from token t and columns from ``first``, which of them exist). Rows begin
    at multiples of 16 bytes, which the compiler is told: it does not see it in ``stride``."""
    LAYOUT: gl.constexpr = _rows_layout(BLOCK, x.dtype.element_ty, WARPS)
    PER_COPY: gl.constexpr = _per_copy(x.dtype.element_ty)
    l = gl.arange(0, L, layout=gl.SliceLayout(1, LAYOUT))
    column = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
    at = x + t.to(gl.int64) * stride + (l * stride)[:, None] + column[None, :]
    seen = (l < tokens - t)[:, None] & (column < width // PER_COPY * PER_COPY)[None, :]
    return gl.multiple_of(at, [1, 16]), seen


@gluon.jit
def _tile(tiles, third, stage):
    """A tile as products take it: itself, or of fp32 what ``_split`` makes of it, a tile for each
    part of its numbers: two in its place, and those of ``third``, one or none."""
    whole = tiles.index(stage)
    if whole.dtype != gl.float32:
        return (whole,)
    else:
        LAYOUT: gl.constexpr = _tile_layout(whole.shape[1], gl.bfloat16)
        both = parts.view(whole, gl.bfloat16, [2, whole.shape[0], whole.shape[1]], LAYOUT)
        return (both.index(0), both.index(1)) + third


@gluon.jit
def _whole_rows(tile, WARPS: gl.constexpr):
    LAYOUT: gl.constexpr = _rows_layout(tile.shape[1], tile.dtype, WARPS)
    return tile.load(LAYOUT)


@gluon.jit
def _split(rows, stage, WARPS: gl.constexpr):
    """Of fp32 tiles, those of their parts."""
    values = ()
    for n in gl.static_range(len(rows)):
        values += (_whole_rows(rows[n][4].index(stage), WARPS),)
    parts.barrier()
    for n in gl.static_range(len(rows)):
        parts.store_parts(_tile(rows[n][4], rows[n][5], stage), values[n])
    parts.barrier()


@gluon.jit
def _product(one, other, total):
    """total + one other; of two or three parts each without the products of the least ones. See
    ``parts.total_24`` for three."""
    if len(one) == 3:
        zero = gl.zeros_like(total)
        lesser = mma_v2(one[2], other[0], zero)
        lesser = mma_v2(one[0], other[2], lesser)
        lesser = mma_v2(one[1], other[1], lesser)
        lesser = mma_v2(one[1], other[0], lesser)
        lesser = mma_v2(one[0], other[1], lesser)
        return total + parts.total_24(lesser, mma_v2(one[0], other[0], zero))
    else:
        total = mma_v2(one[0], other[0], total)
        if len(one) == 2:
            total = mma_v2(one[0], other[1], total)
            total = mma_v2(one[1], other[0], total)
        return total


@gluon.jit
def _loaded(tiles, LAYOUT: gl.constexpr):
    return [each.load(LAYOUT) for each in tiles]


@gluon.jit
def _fetch_rows(tile, x, stride, t, tokens, first, width, WARPS: gl.constexpr):
    """Begin to copy a tile: rows from token t, columns from ``first``, zeros past the end."""
    L: gl.constexpr = tile.shape[0]
    BLOCK: gl.constexpr = tile.shape[1]
    at, seen = _rows_at(x, stride, t, tokens, first, width, L, BLOCK, WARPS)
    _load(tile, at, mask=seen)


@gluon.jit
def _fetch_line(line, x, width, WARPS: gl.constexpr):
    """Begin to copy fp32 numbers, of which ``width`` exist."""
    SIZE: gl.constexpr = line.shape[0]
    PER_COPY: gl.constexpr = max(1, min(4, SIZE // (32 * WARPS)))
    column = gl.arange(0, SIZE, layout=gl.BlockedLayout([PER_COPY], [32], [WARPS], [0]))
    _load(line, x + column, mask=column < width)


@gluon.jit
def _fetch_chunk(rows, lines, c, stage, tokens, wanted, WARPS: gl.constexpr):
    """Begin to copy what chunk c takes, in one group of copies. rows: (pointer, stride, first
    column, width, tiles, place of the third part). lines: (pointer, numbers a chunk, tiles)."""
    if wanted:
        for n in gl.static_range(len(rows)):
            x, stride, first, width, tiles, _ = rows[n]
            _fetch_rows(
                tiles.index(stage), x, stride, c * tiles.shape[1], tokens, first, width, WARPS
            )
        for n in gl.static_range(len(lines)):
            x, first, size, tiles = lines[n]
            _fetch_line(tiles.index(stage), x + c.to(gl.int64) * size + first, size - first, WARPS)
    async_copy.commit_group()


@gluon.jit
def _store_state(at, S, STRIDE_CHECKPOINT_A: gl.constexpr):
    for n in gl.static_range(len(S)):
        gl.store(at + n * S[n].shape[1] * STRIDE_CHECKPOINT_A, S[n])


# The arguments are those of scan.py's table, the transposed form, but for:
#
#   STAGES       chunks whose tiles are in shared memory or on their way
#   Y_AHEAD      copy y with the tiles of its chunk, a chunk ahead: where there is shared memory
#   WARPS        of the program
#   PARTS        bf16 numbers that one of fp32 is split into: 2 or 3; 1 for 16-bit operands
#
# Rows of all operands are of 16 bytes. The order of a chunk stands at the top of this file.
@gluon.jit(do_not_specialize=["T", "H", "chunks_per_head", "checkpoints_per_head", "split_len"])
def _scan_mma_kernel(
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
    L: gl.constexpr,
    BLOCK_A: gl.constexpr,
    BLOCK_X: gl.constexpr,
    CHECKPOINT_EVERY: gl.constexpr,
    STRIDE_CHECKPOINT_A: gl.constexpr,
    STRIDE_CHECKPOINT_X: gl.constexpr,
    REVERSE: gl.constexpr,
    SPLIT_T: gl.constexpr,
    STORE_STATES: gl.constexpr,
    AT_SEQUENCE_END: gl.constexpr,
    STAGES: gl.constexpr,
    Y_AHEAD: gl.constexpr,
    WARPS: gl.constexpr,
    PARTS: gl.constexpr,
):
    """See above."""
    WHOLE: gl.constexpr = out is not None
    ROW: gl.constexpr = FIRST_SOURCE if REVERSE else 0
    COL: gl.constexpr = 0 if REVERSE else FIRST_SOURCE
    given: gl.constexpr = x.dtype.element_ty
    SPLIT_FP32: gl.constexpr = PARTS > 1
    dtype: gl.constexpr = gl.bfloat16 if SPLIT_FP32 else given  # of products
    COPIED: gl.constexpr = WHOLE and out.dtype.element_ty == given
    PIECE: gl.constexpr = min(SLICE, BLOCK_A)
    PIECES: gl.constexpr = BLOCK_A // PIECE
    # Chunks between checkpoints: the loop over them has no branch, which costs h of 256/512 a
    # quarter of its time.
    CHUNKS_PER_CHECKPOINT: gl.constexpr = CHECKPOINT_EVERY // L

    SCORES: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, WARPS // 2], [16, 8])
    STATE: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])  # and the output
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, STATE, 2)
    TARGETS: gl.constexpr = gl.SliceLayout(0, SCORES)
    SOURCES: gl.constexpr = gl.SliceLayout(1, SCORES)
    OF_OUTPUT: gl.constexpr = gl.SliceLayout(0, STATE)  # targets of the output

    # Sums over X: a row of them from each warp, added up when all have stored theirs.
    ROUND: gl.constexpr = 16 * WARPS
    BY_WARP: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    ROW_MAJOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    A_TILE: gl.constexpr = _tile_layout(BLOCK_A, given)
    X_TILE: gl.constexpr = _tile_layout(BLOCK_X, given)
    Y_STAGES: gl.constexpr = STAGES if Y_AHEAD else 1
    place = place_of(cu_seqlens, table, T, H, X, split_len, L, BLOCK_X, SPLIT_T)
    tile, head = place.tile, place.head
    n, batch, start, length = place.n, place.batch, place.start, place.length
    chunks, low, high = place.chunks, 0, place.chunks
    if SPLIT_T:
        if is_past_the_end(place, split_len, L):
            return
        low, high = chunks_of_split(place, split_len, L)
        if not WHOLE:  # nothing starts from what the last split leaves
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
    size = size.to(gl.int64)
    if split_decay is not None:
        next_checkpoint = (low if REVERSE else high) * L // CHECKPOINT_EVERY - 1
        low, high, decay_of_split = effective_chunks(decay + first_chunk, low, high, REVERSE)
        gl.store(split_decay + place.split * H + head, decay_of_split)
    first_x = tile * BLOCK_X
    tokens = length.to(gl.int32)
    decay += first_chunk
    if first_a is not None:
        b += first_a
        if WHOLE:
            a += first_a
    b += batch * stride_bb + start * stride_bt + head // R * stride_bh
    x += batch * stride_xb + start * stride_xt + head // R_X * stride_xh
    b_s = gl.allocate_shared_memory(given, [STAGES, L, BLOCK_A], A_TILE)
    x_s = gl.allocate_shared_memory(given, [STAGES, L, BLOCK_X], X_TILE)
    v_s = gl.allocate_shared_memory(gl.float32, [STAGES, VECTORS * L], FLAT)
    b_third, x_third = (), ()
    if PARTS == 3:  # of the chunk that is worked on
        b_third = (gl.allocate_shared_memory(dtype, [L, BLOCK_A], _tile_layout(BLOCK_A, dtype)),)
        x_third = (gl.allocate_shared_memory(dtype, [L, BLOCK_X], _tile_layout(BLOCK_X, dtype)),)
    rows = (b, stride_bt, 0, A, b_s, b_third), (x, stride_xt, first_x, X, x_s, x_third)
    lines = ((weights + first_chunk * (VECTORS * L), 0, VECTORS * L, v_s),)
    if WHOLE:
        a += batch * stride_ab + start * stride_at + head // R * stride_ah
        a_s = gl.allocate_shared_memory(given, [STAGES, L, BLOCK_A], A_TILE)
        a_third = ()
        if PARTS == 3:
            layout: gl.constexpr = _tile_layout(BLOCK_A, dtype)
            a_third = (gl.allocate_shared_memory(dtype, [L, BLOCK_A], layout),)
        rows += ((a, stride_at, 0, A, a_s, a_third),)
        p_all = gl.allocate_shared_memory(dtype, [PARTS, L, L], _tile_layout(L, dtype))
        p_s = ()
        for n_part in gl.static_range(PARTS):
            p_s += (p_all.index(n_part),)
        out += ((batch * T + start) * H + head) * X
        if partial is not None:
            partial += ((batch * T + start) * H + head) * X
        if y is not None:
            y += batch * stride_yb + start * stride_yt + head // R_X * stride_yh
            y_s = gl.allocate_shared_memory(given, [Y_STAGES, L, BLOCK_X], X_TILE)
            dot_s = gl.allocate_shared_memory(gl.float32, [WARPS, L], ROW_MAJOR)
            dot += tile * size + first_chunk * L
        if vector is not None:
            d_s = gl.allocate_shared_memory(gl.float32, [STAGES, L], FLAT)
            vector_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_X], FLAT)
            lines += (
                (d + first_chunk * L, 0, L, d_s),
                (vector + first_chunk * X, first_x, X, vector_s),
            )
    fetched = rows
    if WHOLE and y is not None and Y_AHEAD:
        fetched += ((y, stride_yt, first_x, X, y_s, ()),)
    for early in gl.static_range(STAGES - 1):
        c = (high - 1 - early) if REVERSE else (low + early)
        _fetch_chunk(fetched, lines, c, early, tokens, low + early < high, WARPS)

    # The state, in pieces of A. Entries of checkpoints lie at constant strides.
    columns = first_x + gl.arange(0, BLOCK_X, layout=gl.SliceLayout(1, STATE))
    lanes = gl.arange(0, PIECE, layout=gl.SliceLayout(0, STATE))
    entry = (columns - first_x)[:, None] * STRIDE_CHECKPOINT_X + lanes[
        None, :
    ] * STRIDE_CHECKPOINT_A
    if checkpoints is not None:
        checkpoints += first_checkpoint * stride_checkpoint + first_x * STRIDE_CHECKPOINT_X
        if first_a is not None:
            checkpoints += first_a * STRIDE_CHECKPOINT_A
    if WHOLE and state is not None and first_a is not None:
        state += first_a * stride_sa
    S = ()
    for piece in gl.static_range(PIECES):
        lane = lanes + piece * PIECE
        S_piece = gl.zeros([BLOCK_X, PIECE], gl.float32, layout=STATE)
        if WHOLE and state is not None:
            known = A
            if SPLIT_T:  # the splits after the first start from a checkpoint
                known = gl.where((high == chunks) if REVERSE else (low == 0), A, 0)
            first = state + n.to(gl.int64) * stride_sn + head * stride_sh
            first += columns[:, None] * stride_sx + lane[None, :] * stride_sa
            valid = (columns < X)[:, None] & (lane < known)[None, :]
            S_piece = gl.load(first, mask=valid, other=0.0)
        if WHOLE and SPLIT_T:
            if (high < chunks) if REVERSE else (low > 0):
                before = (
                    checkpoints
                    + ((high if REVERSE else low) * L // CHECKPOINT_EVERY - 1) * stride_checkpoint
                    + entry
                )
                valid = (columns < X)[:, None] & (lane < A)[None, :]
                before += piece * PIECE * STRIDE_CHECKPOINT_A
                S_piece = gl.load(before, mask=valid, other=0.0).to(gl.float32)
        S += (S_piece,)

    next_decay = gl.load(decay + (gl.maximum(high - 1, low) if REVERSE else low))
    step = 0
    first_interval = low // CHUNKS_PER_CHECKPOINT if STORE_STATES else 0
    intervals = 1
    if STORE_STATES:
        intervals = (high + CHUNKS_PER_CHECKPOINT - 1) // CHUNKS_PER_CHECKPOINT - first_interval
    for nth in range(0, intervals):
        begin, end = low, high
        if STORE_STATES:
            # The state before these chunks, unless this program started from it.
            this = first_interval + (intervals - 1 - nth if REVERSE else nth)
            begin = this * CHUNKS_PER_CHECKPOINT
            end = gl.minimum((this + 1) * CHUNKS_PER_CHECKPOINT, high)
            if REVERSE:
                wanted = end < high
                if AT_SEQUENCE_END:
                    wanted |= end == chunks
                checkpoint = this
            else:
                wanted = begin > low
                checkpoint = this - 1
            if wanted:
                _store_state(
                    checkpoints + checkpoint * stride_checkpoint + entry, S, STRIDE_CHECKPOINT_A
                )
        for inner in range(0, end - begin):
            c = (end - 1 - inner) if REVERSE else (begin + inner)
            stage = step % STAGES
            chunk_decay = next_decay
            following = gl.maximum(c - 1, low) if REVERSE else gl.minimum(c + 1, high - 1)
            next_decay = gl.load(decay + following)
            async_copy.wait_group(STAGES - 2)
            parts.barrier()
            if y is not None and not Y_AHEAD:
                _fetch_rows(y_s.index(0), y, stride_yt, c * L, tokens, first_x, X, WARPS)
                async_copy.commit_group()
            ahead = (c - (STAGES - 1)) if REVERSE else (c + STAGES - 1)
            more = (ahead >= low) if REVERSE else (ahead < high)
            to = (step + STAGES - 1) % STAGES
            _fetch_chunk(fetched, lines, ahead, to, tokens, more, WARPS)
            step += 1

            vectors = v_s.index(stage)
            if SPLIT_FP32:
                _split(rows, stage, WARPS)
            B, XX = _tile(b_s, b_third, stage), _tile(x_s, x_third, stage)
            X_left = _loaded(parts.turned(XX), LEFT)
            if WHOLE:
                AA = _tile(a_s, a_third, stage)
                P = gl.zeros([L, L], gl.float32, layout=SCORES)
                for piece in gl.static_range(PIECES):
                    B_rows = parts.columns(B, piece * PIECE, PIECE)
                    A_columns = parts.turned(parts.columns(AA, piece * PIECE, PIECE))
                    P = _product(
                        _loaded(B_rows, gl.DotOperandLayout(0, SCORES, 2)),
                        _loaded(A_columns, gl.DotOperandLayout(1, SCORES, 2)),
                        P,
                    )
                exponent = vectors.slice(ROW * L, L).load(TARGETS)[None, :]
                exponent += vectors.slice(COL * L, L).load(SOURCES)[:, None]
                rest = vectors.slice((ROW + 1) * L, L).load(TARGETS)[None, :]
                rest += vectors.slice((COL + 1) * L, L).load(SOURCES)[:, None]
                if PARTS == 3:
                    D = gl.exp2(exponent) * gl.exp2(rest)
                else:
                    D = gl.exp2(exponent + rest)
                target = gl.arange(0, L, layout=TARGETS)[None, :]
                source = gl.arange(0, L, layout=SOURCES)[:, None]
                causal = (target <= source) if REVERSE else (target >= source)
                if vector is not None:
                    d_now = d_s.index(stage)
                    if REVERSE:
                        P += d_now.load(SOURCES)[:, None]
                    else:
                        P += d_now.load(TARGETS)[None, :]
                # What weighs nothing is 0, also where the product has overflowed.
                parts.store_parts(p_s, gl.where(causal & (D != 0.0), P * D, 0.0))
                token = c * L + gl.arange(0, L, layout=OF_OUTPUT)
                if partial is not None or not COPIED:
                    at_out = token.to(gl.int64)[None, :] * (H * X) + columns[:, None]
                    there = (columns < X)[:, None] & (token < tokens)[None, :]
                O = gl.zeros([BLOCK_X, L], gl.float32, layout=STATE)
                for piece in gl.static_range(PIECES):
                    S_parts = parts.parts_of(S[piece], AA)
                    S_left = [gl.convert_layout(each, LEFT) for each in S_parts]
                    A_columns = parts.turned(parts.columns(AA, piece * PIECE, PIECE))
                    O = _product(S_left, _loaded(A_columns, RIGHT), O)
                if vector is not None:  # n d^T for dq, dn 1^T for dk, weighted as the state is
                    row_vector = vector_s.index(stage).load(gl.SliceLayout(1, STATE))[:, None]
                    if REVERSE:
                        O += row_vector
                    else:
                        O += row_vector * d_now.load(OF_OUTPUT)[None, :]
                O = parts.scaled(O, vectors.slice((ROW + 2) * L, L).load(OF_OUTPUT)[None, :])
                if partial is not None:  # on its way while the other warps arrive
                    more_O = gl.load(partial + at_out, mask=there, other=0.0)
                if y is not None and not Y_AHEAD:
                    async_copy.wait_group(1)
                parts.barrier()
                O = _product(X_left, _loaded(p_s, RIGHT), O)
                if partial is not None:
                    O += more_O
                if y is not None:
                    Y = y_s.index(stage if Y_AHEAD else 0).permute((1, 0))
                    if SPLIT_FP32:
                        Y = Y.load(STATE)
                    else:  # by ldmatrix; the accumulator has its numbers in the same places
                        Y = gl.convert_layout(Y.load(LEFT), STATE)
                    by_warp = (O * Y.to(gl.float32)).reshape([BLOCK_X // ROUND, WARPS, 16, L])
                    dot_s.store(gl.sum(gl.sum(by_warp, 2), 0))
                if COPIED:  # where x lay: all warps have read it
                    out_s = x_s.index(stage)
                    out_s.permute((1, 0)).store(O.to(given))
                else:
                    gl.store(out + at_out, O, mask=there)
            col_edge = vectors.slice((COL + 2) * L, L).load(gl.SliceLayout(0, LEFT))
            X_value = X_left[0].to(gl.float32)
            for n_part in gl.static_range(1, PARTS):
                X_value += X_left[n_part].to(gl.float32)
            X_left = parts.parts_of(parts.scaled(X_value, col_edge[None, :]), B)
            updated = ()
            for piece in gl.static_range(PIECES):
                B_right = _loaded(parts.columns(B, piece * PIECE, PIECE), RIGHT)
                updated += (_product(X_left, B_right, parts.scaled(S[piece], chunk_decay)),)
            S = updated
            if COPIED:
                parts.barrier()
                at, seen = _rows_at(out, H * X, c * L, tokens, first_x, X, L, BLOCK_X, WARPS)
                gl.store(at, _whole_rows(out_s, WARPS), mask=seen)
                if y is not None:
                    l = gl.arange(0, L, layout=gl.SliceLayout(0, BY_WARP))
                    gl.store(dot + c * L + l, gl.sum(dot_s.load(BY_WARP), 0))

    if WHOLE:
        if STORE_STATES and AT_SEQUENCE_END and not REVERSE:
            if (high == chunks) & (low < high):
                checkpoint = (chunks - 1) * L // CHECKPOINT_EVERY
                _store_state(
                    checkpoints + checkpoint * stride_checkpoint + entry, S, STRIDE_CHECKPOINT_A
                )
    else:
        # What this split makes of an empty state, to where the next one starts from.
        _store_state(
            checkpoints + next_checkpoint * stride_checkpoint + entry, S, STRIDE_CHECKPOINT_A
        )
    if final is not None:
        if (low == 0) if REVERSE else (high == chunks):
            last = final + n.to(gl.int64) * stride_fn + head * stride_fh
            if first_a is not None:
                last += first_a * stride_fa
            last += columns[:, None] * stride_fx + lanes[None, :] * stride_fa
            for piece in gl.static_range(PIECES):
                inside = (columns < X)[:, None] & (lanes + piece * PIECE < A)[None, :]
                gl.store(last + piece * PIECE * stride_fa, S[piece], mask=inside)
