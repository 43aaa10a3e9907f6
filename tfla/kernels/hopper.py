"""The scan on Hopper's own instructions: the body of scan.py with every step placed by hand. 16-bit
operands, and fp32 in parts.

    copies     of the next one or two chunks run while this one is worked on
    products   the scores beside the state's share of the output and, of states up to 128 wide,
               beside its update; wider ones are updated while the output is stored. Where
               that is not slower, so are the scores of the next chunk
    the state  as (X, A), in the registers that the next product takes it from

An fp32 number is split into bf16 parts where it arrives (parts.py): three of them are its 24 bits,
and of the nine products of two numbers six count; two are 16 bits, where TF32 is allowed, and three
products count: 1 / 60 to 1 / 230 of the error of TF32, which wants every operand along its
contraction.

The compiler's own pipeline sends for copies at the end of an iteration and waits for each product
where it stands; the tensor cores then rest two thirds of the time.
"""

# mypy: disable-error-code="union-attr,assignment,index"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from tfla.kernels import hopper_parts as part
from tfla.kernels.gates import FIRST_SOURCE, VECTORS
from tfla.kernels.layout import (
    chunks_of_split,
    effective_chunks,
    first_places,
    is_past_the_end,
    place_of,
)

_rows = tma.make_tensor_descriptor


