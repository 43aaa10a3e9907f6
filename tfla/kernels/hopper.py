"""The scan on Hopper's own instructions, for 16-bit operands, and for fp32 where TF32 is allowed:
the body of scan.py with every step placed by hand.

    copies     of the next one or two chunks run while this one is worked on
    products   the scores beside the state's share of the output and, of states up to 128 wide,
               beside its update; wider ones are updated while the output is stored. Where
               that is not slower, so are the scores of the next chunk
    the state  as (X, A), in the registers that the next product takes it from

An fp32 number is split into two bf16 where it arrives, 16 bits in all, and a product is three of
theirs: 1 / 60 to 1 / 230 of the error of TF32, which wants every operand along its contraction.

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
    effective_chunks,
    first_checkpoint_index,
    first_index,
    interval,
    sequence,
)

_rows = tma.make_tensor_descriptor


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
):
    """See ``tfla.kernels.scan``; descriptors and the transposed form throughout. OF_X: x . y."""
    PACKED: gl.constexpr = cu_seqlens is not None
    WHOLE: gl.constexpr = out is not None
    ROW: gl.constexpr = FIRST_SOURCE if REVERSE else 0
    COL: gl.constexpr = 0 if REVERSE else FIRST_SOURCE
    WARPS: gl.constexpr = BLOCK_X // 16
    GROUPS: gl.constexpr = WARPS // 4
    given: gl.constexpr = x.dtype.element_ty
    SPLIT_FP32: gl.constexpr = given == gl.float32
    dtype: gl.constexpr = gl.bfloat16 if SPLIT_FP32 else given  # of products
    PRODUCTS: gl.constexpr = 3 if SPLIT_FP32 else 1  # of them for one
    COPIED: gl.constexpr = out is not None and out.dtype.element_ty == given
    # y comes by copy; where two fp32 stages leave no room for it, threads read it as it is needed.
    Y_COPIED: gl.constexpr = y is not None and not SPLIT_FP32
    Y_READ: gl.constexpr = y is not None and SPLIT_FP32

    # Products: scores (source, target) or (target, source), output (X, target), state (X, A).
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, L // GROUPS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, L, 16])
    # A state of 256 rows comes in two halves: with one accumulator of 256 rows ptxas serialises the
    # products.
    HALF: gl.constexpr = min(BLOCK_A, 128)
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
    tiles = (X + BLOCK_X - 1) // BLOCK_X
    tile = gl.program_id(0) % tiles
    head = ((gl.program_id(0) // tiles) % H).to(gl.int64)
    size = size.to(gl.int64)
    w = (gl.program_id(0) // tiles // H).to(gl.int64)
    n, j = w, 0
    if SPLIT_T:
        n, j = interval(w, cu_seqlens, table, T, split_len, PACKED)
    batch, start, length = sequence(n, cu_seqlens, T, PACKED)
    bh = head if PACKED else batch * H + head
    chunks = ((length + L - 1) // L).to(gl.int32)
    low, high = 0, chunks
    if SPLIT_T:
        if (j > 0) & (j >= (chunks * L + split_len - 1) // split_len):
            return
        low = (j * (split_len // L)).to(gl.int32)
        high = gl.minimum(chunks, (low + split_len // L).to(gl.int32))
        if not WHOLE:  # nothing starts from what the last split leaves
            if (low == 0) if REVERSE else (high == chunks):
                return
    first_chunk = bh * chunks_per_head + first_index(n, start, L, PACKED)
    first_checkpoint = bh * checkpoints_per_head + first_checkpoint_index(
        n, start, CHECKPOINT_EVERY, PACKED, AT_SEQUENCE_END
    )
    if split_decay is not None:
        next_checkpoint = (low if REVERSE else high) * L // CHECKPOINT_EVERY - 1
        low, high, decay_of_split = effective_chunks(decay + first_chunk, low, high, REVERSE)
        gl.store(split_decay + w * H + head, decay_of_split)
    first_x = tile * BLOCK_X
    tokens = gl.maximum(length, 1).to(gl.int32)  # 0 is no size, though nothing is read
    lines = gl.maximum(chunks, 1)
    if first_a is not None:
        b += first_a
        if WHOLE:
            a += first_a
    b += batch * stride_bb + start * stride_bt + head * stride_bh
    x += batch * stride_xb + start * stride_xt + head * stride_xh
    b_rows = _rows(b, [tokens, A], [stride_bt, 1], [L, BLOCK_A], A_TILE)
    x_rows = _rows(x, [tokens, X], [stride_xt, 1], [L, BLOCK_X], X_TILE)
    b_in, x_in = part.channel(b_rows, 0, STAGES), part.channel(x_rows, first_x, STAGES)
    weights += first_chunk * VECTORS * L
    v_rows = _rows(
        weights, [lines * V_LINES, part.LINE], [part.LINE, 1], [V_LINES, part.LINE], LINES
    )
    v_in = part.channel(v_rows, 0, STAGES)
    channels = b_in, v_in, x_in
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if WHOLE:
        a += batch * stride_ab + start * stride_at + head * stride_ah
        a_in = part.channel(_rows(a, [tokens, A], [stride_at, 1], [L, BLOCK_A], A_TILE), 0, STAGES)
        channels = b_in, a_in, v_in, x_in
        out_at = ((batch * T + start) * H + head) * X
        p_s = (gl.allocate_shared_memory(dtype, [L, L], P_TILE),)
        if SPLIT_FP32:
            p_s += (gl.allocate_shared_memory(dtype, [L, L], P_TILE),)
        if COPIED:
            each = H.to(gl.int64) * X
            out_rows = _rows(out + out_at, [tokens, X], [each, 1], [L, BLOCK_X], X_TILE)
            if not SPLIT_FP32:
                out_s = gl.allocate_shared_memory(dtype, [L, BLOCK_X], X_TILE)
        y_in = None
        if y is not None:
            y += batch * stride_yb + start * stride_yt + head * stride_yh
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
    for chunk in gl.static_range(STAGES - 1):
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
        valid = (columns < X)[:, None] & (lanes < rows)[None, :]
        S = gl.load(first_at, mask=valid, other=0.0)
        if HALVES == 2:
            valid = (columns < X)[:, None] & (lanes + HALF < rows)[None, :]
            S_2 = gl.load(first_at + HALF * stride_sa, mask=valid, other=0.0)
    if WHOLE and SPLIT_T:
        if (high < chunks) if REVERSE else (low > 0):
            before = (
                checkpoints
                + ((high if REVERSE else low) * L // CHECKPOINT_EVERY - 1) * stride_checkpoint
                + entry
            )
            S = gl.load(before, mask=(columns < X)[:, None] & (lanes < A)[None, :], other=0.0)
            if HALVES == 2:
                valid = (columns < X)[:, None] & (lanes + HALF < A)[None, :]
                S_2 = gl.load(before + SECOND, mask=valid, other=0.0)
    next_decay = gl.load(decay + first_chunk + (gl.maximum(high - 1, low) if REVERSE else low))
    target = gl.expand_dims(gl.arange(0, L, layout=TARGETS), TARGETS.dim)
    source = gl.expand_dims(gl.arange(0, L, layout=SOURCES), SOURCES.dim)
    causal = (target <= source) if REVERSE else (target >= source)
    if PREFETCH_SCORES:
        mbarrier.wait(ready.index(0), 0, pred=low < high)
        P = part.scores(a_in, b_in, 0, L, SCORES, SOURCE_FIRST)
    for step in range(0, high - low):
        c = (high - 1 - step) if REVERSE else (low + step)
        stage = step % STAGES
        chunk_decay = next_decay
        following = gl.maximum(c - 1, low) if REVERSE else gl.minimum(c + 1, high - 1)
        next_decay = gl.load(decay + first_chunk + following)
        B, XX = part.tile(b_in, stage), part.tile(x_in, stage)
        vectors = part.flat(v_in, stage, VECTORS * L)
        col_edge = vectors.slice((COL + 2) * L, L)
        if STORE_STATES:
            # The state before the chunk, unless this split started from it.
            if REVERSE:
                edge = ((c + 1) * L % CHECKPOINT_EVERY == 0) & (c + 1 < high)
                if AT_SEQUENCE_END:
                    edge |= c + 1 == chunks
            else:
                edge = (c * L % CHECKPOINT_EVERY == 0) & (c > low)
            if edge:
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
        if WHOLE:
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
        if SPLIT_FP32:
            tma.store_wait(0)
            part.barrier()
        ahead = (c - (STAGES - 1)) if REVERSE else (c + STAGES - 1)
        wanted = (ahead >= low) if REVERSE else (ahead < high)
        part.fetch(channels, ready, ahead, step + STAGES - 1, wanted, STAGES)
        if UPDATE_WITH_SCORES:
            S, S_2 = part.updated(S, S_2, XX, B, col_edge, chunk_decay, HALF, HALVES, SOURCE)
        if WHOLE:
            if ROW_PRODUCTS and UPDATE_WITH_SCORES:
                if not LOAD_EARLY:
                    one, other = part.row_factors(AA, n_in, XX, y_in, stage, BLOCK_A, WIDE_A, ROWS)
                if OF_X:
                    part.store_products(dot + tile * size + (first_chunk + c) * L, one, other)
                else:
                    n_q_s.store(part.products(one, other))
            if not LOAD_EARLY:
                exponents = part.exponents_of(vectors, ROW, COL, L, TARGETS, SOURCES)
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
                QUERIES: gl.constexpr = SOURCES if REVERSE else TARGETS
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
            if vector is not None:  # n d^T for dq, dn 1^T for dk, weighted as the state is
                row_vector = part.flat(vector_in, stage, BLOCK_X).load(gl.SliceLayout(1, OUTPUT))
                if REVERSE:
                    O += row_vector[:, None]
                else:
                    O += row_vector[:, None] * d_now.load(gl.SliceLayout(0, OUTPUT))[None, :]
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
        if not UPDATE_WITH_SCORES:
            S, S_2 = part.updated(S, S_2, XX, B, col_edge, chunk_decay, HALF, HALVES, SOURCE)
        if PREFETCH_SCORES:
            then = step + 1
            mbarrier.wait(ready.index(then % STAGES), (then // STAGES) & 1, pred=then < high - low)
            P = part.scores(a_in, b_in, then % STAGES, L, SCORES, SOURCE_FIRST)
        if n_in is not None:
            sign, factor = part.over_den(vectors, n_q_s, sums_s, L, VECTOR)
        if WHOLE:
            UNDER_WAY: gl.constexpr = 0 if UPDATE_WITH_SCORES else HALVES * PRODUCTS
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
            if OF_X and HALVES == 2:
                one, other = part.row_factors(AA, n_in, XX, y_in, stage, BLOCK_A, WIDE_A, ROWS)
                part.store_products(dot + tile * size + (first_chunk + c) * L, one, other)
            if Y_COPIED and not OF_X:
                Y = y_in[1].index(stage).permute((1, 0)).load(OUTPUT)
                dot_s.store(gl.sum((O * Y.to(gl.float32)).reshape([WARPS, 16, L]), 1))
        if HALVES == 2:
            S, S_2 = warpgroup_mma_wait(PREFETCH_SCORES, [S, S_2])
        else:
            S = warpgroup_mma_wait(PREFETCH_SCORES, [S])
        part.barrier()
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
            gl.store(last, S, mask=(columns < X)[:, None] & (lanes < A)[None, :])
            if HALVES == 2:
                inside = (columns < X)[:, None] & (lanes + HALF < A)[None, :]
                gl.store(last + HALF * stride_fa, S_2, mask=inside)
