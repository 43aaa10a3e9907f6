"""The backend "triton": launches of the kernels in this folder, with the functions of
``tfla.backend``.

One call allocates everything it needs and never asks the device for a value. Files: layout.py
(where things lie), gates.py (exponents, gate gradients), normalizer.py, scan.py (the scan),
hopper.py with hopper_parts.py (the scan for Hopper), pointwise.py (for models),
step.py (decode), grid.py (the plan of a call, its buffers), host.py (launches, tapes of them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tfla.backend import Results, ScanName
from tfla.kernels import gates, host, normalizer
from tfla.kernels.grid import (
    GateWeights,
    _geometry,
    _new,
    _split,
    clear,
    offsets,
    padded,
    plan_of,
    rows_of,
    tables,
)
from tfla.kernels.host import launch
from tfla.kernels.layout import _joined_kernel
from tfla.kernels.scan import _join_kernel, _scan_kernel
from tfla.kernels.step import update
from tfla.plan import Tile
from tfla.spec import CallSpec, Inputs

__all__ = [
    "FOLDS_PACKING",
    "clear",
    "execute",
    "fold_packing",
    "gate_gradients",
    "gate_weights",
    "initial_gradients",
    "initial_state_decay",
    "normalizer_grad",
    "offsets",
    "saved",
    "saved_shape",
    "scan",
    "update",
    "with_final_grad",
]

FOLDS_PACKING = True  # then as fast whatever their number and lengths


def execute(function: Callable[..., Results], spec: CallSpec, tensors: tuple[Any, ...]) -> Results:
    """See ``tfla.kernels.host``. Plans that are pinned have tapes of their own, launches that are
    watched have none."""
    if launch is not host.launch:
        return function(spec, *tensors)
    return host.recorded(function, spec, tensors, plan_of)


def saved_shape(spec: CallSpec, at_ends: bool) -> tuple[int, ...]:
    """The shape that ``saved`` will have."""
    return (sum(map(padded, _geometry(spec, plan_of(spec), at_ends)[-1])),)


def saved(weights: GateWeights) -> Tensor:
    """What the backward pass needs of the forward's weights."""
    return weights.buffer


