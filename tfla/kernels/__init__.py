"""The backend "triton": launches of the kernels in this folder, with the functions that every
backend has.

One call allocates everything it needs and never asks the device for a value. Files: layout.py
(where things lie), gates.py (exponents, gate gradients), normalizer.py, scan.py (the scan),
hopper.py with hopper_parts.py (the scan for Hopper), pointwise.py (for models),
step.py (decode), grid.py (the plan of a call, its buffers), host.py (launches, tapes of them).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tfla.kernels import gates, host, normalizer
from tfla.kernels.grid import (
    Grid,
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
    "clear",
    "exponents",
    "gate_gradients",
    "initial_gradients",
    "joined",
    "normalizer_backward",
    "normalizer_carried",
    "offsets",
    "reach",
    "recorded",
    "saved",
    "saved_shape",
    "scan",
    "update",
]


def recorded(function: Any, spec: CallSpec, inputs: Any) -> Any:
    """See ``tfla.kernels.host``. Plans that are pinned have tapes of their own, launches that are
    watched have none."""
    if launch is not host.launch:
        return function(spec, *inputs)
    return host.recorded(function, spec, inputs, plan_of)


def saved_shape(spec: CallSpec, ends: bool) -> tuple[int, ...]:
    """The shape that ``saved`` will have."""
    return (sum(map(padded, _geometry(spec, plan_of(spec), ends)[-1])),)


def saved(grid: Grid) -> Tensor:
    """What the backward pass needs of the forward's grid."""
    return grid.buffer