# The arguments are those of scan.py's table, the transposed form with descriptors, but for:
#
#   n_in         (BH, chunks_per_head, A) fp32   n before each chunk, where the scan of h makes the
#                denominator: weights then lack it, and their last vector is its floor exp(-m)
#   weights_with_den   (BH, chunks_per_head, 8, L) fp32   written: the vectors with it, for backward
#   dot          (tiles, BH, chunks_per_head, L) fp32   written: out . y, or with OF_X x . y
#
#   STAGES       chunks whose tiles are in shared memory or on their way
#   PARTS        bf16 numbers that one of fp32 is split into: 2 or 3; 1 for 16-bit operands
#
# What happens to chunk c, | being a barrier. One or two parts, the state in one half:
#
#   copies    c + 1 and c + 2 .........................................................
#   tensor    share of S, scores of c, update of S | X P of c      scores of c + 1
#   threads   exponents; P * D to shared memory    | den           | O to shared memory, to out
#
# The scores of c + 1 are there where PREFETCH_SCORES; the update stands beside the output where
# there are no registers for it (UPDATE_WITH_SCORES). fp32 tiles are split before all of this, with
# a barrier for each.
#
# Three parts, one stage, a product is two sums (hopper_parts.product_24), a state two halves:
#
#   copies                                                                           c + 1 ...
#   tensor    scores, share of S_1   share of S_2 | X P  update of S_1 ..... update of S_2 |
#   threads   exponents; P * D to shared memory   | x edge  | O to where x lay | to out    |
@gluon.jit(do_not_specialize=["T", "H", "chunks_per_head", "checkpoints_per_head", "split_len"])
def _scan_hopper_kernel(
    a,
    b,
    x,
    y,
    partial,
    weights,
    decay,
    d,
    vector,
    n_in,
    state,
    cu_seqlens,
    table,
    checkpoints,
    final,
    out,
    dot,
    split_decay,
    weights_with_den,
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
    OF_X: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """See above."""
    WHOLE: gl.constexpr = out is not None
    ROW: gl.constexpr = FIRST_SOURCE if REVERSE else 0
    COL: gl.constexpr = 0 if REVERSE else FIRST_SOURCE
    WARPS: gl.constexpr = BLOCK_X // 16
    GROUPS: gl.constexpr = WARPS // 4
    given: gl.constexpr = x.dtype.element_ty
    SPLIT_FP32: gl.constexpr = PARTS > 1
    THREE_PARTS: gl.constexpr = PARTS == 3
    dtype: gl.constexpr = gl.bfloat16 if SPLIT_FP32 else given  # of products
    PRODUCTS: gl.constexpr = 3 if SPLIT_FP32 else 1  # of them for one
    COPIES: gl.constexpr = max(STAGES - 1, 1)  # chunks ahead; of one stage, once it is free
    COPIED: gl.constexpr = out is not None and out.dtype.element_ty == given
    # y comes by copy; where two fp32 stages leave no room for it, threads read it as it is needed.
    Y_COPIED: gl.constexpr = y is not None and not SPLIT_FP32
    Y_READ: gl.constexpr = y is not None and SPLIT_FP32

    # Products: scores (source, target) or (target, source), output (X, target), state (X, A).
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, L // GROUPS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, L, 16])
    # A state of 256 rows comes in two halves: with one accumulator of 256 rows ptxas serialises the
    # products. With three parts one of 128 rows does, for sums beside it to find registers.
    HALF: gl.constexpr = min(BLOCK_A, 64 if THREE_PARTS else 128)
    HALVES: gl.constexpr = BLOCK_A // HALF
    # The update of the state runs beside the scores, where registers are left for it; else while
    # the output is stored.
    UPDATE_WITH_SCORES: gl.constexpr = HALVES == 1 and not SPLIT_FP32
    # Which way round the scores lie: beside a state of two halves the assembler has registers left
    # with the one (dk 0.76 against 0.94 ms); sums over sources, for nu, want the other.
    SOURCE_FIRST: gl.constexpr = HALVES == 2 or (SPLIT_FP32 and n_in is None)
    # Row products (n . q, dh . h) are made where registers are left: beside a state of two halves
    # at the end, of fp32 beside the last product; else before it, and where T is not split, what
    # they and the exponents are made of is loaded before the copies.
    ROW_PRODUCTS: gl.constexpr = n_in is not None or OF_X
    gl.static_assert(n_in is None or HALVES == 1, "of states of two halves nu is made elsewhere")
    LOAD_EARLY: gl.constexpr = ROW_PRODUCTS and UPDATE_WITH_SCORES and not SPLIT_T and WARPS > 4
    # The scores of a chunk are made at the end of the one before, where that is not slower (1, for
    # the waits); else, with a column, after the state's share.
    PREFETCH_IS_FASTER: gl.constexpr = (
        BLOCK_A == 128 or partial is not None or (REVERSE and vector is not None)
    )
    PREFETCHES: gl.constexpr = WHOLE and WARPS > 4 and PREFETCH_IS_FASTER and not SPLIT_FP32
    PREFETCH_SCORES: gl.constexpr = 1 if PREFETCHES else 0
    STATE_FIRST: gl.constexpr = SPLIT_FP32 or (vector is not None and not PREFETCH_SCORES)
    TARGETS: gl.constexpr = gl.SliceLayout(0 if SOURCE_FIRST else 1, SCORES)
    SOURCES: gl.constexpr = gl.SliceLayout(1 if SOURCE_FIRST else 0, SCORES)
    QUERIES: gl.constexpr = SOURCES if REVERSE else TARGETS
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    # Neither reads of fp32 nor stores of bf16 meet in a bank.
    FP32_ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    VECTORS_BY_WARP: gl.constexpr = gl.BlockedLayout([GROUPS, 2], [1, 32], [1, WARPS], [1, 0])
    VECTOR: gl.constexpr = gl.SliceLayout(0, VECTORS_BY_WARP)  # of a chunk: in every warp
    SOURCE: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    A_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([L, BLOCK_A], given)
    X_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([L, BLOCK_X], given)
    P_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([L, L], dtype)
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    V_LINES: gl.constexpr = VECTORS * L // part.LINE
    WIDE_A: gl.constexpr = max(BLOCK_A, 32)  # copies arrive at multiples of 128 bytes
    BY_WARP: gl.constexpr = gl.BlockedLayout([WARPS, 2], [1, 32], [1, WARPS], [1, 0])
    ROW_MAJOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # Which chunks of which sequence are this program's.
    place = place_of(cu_seqlens, table, T, H, X, split_len, L, BLOCK_X, SPLIT_T)
    tile, tiles, head = place.tile, place.tiles, place.head
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
    # What comes by copies, and the shared memory for all of it.
    first_x = tile * BLOCK_X
    tokens = gl.maximum(length, 1).to(gl.int32)  # 0 is no size, though nothing is read
    lines = gl.maximum(chunks, 1)
    if first_a is not None:
        b += first_a
        if WHOLE:
            a += first_a
    b += batch * stride_bb + start * stride_bt + head // R * stride_bh
    x += batch * stride_xb + start * stride_xt + head // R_X * stride_xh
    b_rows = _rows(b, [tokens, A], [stride_bt, 1], [L, BLOCK_A], A_TILE)
    x_rows = _rows(x, [tokens, X], [stride_xt, 1], [L, BLOCK_X], X_TILE)
    b_in = part.channel(b_rows, 0, STAGES, PARTS)
    x_in = part.channel(x_rows, first_x, STAGES, PARTS)
    weights += first_chunk * VECTORS * L
    v_rows = _rows(
        weights, [lines * V_LINES, part.LINE], [part.LINE, 1], [V_LINES, part.LINE], LINES
    )
    v_in = part.channel(v_rows, 0, STAGES)
    channels = b_in, v_in, x_in
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if WHOLE:
        a += batch * stride_ab + start * stride_at + head // R * stride_ah
        a_rows = _rows(a, [tokens, A], [stride_at, 1], [L, BLOCK_A], A_TILE)
        a_in = part.channel(a_rows, 0, STAGES, PARTS)
        channels = b_in, a_in, v_in, x_in
        out_at = ((batch * T + start) * H + head) * X
        p_s = (gl.allocate_shared_memory(dtype, [L, L], P_TILE),)
        for _ in gl.static_range(PARTS - 1):
            p_s += (gl.allocate_shared_memory(dtype, [L, L], P_TILE),)
        if COPIED:
            each = H.to(gl.int64) * X
            out_rows = _rows(out + out_at, [tokens, X], [each, 1], [L, BLOCK_X], X_TILE)
            if not SPLIT_FP32:
                out_s = gl.allocate_shared_memory(dtype, [L, BLOCK_X], X_TILE)
        y_in = None
        if y is not None:
            y += batch * stride_yb + start * stride_yt + head // R_X * stride_yh
        if Y_COPIED:
            y_rows = _rows(y, [tokens, X], [stride_yt, 1], [L, BLOCK_X], X_TILE)
            y_in = part.channel(y_rows, first_x, STAGES)
            if not OF_X:
                dot_s = gl.allocate_shared_memory(gl.float32, [WARPS, L], ROW_MAJOR)
        if vector is not None:
            d_in = part.channel(
                _rows(d + first_chunk * L, [lines, L], [L, 1], [1, L], LINES), 0, STAGES
            )
            vector += first_chunk * X
            vector_rows = _rows(vector, [lines, X], [X, 1], [1, BLOCK_X], LINES)
            vector_in = part.channel(vector_rows, first_x, STAGES)
            channels += (d_in, vector_in)
        if n_in is not None:
            n_in += first_chunk * A
            n_in = part.channel(_rows(n_in, [lines, A], [A, 1], [1, WIDE_A], LINES), 0, STAGES)
            channels += (n_in,)
            n_q_s = gl.allocate_shared_memory(gl.float32, [L], part.FLAT)
            sums_s = gl.allocate_shared_memory(gl.float32, [GROUPS, L], ROW_MAJOR)
        channels += (y_in,) if Y_COPIED else ()
    for bar in gl.static_range(STAGES):
        mbarrier.init(ready.index(bar), count=1)
    fence_async_shared()
    part.barrier()
    for chunk in gl.static_range(COPIES):
        early = (high - 1 - chunk) if REVERSE else (low + chunk)
        part.fetch(channels, ready, early, chunk, low + chunk < high, STAGES)
    # The state, (X, A). Entries of checkpoints lie at constant strides.
    columns = first_x + gl.arange(0, BLOCK_X, layout=gl.SliceLayout(1, STATE))
    lanes = gl.arange(0, HALF, layout=gl.SliceLayout(0, STATE))
    SECOND: gl.constexpr = HALF * STRIDE_CHECKPOINT_A
    entry = (columns - first_x)[:, None] * STRIDE_CHECKPOINT_X + lanes[
        None, :
    ] * STRIDE_CHECKPOINT_A
    if checkpoints is not None:
        checkpoints += first_checkpoint * stride_checkpoint + first_x * STRIDE_CHECKPOINT_X
        if first_a is not None:
            checkpoints += first_a * STRIDE_CHECKPOINT_A
    S = gl.zeros([BLOCK_X, HALF], gl.float32, layout=STATE)
    S_2 = S
    if WHOLE and state is not None:
        at_first = (high == chunks) if REVERSE else (low == 0)
        # The other splits start from a checkpoint.
        rows = gl.where(at_first, A, 0) if SPLIT_T else A
        state += n.to(gl.int64) * stride_sn + head * stride_sh
        if first_a is not None:
            state += first_a * stride_sa
        first_at = state + columns[:, None] * stride_sx + lanes[None, :] * stride_sa
        second = HALF * stride_sa
        S, S_2 = part.load_state(first_at, second, rows, columns, lanes, X, HALF, HALVES)
    if WHOLE and SPLIT_T:
        if (high < chunks) if REVERSE else (low > 0):
            before = (
                checkpoints
                + ((high if REVERSE else low) * L // CHECKPOINT_EVERY - 1) * stride_checkpoint
                + entry
            )
            S, S_2 = part.load_state(before, SECOND, A, columns, lanes, X, HALF, HALVES)
    next_decay = gl.load(decay + first_chunk + (gl.maximum(high - 1, low) if REVERSE else low))
    target = gl.expand_dims(gl.arange(0, L, layout=TARGETS), TARGETS.dim)
    source = gl.expand_dims(gl.arange(0, L, layout=SOURCES), SOURCES.dim)
    causal = (target <= source) if REVERSE else (target >= source)
    if PREFETCH_SCORES:
        mbarrier.wait(ready.index(0), 0, pred=low < high)
        P = part.scores(a_in, b_in, 0, L, SCORES, SOURCE_FIRST)
    for step in range(0, high - low):
        c = (high - 1 - step) if REVERSE else (low + step)
        # Of a constant stage the compiler keeps a hundred addresses on the stack.
        stage = (step >> 30) if THREE_PARTS else step % STAGES
        chunk_decay = next_decay
        following = gl.maximum(c - 1, low) if REVERSE else gl.minimum(c + 1, high - 1)
        next_decay = gl.load(decay + first_chunk + following)
        B, XX = part.tile(b_in, stage), part.tile(x_in, stage)
        vectors = part.flat(v_in, stage, VECTORS * L)
        col_edge = vectors.slice((COL + 2) * L, L)
        if STORE_STATES:
            if part.is_at_checkpoint(
                c, low, high, chunks, L, CHECKPOINT_EVERY, REVERSE, AT_SEQUENCE_END
            ):
                checkpoint = (c if REVERSE else c - 1) * L // CHECKPOINT_EVERY
                part.store_state(
                    checkpoints + checkpoint * stride_checkpoint + entry, S, S_2, HALVES, SECOND
                )
        if not PREFETCH_SCORES:
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if SPLIT_FP32:
            part.split(b_in, stage, FP32_ROWS)
            part.split(x_in, stage, FP32_ROWS)
            if WHOLE:
                part.split(a_in, stage, FP32_ROWS)
            fence_async_shared()
            part.barrier()
        # Three parts: scores and the state's share, the output.
        if WHOLE and THREE_PARTS:
            AA = part.tile(a_in, stage)
            P_0 = gl.zeros([L, L], gl.float32, layout=SCORES)
            P_low, P_main = part.product_24(B, part.turned(AA), P_0, P_0, False)
            O_0 = gl.zeros([BLOCK_X, L], gl.float32, layout=OUTPUT)
            S_1 = part.operands(S, AA, OPERAND)
            A_1 = part.turned(part.columns(AA, 0, HALF))
            O_low, O_main = part.product_24(S_1, A_1, O_0, O_0, False)
            exponents = part.exponents_of(vectors, ROW, COL, L, TARGETS, SOURCES)
            row_whole, row_rest, col_whole, col_rest = exponents
            D = gl.exp2(row_whole + col_whole) * gl.exp2(row_rest + col_rest)
            P_low, P_main = warpgroup_mma_wait(6, [P_low, P_main])
            P = part.total_24(P_low, P_main)
            if vector is not None:
                d_now = part.flat(d_in, stage, L)
                P += gl.expand_dims(d_now.load(QUERIES), QUERIES.dim)
            # What weighs nothing is 0, also where the product has overflowed.
            part.store_parts(p_s, gl.where(causal & (D != 0.0), P * D, 0.0))
            O_low, O_main = warpgroup_mma_wait(0, [O_low, O_main])
            if HALVES == 2:
                S_1 = part.operands(S_2, AA, OPERAND)
                A_2 = part.turned(part.columns(AA, HALF, HALF))
                O_low, O_main = part.product_24(S_1, A_2, O_low, O_main, True)
                O_low, O_main = warpgroup_mma_wait(0, [O_low, O_main])
            O = part.total_24(O_low, O_main)
            row_edge = vectors.slice((ROW + 2) * L, L).load(gl.SliceLayout(0, OUTPUT))
            if vector is not None:
                row_vector = part.flat(vector_in, stage, BLOCK_X).load(gl.SliceLayout(1, OUTPUT))
                O = part.add_column(O, row_vector, d_now, REVERSE, OUTPUT)
            O = part.scaled(O, row_edge[None, :])
            fence_async_shared()
            part.barrier()
            O_low, O_main = part.product_24(part.turned(XX), p_s, O_0, O_0, False)
            if Y_READ:  # beside the last product
                Y = part.rows_at(y, c * L, stride_yt, length, first_x, X, L, BLOCK_X, ROWS)
                if OF_X:
                    part.store_products(
                        dot + tile * size + (first_chunk + c) * L, part.load(XX, ROWS), Y
                    )
            O_low, O_main = warpgroup_mma_wait(0, [O_low, O_main])
            O += part.total_24(O_low, O_main)
        # One or two: scores and the state's share are issued.
        elif WHOLE:
            AA = part.tile(a_in, stage)
            A_1 = part.columns(AA, 0, HALF)
            O = gl.zeros([BLOCK_X, L], gl.float32, layout=OUTPUT)
            if STATE_FIRST:
                O = part.state_share(S, A_1, O, False, OPERAND)
            if not PREFETCH_SCORES:
                P = part.scores(a_in, b_in, stage, L, SCORES, SOURCE_FIRST)
            if not STATE_FIRST:
                O = part.state_share(S, A_1, O, False, OPERAND)
            if LOAD_EARLY:
                one, other = part.row_factors(AA, n_in, XX, y_in, stage, BLOCK_A, WIDE_A, ROWS)
                exponents = part.exponents_of(vectors, ROW, COL, L, TARGETS, SOURCES)
        # The stage of the chunk before has been free since the last iteration's end; where its
        # output went out from there, once it has gone.
        if SPLIT_FP32 and not THREE_PARTS:
            tma.store_wait(0)
            part.barrier()
        ahead = (c - COPIES) if REVERSE else (c + COPIES)
        wanted = (ahead >= low) if REVERSE else (ahead < high)
        if not THREE_PARTS:
            part.fetch(channels, ready, ahead, step + COPIES, wanted, STAGES)
        if UPDATE_WITH_SCORES:
            S, S_2 = part.updated(S, S_2, XX, B, col_edge, chunk_decay, HALF, HALVES, SOURCE)
        if WHOLE and not THREE_PARTS:
            if ROW_PRODUCTS and UPDATE_WITH_SCORES:
                if not LOAD_EARLY:
                    one, other = part.row_factors(AA, n_in, XX, y_in, stage, BLOCK_A, WIDE_A, ROWS)
                if OF_X:
                    part.store_products(dot + tile * size + (first_chunk + c) * L, one, other)
                else:
                    n_q_s.store(part.products(one, other))
            if not LOAD_EARLY:
                exponents = part.exponents_of(vectors, ROW, COL, L, TARGETS, SOURCES)
            # Weights of the scores, to shared memory for the last product.
            row_whole, row_rest, col_whole, col_rest = exponents
            D = gl.exp2((row_whole + col_whole) + (row_rest + col_rest))
            # Two programs a multiprocessor overlap by themselves, and the assembler of CUDA 12.8
            # crashes on one of their variants if more is asked for.
            if WARPS == 4:
                P, O = warpgroup_mma_wait(0, [P, O])
            elif STATE_FIRST:
                P, O = warpgroup_mma_wait(PRODUCTS if UPDATE_WITH_SCORES else 0, [P, O])
            else:
                P = warpgroup_mma_wait(2 * PRODUCTS if UPDATE_WITH_SCORES else PRODUCTS, [P])
            if vector is not None:
                d_now = part.flat(d_in, stage, L)
                P += gl.expand_dims(d_now.load(QUERIES), QUERIES.dim)
            P = gl.where(causal, P * D, 0.0)
            part.store_parts(p_s, P)
            fence_async_shared()
            if WARPS > 4 and not STATE_FIRST:
                O = warpgroup_mma_wait(PRODUCTS if UPDATE_WITH_SCORES else 0, [O])
            if HALVES == 2:
                A_2 = part.columns(AA, HALF, HALF)
                O = part.state_share(S_2, A_2, O, True, OPERAND)
            row_edge = vectors.slice((ROW + 2) * L, L).load(gl.SliceLayout(0, OUTPUT))
            if HALVES == 2:
                O = warpgroup_mma_wait(0, [O])
            if vector is not None:
                row_vector = part.flat(vector_in, stage, BLOCK_X).load(gl.SliceLayout(1, OUTPUT))
                O = part.add_column(O, row_vector, d_now, REVERSE, OUTPUT)
            O *= row_edge[None, :]
            tma.store_wait(0)
            part.barrier()
            P_low = p_s if SOURCE_FIRST else part.turned(p_s)
            O = part.product(part.turned(XX), P_low, O, True)
            # Beside the last product.
            if Y_READ:
                Y = part.rows_at(y, c * L, stride_yt, length, first_x, X, L, BLOCK_X, ROWS)
                if OF_X:
                    part.store_products(
                        dot + tile * size + (first_chunk + c) * L, part.load(XX, ROWS), Y
                    )
            if n_in is not None:
                if SPLIT_FP32:
                    one, other = part.row_factors(AA, n_in, XX, y_in, stage, BLOCK_A, WIDE_A, ROWS)
                    n_q_s.store(part.products(one, other))
                sums_s.permute((1, 0)).store(gl.sum(P.reshape([L, GROUPS, L // GROUPS]), 2))
                part.barrier()
        # The update of the state, where it did not stand beside the scores.
        if THREE_PARTS:
            X_low = part.weighted(XX, B, col_edge, SOURCE)
            S_0 = gl.zeros([BLOCK_X, HALF], gl.float32, layout=STATE)
            B_1 = part.columns(B, 0, HALF)
            S_low, S_main = part.product_24(X_low, B_1, S_0, S_0, False)
        elif not UPDATE_WITH_SCORES:
            S, S_2 = part.updated(S, S_2, XX, B, col_edge, chunk_decay, HALF, HALVES, SOURCE)
        if PREFETCH_SCORES:
            then = step + 1
            mbarrier.wait(ready.index(then % STAGES), (then // STAGES) & 1, pred=then < high - low)
            P = part.scores(a_in, b_in, then % STAGES, L, SCORES, SOURCE_FIRST)
        if n_in is not None:
            sign, factor = part.over_den(vectors, n_q_s, sums_s, L, VECTOR)
        # The output on its way out.
        if WHOLE:
            UNDER_WAY: gl.constexpr = 0 if UPDATE_WITH_SCORES else HALVES * PRODUCTS
            if not THREE_PARTS:
                O = warpgroup_mma_wait(PREFETCH_SCORES + UNDER_WAY, [O])
            if n_in is not None:
                O *= gl.convert_layout(factor, gl.SliceLayout(0, OUTPUT))[None, :]
                if weights_with_den is not None:
                    if tile == gl.minimum(c % 2, tiles - 1):
                        part.store_weights_with_den(
                            weights_with_den, vectors, sign, factor, first_chunk + c, L, VECTOR
                        )
            if (partial is not None) or not COPIED:
                o_x = first_x + gl.arange(0, BLOCK_X, layout=gl.SliceLayout(1, OUTPUT))
                o_t = c * L + gl.arange(0, L, layout=gl.SliceLayout(0, OUTPUT))
                token = out_at + o_x[:, None] + o_t.to(gl.int64)[None, :] * (H * X)
                seen = (o_x < X)[:, None] & (o_t < length)[None, :]
                if partial is not None:
                    O += gl.load(partial + token, mask=seen, other=0.0)
            if COPIED:
                if SPLIT_FP32:  # where x lay, once all have read it
                    out_s = x_in[1].index(stage)
                    part.barrier()
                out_s.permute((1, 0)).store(O.to(given))
                fence_async_shared()
                part.barrier()
                part.store_rows(out_rows, [c * L, first_x], out_s)
                if Y_READ and not OF_X:
                    part.store_products(
                        dot + tile * size + (first_chunk + c) * L, out_s.load(ROWS), Y
                    )
            else:
                gl.store(out + token, O, mask=seen)
            if OF_X and HALVES == 2 and not Y_READ:
                one, other = part.row_factors(AA, n_in, XX, y_in, stage, BLOCK_A, WIDE_A, ROWS)
                part.store_products(dot + tile * size + (first_chunk + c) * L, one, other)
            if Y_COPIED and not OF_X:
                Y = y_in[1].index(stage).permute((1, 0)).load(OUTPUT)
                dot_s.store(gl.sum((O * Y.to(gl.float32)).reshape([WARPS, 16, L]), 1))
        # The state after the chunk.
        if THREE_PARTS:
            S_low, S_main = warpgroup_mma_wait(0, [S_low, S_main])
            S = part.scaled(S, chunk_decay) + part.total_24(S_low, S_main)
            if HALVES == 2:
                B_2 = part.columns(B, HALF, HALF)
                S_low, S_main = part.product_24(X_low, B_2, S_0, S_0, False)
                S_low, S_main = warpgroup_mma_wait(0, [S_low, S_main])
                S_2 = part.scaled(S_2, chunk_decay) + part.total_24(S_low, S_main)
            tma.store_wait(0)
        elif HALVES == 2:
            S, S_2 = warpgroup_mma_wait(PREFETCH_SCORES, [S, S_2])
        else:
            S = warpgroup_mma_wait(PREFETCH_SCORES, [S])
        part.barrier()
        if THREE_PARTS:
            part.fetch(channels, ready, ahead, step + COPIES, wanted, STAGES)
        if WHOLE and Y_COPIED and not OF_X:
            o_l = gl.arange(0, L, layout=gl.SliceLayout(0, BY_WARP))
            gl.store(
                dot + tile * size + (first_chunk + c) * L + o_l, gl.sum(dot_s.load(BY_WARP), 0)
            )
    if PREFETCH_SCORES:
        P = warpgroup_mma_wait(0, [P])
    if WHOLE:
        tma.store_wait(0)
        if STORE_STATES and AT_SEQUENCE_END and not REVERSE:
            if (high == chunks) & (low < high):
                checkpoint = (chunks - 1) * L // CHECKPOINT_EVERY
                part.store_state(
                    checkpoints + checkpoint * stride_checkpoint + entry, S, S_2, HALVES, SECOND
                )
    else:
        # What this split makes of an empty state, to where the next one starts from.
        part.store_state(
            checkpoints + next_checkpoint * stride_checkpoint + entry, S, S_2, HALVES, SECOND
        )
    if final is not None:
        if (low == 0) if REVERSE else (high == chunks):
            last = final + n.to(gl.int64) * stride_fn + head * stride_fh
            if first_a is not None:
                last += first_a * stride_fa
            last += columns[:, None] * stride_fx + lanes[None, :] * stride_fa
            second = HALF * stride_fa
            part.store_final(last, second, S, S_2, A, columns, lanes, X, HALF, HALVES)