def fold_packing(f: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The forget gates of packed sequences as of one, in fp32, and the (2,) offsets of that one.
    See ``tfla.algorithm``."""
    _, T, H = f.shape
    out = _new(f, 1, T, H)
    ends = torch.empty(2, dtype=torch.int64, device=f.device)
    launch(
        _joined_kernel,
        (max(triton.cdiv(T, 64), 1),),
        (4, 1),
        (f, cu_seqlens, out, ends),
        T,
        cu_seqlens.shape[0] - 1,
        H,
        *f.stride()[1:],
        BLOCK=64,
        BLOCK_H=16,
    )
    return out, ends


def gate_weights(
    x: Inputs, spec: CallSpec, at_ends: bool, saved: Tensor | None = None
) -> GateWeights:
    """The weights of every chunk, the denominator folded into the target side; see
    ``tfla.reference.gate_weights``."""
    T, H, K, N, i, f, cu_seqlens = spec.T, spec.H, spec.K, spec.N, x.i, x.f, x.cu_seqlens
    normalize, keep, scale = spec.normalize, spec.needs_grad, spec.scale
    q, k = rows_of(x.q), rows_of(x.k)
    n, m = (None if t is None else t.contiguous() for t in (x.n, x.m))
    plan = plan_of(spec)
    rows, slots, spans, sizes = _geometry(spec, plan, at_ends)
    buffer = q.new_empty(sum(map(padded, sizes)), dtype=torch.float32) if saved is None else saved
    vectors, decay, kept, *rest = _split(buffer, sizes)
    n_chunk, n_final, m_final = (
        (rest[0], rest[1].view(N, H, K), rest[2].view(N, H)) if normalize else (None, None, None)
    )
    C_ends = kept.view(rows, spans, *plan.kept) if keep else None
    dC_ends = None if saved is None or C_ends is None else torch.empty_like(C_ends)
    # fp16 would lose what is small beside a gauge and not beside a denominator.
    undivided = None
    if normalize and plan.divides and q.dtype != torch.float16 and saved is None:
        undivided = torch.empty_like(vectors) if keep else vectors
    weights = GateWeights(
        spec,
        plan,
        cu_seqlens,
        tables(cu_seqlens, T, plan),
        rows,
        slots,
        spans,
        buffer,
        vectors,
        undivided,
        decay,
        C_ends,
        dC_ends,
        n_chunk,
        n_final,
        m_final,
        at_ends,
    )
    if saved is not None:
        return weights
    chunk_table, packed = weights.tables[0], cu_seqlens is not None
    gates_at = *i.stride(), *f.stride()
    log_i = gates.form_of(spec.input_gate).log_i
    forms = {"LOG_I": log_i, "SIGMOID_F": spec.sigmoid_f, "PACKED": packed}
    if not normalize:
        launch(
            gates._weights_kernel,
            (weights.chunks(),),
            (plan.gate_warps, 2),
            (i, f, cu_seqlens, chunk_table, vectors, decay),
            *gates_at,
            *weights.common(),
            scale,
            L=plan.L,
            **forms,
        )
        return weights
    sums = _new(q, weights.chunks() * K)
    chunk_f, chunk_p = (q.new_empty(weights.chunks(), dtype=torch.float64) for _ in range(2))
    gauge = None if undivided is not None else torch.empty_like(chunk_f)
    made = vectors if undivided is None else undivided
    launch(
        normalizer._sums_kernel,
        (weights.chunks(),),
        (plan.gate_warps, 2),
        (k, i, f, cu_seqlens, chunk_table, sums, chunk_f, chunk_p, made),
        *k.stride()[:3],
        *gates_at,
        *weights.common(),
        K,
        L=plan.L,
        BLOCK_K=plan.block_k,
        **forms,
    )
    launch(
        normalizer._gauge_kernel,
        (N * H, triton.cdiv(K, plan.block_n)),
        (4, 2),
        (cu_seqlens, sums, chunk_f, chunk_p, n, m, gauge, made, decay, n_chunk, n_final, m_final),
        *weights.common(),
        K,
        scale,
        L=plan.L,
        BLOCK=plan.block_c,
        BLOCK_K=plan.block_n,
        HAS_N=n is not None,
        HAS_M=m is not None,
        PACKED=packed,
    )
    if gauge is not None:
        # den may be next to 0: where TF32 is allowed, three of its products in place of one.
        products = "ieee" if spec.precision == "ieee" else "tf32x3"
        launch(
            normalizer._denominator_kernel,
            (weights.chunks(),),
            (plan.small_warps, 2),
            (q, k, cu_seqlens, chunk_table, gauge, m_final, n_chunk, chunk_f, chunk_p, made),
            *q.stride()[:3],
            *k.stride()[:3],
            *weights.common(),
            K,
            scale,
            L=plan.L,
            BLOCK_K=plan.block_k,
            PACKED=packed,
            PRECISION=products,
        )
    return weights


class NormalizerGrad(NamedTuple):
    """The normaliser's share of the backward pass."""

    d: Tensor  # (rows, slots, L)
    sums: Tensor  # (rows, slots, K) of each chunk, for dn
    dn_chunk: Tensor | None = None  # (rows, slots, K) dn at the end of each chunk
    dn_first: Tensor | None = None  # (N, H, K)


def normalizer_grad(
    dh: Tensor, h: Tensor, q: Tensor, n: Tensor | None, weights: GateWeights, dv: Scan | None
) -> NormalizerGrad:
    """The column that makes the gradient of the division exact; see
    ``tfla.reference.normalizer_grad``. The scan of dv may have made dh . h."""
    K, V = weights.spec.K, weights.spec.V
    dh_h, q = None if dv is None else dv.dot, rows_of(q)
    if dh_h is None:
        dh, h = rows_of(dh), rows_of(h)
    column = NormalizerGrad(_new(q, weights.size), _new(q, weights.chunks() * K))
    launch(
        normalizer._column_kernel,
        (weights.chunks(),),
        (weights.plan.small_warps if dh_h is None else weights.plan.gate_warps, 2),
        (
            dh,
            h,
            q,
            dh_h,
            weights.cu_seqlens,
            weights.tables[0],
            weights.vectors,
            column.d,
            column.sums,
        ),
        *dh.stride()[:3],
        *h.stride()[:3],
        *q.stride()[:3],
        *weights.common(),
        weights.size,
        K,
        V,
        L=weights.plan.L,
        BLOCK_K=weights.plan.block_k,
        BLOCK_V=weights.plan.block_v,
        PARTS=0 if dh_h is None else dh_h.numel() // max(weights.size, 1),
        PACKED=weights.cu_seqlens is not None,
    )
    return column


def with_final_grad(
    column: NormalizerGrad, dn: Tensor | None, weights: GateWeights
) -> NormalizerGrad:
    """dn from the end of each sequence to its start; see ``tfla.reference.with_final_grad``."""
    N, H, K = weights.spec.N, weights.spec.H, weights.spec.K
    dn = None if dn is None else dn.contiguous()
    dn_chunk = torch.empty_like(column.sums)
    dn_first = column.d.new_empty(N, H, K)
    launch(
        normalizer._column_state_kernel,
        (N * H, triton.cdiv(K, weights.plan.block_n)),
        (4, 2),
        (weights.cu_seqlens, column.sums, weights.decay, dn, dn_chunk, dn_first),
        *weights.common(),
        K,
        L=weights.plan.L,
        BLOCK=weights.plan.block_c,
        BLOCK_K=weights.plan.block_n,
        HAS_DN=dn is not None,
        PACKED=weights.cu_seqlens is not None,
    )
    return column._replace(dn_chunk=dn_chunk, dn_first=dn_first)


def initial_state_decay(
    weights: GateWeights, column: NormalizerGrad | None, first: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the state before token 0 weighs at every token, and d; see ``tfla.reference``. Past the
    end of the sequence ``first`` (1,), which token 0 belongs to, they are any numbers."""
    B, T, H = weights.spec.B, weights.spec.T, weights.spec.H
    L, chunks = weights.plan.L, triton.cdiv(T, weights.plan.L)
    rows = weights.vectors.view(weights.rows, weights.slots, -1, L)
    parts = [rows[:, :, 2], weights.decay.view(weights.rows, weights.slots)]
    if column is not None:
        parts.append(column.d.view(weights.rows, weights.slots, L))
    if first is not None:  # its first slot is its own number: what came before it is empty
        chosen = (first + torch.arange(chunks, device=first.device)).clamp(max=weights.slots - 1)
        parts = [part.index_select(1, chosen) for part in parts]
    edge, decay, *d = parts
    before = decay.double().cumprod(1).roll(1, 1)  # along the last axis, as GPUs do it well
    before[:, :1] = 1.0

    def tokens(x: Tensor) -> Tensor:
        return x.reshape(B, H, -1)[..., :T].transpose(1, 2)

    return tokens((edge * before[..., None]).float()), tokens(d[0]) if d else None


class Scan(NamedTuple):
    """What a scan leaves behind."""

    out: Tensor  # (B, T, H, X)
    dot: Tensor | None  # (parts, rows, slots, L) shares of the row dot products
    final: Tensor | None  # (N, H, A, X)
    column: NormalizerGrad | None


def scan(
    name: ScanName,
    a: Tensor,
    b: Tensor,
    x: Tensor,
    weights: GateWeights,
    state: Tensor | None = None,
    *,
    column: NormalizerGrad | None = None,
    dot: Tensor | None = None,
    against: Scan | None = None,
    final: bool = True,
) -> Scan:
    """The primitive; see ``tfla.reference.scan``. h and dv keep their states at the ends of spans,
    dq and dk start from them.

    A wide contraction is done in pieces, each adding to the last one's output in fp32.
    """
    B, T, H = weights.spec.B, weights.spec.T, weights.spec.H
    A, X = a.shape[-1], x.shape[-1]
    tile = weights.plan.tile(name)
    # From one end of a sequence to the other, for dq and dk to follow span by span.
    walks = name in ("h", "dv")
    reverse = name in ("dk", "dv")
    a, b, x = (rows_of(t, tile.descriptor or tile.mma) for t in (a, b, x))
    if name == "dv" and not tile.hopper:
        dot = None
    y = None if dot is None else rows_of(dot, tile.hopper or tile.mma)
    out = x.new_empty(B, T, H, X)
    end = _new(x, weights.spec.N, H, A, X) if walks and final else None
    dots = None if y is None else _new(x, tile.tiles * weights.size)
    ends = weights.dC_ends if reverse else weights.C_ends
    keep = walks and ends is not None
    if ends is None and weights.plan.segment:
        ends = _new(x, weights.rows, weights.spans, *weights.plan.kept)
    walk = reverse, walks, keep
    if tile.splits == 1:
        _scan_piece(tile, a, b, x, out, None, y, dots, weights, state, end, ends, *walk, column)
    else:
        previous = None
        for start in range(0, A, tile.block_a):
            piece = slice(start, min(start + tile.block_a, A))
            last = piece.stop == A
            target = out if last else _new(x, B, T, H, X)
            kept = ends
            if ends is not None:
                kept = ends[:, :, start:] if walks else ends[..., start:]
            _scan_piece(
                tile,
                a[..., piece],
                b[..., piece],
                x,
                target,
                previous,
                y if last else None,
                dots,
                weights,
                None if state is None else state[:, :, piece],
                None if end is None else end[:, :, piece],
                kept,
                *walk,
                column if last else None,
            )
            previous = target
    return Scan(out, dots, end, column)


def _scan_piece(
    tile: Tile,
    a: Tensor,
    b: Tensor,
    x: Tensor,
    out: Tensor,
    partial: Tensor | None,
    y: Tensor | None,
    dots: Tensor | None,
    weights: GateWeights,
    state: Tensor | None,
    final: Tensor | None,
    ends: Tensor | None,
    reverse: bool,
    walks: bool,
    keep: bool,
    column: NormalizerGrad | None,
) -> None:
    """One launch of the scan; where h or dv is cut, two before it make the states that its pieces
    start from."""
    T, H, N = weights.spec.T, weights.spec.H, weights.spec.N
    A, X = a.shape[-1], x.shape[-1]
    plan = weights.plan
    packed = weights.cu_seqlens is not None
    unit = plan.segment if walks else plan.span
    cut = unit > 0 and ends is not None
    pieces = N
    if cut:
        pieces = T // unit + N if packed else N * max(triton.cdiv(T, unit), 1)
    vector = None
    if column is not None:
        vector = column.dn_chunk if reverse else weights.n_chunk
    stride_e = plan.kept[0] * plan.kept[1]
    stride_ea, stride_ex = (plan.kept[1], 1) if walks else (1, plan.kept[1])
    strides_s, strides_f = ((0, 0, 0, 0) if t is None else t.stride() for t in (state, final))

    kernel = _scan_kernel
    forms: dict[str, Any] = {
        "TRANSPOSED": tile.transposed,
        "DESCRIPTOR": tile.descriptor,
        "PRECISION": weights.spec.precision,
    }
    if tile.mma:
        from tfla.kernels.mma import _scan_mma_kernel

        kernel = _scan_mma_kernel
        forms = {"STAGES": tile.stages, "Y_AHEAD": tile.y_ahead, "WARPS": tile.warps}
    vectors = weights.vectors
    divides: tuple[Tensor | None, ...] = ()  # by what the scan of h divides, and where it notes it
    if tile.hopper:
        from tfla.kernels.hopper import _scan_hopper_kernel

        kernel = _scan_hopper_kernel
        forms = {"OF_X": walks and y is not None, "STAGES": tile.stages}
        divides = None, None
        if walks and not reverse and weights.undivided is not None:
            vectors = weights.undivided
            divides = weights.n_chunk, weights.vectors if keep else None

    def run(whole: bool, left: Tensor | None) -> None:
        tensors = (
            out,
            partial,
            y,
            dots,
            None if column is None else column.d,
            vector,
            *divides,
            state,
            final,
        )
        out_, partial_, y_, dots_, d, *rest = tensors if whole else [None] * len(tensors)
        launch(
            kernel,
            (tile.tiles * H * pieces,),
            (tile.warps, tile.stages),
            (
                a,
                b,
                x,
                out_,
                partial_,
                y_,
                dots_,
                vectors,
                weights.decay,
                d,
                *rest,
                ends,
                left,
                weights.cu_seqlens,
                weights.tables[2 if walks else 1],
            ),
            *a.stride()[:3],
            *b.stride()[:3],
            *x.stride()[:3],
            *(x if y is None else y).stride()[:3],
            *strides_s,
            *strides_f,
            *weights.common(),
            weights.spans,
            unit,
            weights.size,
            stride_e,
            A,
            X,
            L=plan.L,
            BLOCK_A=tile.block_a,
            BLOCK_X=tile.block_x,
            SPAN=plan.span,
            STRIDE_EA=stride_ea,
            STRIDE_EX=stride_ex,
            REVERSE=reverse,
            CUT=cut,
            KEEP=keep and whole,
            ENDS=weights.ends,
            **forms,
        )

    if cut and walks:
        left = torch.empty(pieces, H, dtype=torch.float32, device=x.device)
        run(False, left)
        launch(
            _join_kernel,
            (N * H, triton.cdiv(A * X, 1024)),
            (4, 2),
            (ends, left, state, weights.cu_seqlens),
            *strides_s,
            T,
            H,
            weights.spans,
            unit,
            stride_e,
            A,
            X,
            SPAN=plan.span,
            BLOCK=1024,
            STRIDE_EA=stride_ea,
            REVERSE=reverse,
            ENDS=weights.ends,
        )
    run(True, None)


def gate_gradients(
    i: Tensor, f: Tensor, dq: Scan, dk: Scan, weights: GateWeights
) -> tuple[Tensor, Tensor]:
    """(di, df), fp32; see ``tfla.reference.gate_gradients``."""
    spec = weights.spec
    B, T, H, K = spec.B, spec.T, spec.H, spec.K
    di, df = _new(weights.vectors, B, T, H), _new(weights.vectors, B, T, H)
    column = dk.column
    size = max(weights.size, 1)
    assert dq.dot is not None and dk.dot is not None
    span = weights.plan.span
    pieces = B * triton.cdiv(T, span) if weights.cu_seqlens is None else T // span + spec.N
    launch(
        gates._gradients_kernel,
        (pieces * H,),
        (8, 2),
        (
            i,
            f,
            weights.cu_seqlens,
            weights.tables[1],
            weights.vectors,
            dq.dot,
            dk.dot,
            weights.C_ends,
            weights.dC_ends,
            weights.n_chunk,
            weights.n_final,
            None if column is None else column.dn_chunk,
            di,
            df,
        ),
        *i.stride(),
        *f.stride(),
        T,
        H,
        weights.slots,
        weights.spans,
        weights.size,
        K,
        weights.plan.kept[0] * weights.plan.kept[1],
        L=weights.plan.L,
        SPAN=span,
        BLOCK_K=weights.plan.block_k,
        Q_PARTS=dq.dot.numel() // size,
        K_PARTS=dk.dot.numel() // size,
        GRADIENT_I=gates.form_of(spec.input_gate).gradient,
        SIGMOID_F=spec.sigmoid_f,
        NORMALIZE=spec.normalize,
        PACKED=weights.cu_seqlens is not None,
        ENDS=weights.ends,
    )
    return di, df


def initial_gradients(dv: Scan, dk: Scan) -> tuple[Tensor, Tensor | None]:
    """(dC_0, dn_0): what the reverse scans leave at the start of the sequences."""
    assert dv.final is not None
    return dv.final, None if dk.column is None else dk.column.dn_first