def joined(f: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The forget gates of packed sequences as of one, in fp32, and the (2,) offsets of that one.
    See ``tfla.ops``."""
    _, T, H = f.shape
    out = _new(f, 1, T, H)
    ends = torch.empty(2, dtype=torch.int64, device=f.device)
    launch(
        _joined_kernel, (max(triton.cdiv(T, 64), 1),), (4, 1), (f, cu_seqlens, out, ends), T,
        cu_seqlens.shape[0] - 1, H, *f.stride()[1:], BLOCK=64, BLOCK_H=16,
    )  # fmt: skip
    return out, ends


def exponents(x: Inputs, spec: CallSpec, ends: bool, saved: Tensor | None = None) -> Grid:
    """The weights of every chunk, the denominator folded into the target side; see
    ``tfla.reference.exponents``."""
    T, H, K, N, i, f, cu_seqlens = spec.T, spec.H, spec.K, spec.N, x.i, x.f, x.cu_seqlens
    normalize, keep, scale = spec.normalize, spec.needs_grad, spec.scale
    q, k = rows_of(x.q), rows_of(x.k)
    n, m = (None if t is None else t.contiguous() for t in (x.n, x.m))
    plan = plan_of(spec)
    rows, slots, spans, sizes = _geometry(spec, plan, ends)
    buffer = q.new_empty(sum(map(padded, sizes)), dtype=torch.float32) if saved is None else saved
    weights, decay, kept, *rest = _split(buffer, sizes)
    n_chunk, n_final, m_final = (
        (rest[0], rest[1].view(N, H, K), rest[2].view(N, H)) if normalize else (None, None, None)
    )
    C_ends = kept.view(rows, spans, *plan.kept) if keep else None
    dC_ends = None if saved is None or C_ends is None else torch.empty_like(C_ends)
    # fp16 would lose what is small beside a gauge and not beside a denominator.
    undivided = None
    if normalize and plan.divides and q.dtype != torch.float16 and saved is None:
        undivided = torch.empty_like(weights) if keep else weights
    grid = Grid(
        spec, plan, cu_seqlens, tables(cu_seqlens, T, plan), rows, slots, spans, buffer, weights,
        undivided, decay, C_ends, dC_ends, n_chunk, n_final, m_final, ends,
    )  # fmt: skip
    if saved is not None:
        return grid
    chunk_table, packed = grid.tables[0], cu_seqlens is not None
    gates_at = *i.stride(), *f.stride()
    log_i = gates.form_of(spec.input_gate).log_i
    forms = {"LOG_I": log_i, "SIGMOID_F": spec.sigmoid_f, "PACKED": packed}
    if not normalize:
        launch(
            gates._weights_kernel, (grid.chunks(),), (plan.gate_warps, 2),
            (i, f, cu_seqlens, chunk_table, weights, decay), *gates_at, *grid.common(), scale,
            L=plan.L, **forms,
        )  # fmt: skip
        return grid
    sums = _new(q, grid.chunks() * K)
    chunk_f, chunk_p = (q.new_empty(grid.chunks(), dtype=torch.float64) for _ in range(2))
    gauge = None if undivided is not None else torch.empty_like(chunk_f)
    vectors = weights if undivided is None else undivided
    launch(
        normalizer._sums_kernel, (grid.chunks(),), (plan.gate_warps, 2),
        (k, i, f, cu_seqlens, chunk_table, sums, chunk_f, chunk_p, vectors), *k.stride()[:3],
        *gates_at, *grid.common(), K, L=plan.L, BLOCK_K=plan.block_k, **forms,
    )  # fmt: skip
    launch(
        normalizer._gauge_kernel, (N * H, triton.cdiv(K, plan.block_n)), (4, 2),
        (cu_seqlens, sums, chunk_f, chunk_p, n, m, gauge, vectors, decay, n_chunk, n_final,
         m_final), *grid.common(), K, scale, L=plan.L, BLOCK=plan.block_c, BLOCK_K=plan.block_n,
        HAS_N=n is not None, HAS_M=m is not None, PACKED=packed,
    )  # fmt: skip
    if gauge is not None:
        # den may be next to 0: where TF32 is allowed, three of its products in place of one.
        products = "ieee" if spec.precision == "ieee" else "tf32x3"
        launch(
            normalizer._denominator_kernel, (grid.chunks(),), (plan.small_warps, 2),
            (q, k, cu_seqlens, chunk_table, gauge, m_final, n_chunk, chunk_f,
             chunk_p, vectors),
            *q.stride()[:3], *k.stride()[:3], *grid.common(), K, scale, L=plan.L,
            BLOCK_K=plan.block_k, PACKED=packed, PRECISION=products,
        )  # fmt: skip
    return grid


class Column(NamedTuple):
    """The normaliser's share of the backward pass."""

    d: Tensor  # (rows, slots, L)
    sums: Tensor  # (rows, slots, K) of each chunk, for dn
    dn_chunk: Tensor | None = None  # (rows, slots, K) dn at the end of each chunk
    dn_first: Tensor | None = None  # (N, H, K)


def normalizer_backward(
    dh: Tensor, h: Tensor, q: Tensor, n: Tensor | None, grid: Grid, dv: Scan | None
) -> Column:
    """The column that makes the gradient of the division exact; see
    ``tfla.reference.normalizer_backward``. The scan of dv may have made dh . h."""
    K, V = grid.spec.K, grid.spec.V
    dh_h, q = None if dv is None else dv.dot, rows_of(q)
    if dh_h is None:
        dh, h = rows_of(dh), rows_of(h)
    column = Column(_new(q, grid.size), _new(q, grid.chunks() * K))
    launch(
        normalizer._column_kernel, (grid.chunks(),),
        (grid.plan.small_warps if dh_h is None else grid.plan.gate_warps, 2),
        (dh, h, q, dh_h, grid.cu_seqlens, grid.tables[0], grid.weights, column.d, column.sums),
        *dh.stride()[:3], *h.stride()[:3], *q.stride()[:3], *grid.common(), grid.size, K, V,
        L=grid.plan.L, BLOCK_K=grid.plan.block_k, BLOCK_V=grid.plan.block_v,
        PARTS=0 if dh_h is None else dh_h.numel() // max(grid.size, 1),
        PACKED=grid.cu_seqlens is not None,
    )  # fmt: skip
    return column


def normalizer_carried(column: Column, dn: Tensor | None, grid: Grid) -> Column:
    """dn from the end of each sequence to its start; see ``tfla.reference.normalizer_carried``."""
    N, H, K = grid.spec.N, grid.spec.H, grid.spec.K
    dn = None if dn is None else dn.contiguous()
    dn_chunk = torch.empty_like(column.sums)
    dn_first = column.d.new_empty(N, H, K)
    launch(
        normalizer._column_state_kernel, (N * H, triton.cdiv(K, grid.plan.block_n)), (4, 2),
        (grid.cu_seqlens, column.sums, grid.decay, dn, dn_chunk, dn_first), *grid.common(), K,
        L=grid.plan.L, BLOCK=grid.plan.block_c, BLOCK_K=grid.plan.block_n, HAS_DN=dn is not None,
        PACKED=grid.cu_seqlens is not None,
    )  # fmt: skip
    return column._replace(dn_chunk=dn_chunk, dn_first=dn_first)


def reach(grid: Grid, column: Column | None, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the state before token 0 weighs at every token, and d; see ``tfla.reference.reach``.
    Past the end of the sequence ``first`` (1,), which token 0 belongs to, they are any numbers."""
    B, T, H = grid.spec.B, grid.spec.T, grid.spec.H
    L, chunks = grid.plan.L, triton.cdiv(T, grid.plan.L)
    rows = grid.weights.view(grid.rows, grid.slots, -1, L)
    parts = [rows[:, :, 2], grid.decay.view(grid.rows, grid.slots)]
    if column is not None:
        parts.append(column.d.view(grid.rows, grid.slots, L))
    if first is not None:  # its first slot is its own number: what came before it is empty
        chosen = (first + torch.arange(chunks, device=first.device)).clamp(max=grid.slots - 1)
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
    column: Column | None


def scan(
    name: str, a: Tensor, b: Tensor, x: Tensor, grid: Grid, state: Tensor | None = None, *,
    column: Column | None = None, dot: Tensor | None = None, against: Scan | None = None,
    final: bool = True,
) -> Scan:  # fmt: skip
    """The primitive; see ``tfla.reference.scan``. h and dv keep their states at the ends of spans,
    dq and dk start from them.

    A wide contraction is done in pieces, each adding to the last one's output in fp32.
    """
    B, T, H = grid.spec.B, grid.spec.T, grid.spec.H
    A, X = a.shape[-1], x.shape[-1]
    tile = grid.plan.tile(name)
    # From one end of a sequence to the other, for dq and dk to follow span by span.
    walks = name in ("h", "dv")
    reverse = name in ("dk", "dv")
    a, b, x = (rows_of(t, tile.descriptor or tile.mma) for t in (a, b, x))
    if name == "dv" and not tile.hopper:
        dot = None
    y = None if dot is None else rows_of(dot, tile.hopper or tile.mma)
    out = x.new_empty(B, T, H, X)
    end = _new(x, grid.spec.N, H, A, X) if walks and final else None
    dots = None if y is None else _new(x, tile.tiles * grid.size)
    ends = grid.dC_ends if reverse else grid.C_ends
    keep = walks and ends is not None
    if ends is None and grid.plan.segment:
        ends = _new(x, grid.rows, grid.spans, *grid.plan.kept)
    walk = reverse, walks, keep
    if tile.splits == 1:
        _scan_piece(tile, a, b, x, out, None, y, dots, grid, state, end, ends, *walk, column)
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
                tile, a[..., piece], b[..., piece], x, target, previous, y if last else None,
                dots, grid, None if state is None else state[:, :, piece],
                None if end is None else end[:, :, piece], kept, *walk, column if last else None,
            )  # fmt: skip
            previous = target
    return Scan(out, dots, end, column)


def _scan_piece(
    tile: Tile, a: Tensor, b: Tensor, x: Tensor, out: Tensor, partial: Tensor | None,
    y: Tensor | None, dots: Tensor | None, grid: Grid, state: Tensor | None, final: Tensor | None,
    ends: Tensor | None, reverse: bool, walks: bool, keep: bool, column: Column | None,
) -> None:  # fmt: skip
    """One launch of the scan; where h or dv is cut, two before it make the states that its pieces
    start from."""
    T, H, N = grid.spec.T, grid.spec.H, grid.spec.N
    A, X = a.shape[-1], x.shape[-1]
    plan = grid.plan
    packed = grid.cu_seqlens is not None
    unit = plan.segment if walks else plan.span
    cut = unit > 0 and ends is not None
    pieces = N
    if cut:
        pieces = T // unit + N if packed else N * max(triton.cdiv(T, unit), 1)
    vector = None
    if column is not None:
        vector = column.dn_chunk if reverse else grid.n_chunk
    stride_e = plan.kept[0] * plan.kept[1]
    stride_ea, stride_ex = (plan.kept[1], 1) if walks else (1, plan.kept[1])
    strides_s, strides_f = ((0, 0, 0, 0) if t is None else t.stride() for t in (state, final))

    kernel = _scan_kernel
    forms: dict[str, Any] = {"TRANSPOSED": tile.transposed, "DESCRIPTOR": tile.descriptor,
                             "PRECISION": grid.spec.precision}  # fmt: skip
    if tile.mma:
        from tfla.kernels.mma import _scan_mma_kernel

        kernel = _scan_mma_kernel
        forms = {"STAGES": tile.stages, "Y_AHEAD": tile.y_ahead, "WARPS": tile.warps}
    weights = grid.weights
    divides: tuple[Tensor | None, ...] = ()  # by what the scan of h divides, and where it notes it
    if tile.hopper:
        from tfla.kernels.hopper import _scan_hopper_kernel

        kernel = _scan_hopper_kernel
        forms = {"OF_X": walks and y is not None, "STAGES": tile.stages}
        divides = None, None
        if walks and not reverse and grid.undivided is not None:
            weights = grid.undivided
            divides = grid.n_chunk, grid.weights if keep else None

    def run(whole: bool, left: Tensor | None) -> None:
        tensors = (
            out, partial, y, dots, None if column is None else column.d, vector, *divides, state,
            final,
        )  # fmt: skip
        out_, partial_, y_, dots_, d, *rest = tensors if whole else [None] * len(tensors)
        launch(
            kernel, (tile.tiles * H * pieces,), (tile.warps, tile.stages),
            (a, b, x, out_, partial_, y_, dots_, weights, grid.decay, d, *rest, ends, left,
             grid.cu_seqlens, grid.tables[2 if walks else 1]),
            *a.stride()[:3], *b.stride()[:3], *x.stride()[:3],
            *(x if y is None else y).stride()[:3], *strides_s, *strides_f, *grid.common(),
            grid.spans, unit, grid.size, stride_e, A, X,
            L=plan.L, BLOCK_A=tile.block_a, BLOCK_X=tile.block_x, SPAN=plan.span,
            STRIDE_EA=stride_ea, STRIDE_EX=stride_ex, REVERSE=reverse, CUT=cut,
            KEEP=keep and whole, ENDS=grid.ends, **forms,
        )  # fmt: skip

    if cut and walks:
        left = torch.empty(pieces, H, dtype=torch.float32, device=x.device)
        run(False, left)
        launch(
            _join_kernel, (N * H, triton.cdiv(A * X, 1024)), (4, 2),
            (ends, left, state, grid.cu_seqlens), *strides_s, T, H, grid.spans, unit, stride_e, A,
            X, SPAN=plan.span, BLOCK=1024, STRIDE_EA=stride_ea, REVERSE=reverse,
            ENDS=grid.ends,
        )  # fmt: skip
    run(True, None)


def gate_gradients(
    i: Tensor, f: Tensor, dq: Scan, dk: Scan, grid: Grid
) -> tuple[Tensor, Tensor]:
    """(di, df), fp32; see ``tfla.reference.gate_gradients``."""
    spec = grid.spec
    B, T, H, K = spec.B, spec.T, spec.H, spec.K
    di, df = _new(grid.weights, B, T, H), _new(grid.weights, B, T, H)
    column = dk.column
    size = max(grid.size, 1)
    assert dq.dot is not None and dk.dot is not None
    span = grid.plan.span
    pieces = B * triton.cdiv(T, span) if grid.cu_seqlens is None else T // span + spec.N
    launch(
        gates._gradients_kernel, (pieces * H,), (8, 2),
        (i, f, grid.cu_seqlens, grid.tables[1], grid.weights, dq.dot, dk.dot, grid.C_ends,
         grid.dC_ends, grid.n_chunk, grid.n_final, None if column is None else column.dn_chunk, di,
         df), *i.stride(), *f.stride(), T, H, grid.slots, grid.spans, grid.size, K,
        grid.plan.kept[0] * grid.plan.kept[1], L=grid.plan.L, SPAN=span,
        BLOCK_K=grid.plan.block_k, Q_PARTS=dq.dot.numel() // size, K_PARTS=dk.dot.numel() // size,
        GRADIENT_I=gates.form_of(spec.input_gate).gradient, SIGMOID_F=spec.sigmoid_f,
        NORMALIZE=spec.normalize, PACKED=grid.cu_seqlens is not None, ENDS=grid.ends,
    )  # fmt: skip
    return di, df


def initial_gradients(dv: Scan, dk: Scan) -> tuple[Tensor, Tensor | None]:
    """(dC_0, dn_0): what the reverse scans leave at the start of the sequences."""
    assert dv.final is not None
    return dv.final, None if dk.column is None else dk.column.dn_first
