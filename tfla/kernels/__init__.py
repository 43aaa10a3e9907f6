"""The backend "triton": launches of the kernels in this folder, with the functions that every backend has.

One call allocates everything it needs and never asks the device for a value. Files: layout.py (where things lie), gates.py
(exponents, normaliser, gate gradients), scan.py (the scan), step.py (decode), launch.py (the plan of a call, descriptors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tfla.gates import Activations
from tfla.kernels import gates as g
from tfla.kernels.launch import aligned, launch, plan_of, precision, rows_of, tables
from tfla.kernels.scan import _join_kernel, _scan_kernel
from tfla.kernels.step import update
from tfla.plan import Plan, Tile

__all__ = ["exponents", "gate_gradients", "normalizer_backward", "saved", "saved_like", "scan", "update"]

VECTORS = 7  # of one number a token, see gates.py


@dataclass(frozen=True)
class Grid:
    """The weights of a problem on the device, and where they lie."""

    plan: Plan
    shape: tuple[int, int, int, int, int]  # B, T, H, K, V
    N: int
    cu_seqlens: Tensor | None
    tables: tuple[Tensor | None, ...]  # of chunks, spans and segments; None unless packed
    rows: int
    slots: int  # chunks a row
    spans: int  # spans a row
    buffer: Tensor  # everything the backward pass needs, in one piece
    weights: Tensor  # (VECTORS, rows, slots, L)
    decay: Tensor  # (rows, slots)
    n_chunk: Tensor | None  # (rows, slots, K) n entering each chunk
    n_final: Tensor | None  # (N, H, K)
    m_final: Tensor | None  # (N, H)
    scale: float
    normalize: bool

    @property
    def size(self) -> int:
        return self.rows * self.slots * self.plan.L

    def chunks(self) -> int:
        """Slots of chunks in all, over which small kernels run."""
        return self.rows * self.slots

    def common(self) -> tuple[int, int, int]:
        return self.shape[1], self.shape[2], self.slots


def _geometry(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, L: int, normalize: bool) -> tuple[int, int, int, list[int]]:
    """(N, rows, slots, sizes): the parts of the buffer that the forward pass hands to the backward pass."""
    B, T, H, K = q.shape
    packed = cu_seqlens is not None
    N = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else B
    rows = H if packed else B * H
    slots = T // L + N if packed else -(-T // L)
    sizes = [VECTORS * rows * slots * L, rows * slots]
    if normalize:
        sizes += [rows * slots * K, N * H * K, N * H]
    return N, rows, slots, sizes


def saved_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalize: bool) -> Tensor:
    """An empty tensor of the shape that ``saved`` will have: known from shapes alone, for compiled graphs."""
    plan = plan_of(q, v, cu_seqlens)
    return q.new_empty(sum(_geometry(q, v, cu_seqlens, plan.L, normalize)[3]), dtype=torch.float32)


def saved(grid: Grid) -> Tensor:
    """What the backward pass needs of the forward's grid."""
    return grid.buffer


def exponents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    activations: Activations,
    normalize: bool,
    saved: Tensor | None = None,
) -> Grid:
    """The weights of every chunk, the denominator folded into the target side; see ``tfla.reference.exponents``."""
    B, T, H, K = q.shape
    plan = plan_of(q, v, cu_seqlens)
    N, rows, slots, sizes = _geometry(q, v, cu_seqlens, plan.L, normalize)
    buffer = q.new_empty(sum(sizes), dtype=torch.float32) if saved is None else saved
    parts: list[Any] = list(buffer.split(sizes)) + [None] * (5 - len(sizes))
    if normalize:
        parts[3:] = parts[3].view(N, H, K), parts[4].view(N, H)
    spans = T // plan.span + N if cu_seqlens is not None else -(-T // plan.span)
    grid = Grid(
        plan, (B, T, H, K, v.shape[-1]), N, cu_seqlens, tables(cu_seqlens, T, plan), rows, slots, spans, buffer, *parts,
        scale, normalize,
    )  # fmt: skip
    if saved is not None:
        return grid
    gauge = None
    chunk_table = grid.tables[0]
    if normalize:
        sums = q.new_empty(rows * slots * K, dtype=torch.float32)
        chunk_f, chunk_p = q.new_empty(2, rows * slots, dtype=torch.float64).unbind(0)
        gauge = q.new_empty(rows * slots, dtype=torch.float32)
        launch(
            g._sums_kernel, (grid.chunks(),), plan.small_warps,
            k, i, f, cu_seqlens, chunk_table, sums, chunk_f, chunk_p, *k.stride()[:3], *i.stride(), *f.stride(),
            *grid.common(), K, L=plan.L, BLOCK_K=plan.block_k, SIGMOID_I=activations.sigmoid_i,
            SIGMOID_F=activations.sigmoid_f, PACKED=cu_seqlens is not None,
        )  # fmt: skip
        launch(
            g._gauge_kernel, (N * H, triton.cdiv(K, 64)), 4,
            cu_seqlens, sums, chunk_f, chunk_p, n, m, gauge, grid.decay, grid.n_chunk, grid.n_final, grid.m_final,
            *grid.common(), K, L=plan.L, BLOCK=64, BLOCK_K=64, HAS_N=n is not None, HAS_M=m is not None,
            PACKED=cu_seqlens is not None,
        )  # fmt: skip
    launch(
        g._weights_kernel, (grid.chunks(),), plan.small_warps,
        q, k, i, f, cu_seqlens, chunk_table, gauge, grid.m_final, grid.n_chunk, grid.weights, grid.decay,
        *q.stride()[:3], *k.stride()[:3], *i.stride(), *f.stride(), *grid.common(), grid.size, K, scale,
        L=plan.L, BLOCK_K=plan.block_k, SIGMOID_I=activations.sigmoid_i, SIGMOID_F=activations.sigmoid_f,
        NORMALIZE=normalize, PACKED=cu_seqlens is not None, PRECISION=precision(q),
    )  # fmt: skip
    return grid


class Column(NamedTuple):
    """The normaliser's share of the backward pass."""

    d: Tensor  # (rows, slots, L)
    q_dq: Tensor  # (rows, slots, L) q . dq, known without dq
    dn_chunk: Tensor  # (rows, slots, K) dn at the end of each chunk
    dn_first: Tensor  # (N, H, K)


def normalizer_backward(
    dh: Tensor, h: Tensor, q: Tensor, n: Tensor | None, dn: Tensor | None, grid: Grid
) -> Column:
    """The column that makes the gradient of the division exact; see ``tfla.reference.normalizer_backward``."""
    B, T, H, K, V = grid.shape
    d, q_dq = q.new_empty(2, grid.size, dtype=torch.float32).unbind(0)
    sums, dn_chunk = q.new_empty(2, grid.chunks() * K, dtype=torch.float32).unbind(0)
    dn_first = q.new_empty(grid.N, H, K, dtype=torch.float32)
    packed = grid.cu_seqlens is not None
    launch(
        g._column_kernel, (grid.chunks(),), grid.plan.small_warps,
        dh, h, q, grid.cu_seqlens, grid.tables[0], grid.weights, d, q_dq, sums,
        *dh.stride()[:3], *h.stride()[:3], *q.stride()[:3], *grid.common(), grid.size, K, V,
        L=grid.plan.L, BLOCK_K=grid.plan.block_k, BLOCK_V=grid.plan.block_v, PACKED=packed,
    )  # fmt: skip
    launch(
        g._column_state_kernel, (grid.N * H, triton.cdiv(K, 64)), 4,
        grid.cu_seqlens, sums, grid.decay, dn, dn_chunk, dn_first, *grid.common(), K,
        L=grid.plan.L, BLOCK=64, BLOCK_K=64, HAS_DN=dn is not None, PACKED=packed,
    )  # fmt: skip
    return Column(d, q_dq, dn_chunk, dn_first)


class Meets(NamedTuple):
    """Where the running sum of the forget gate's gradient restarts."""

    C: Tensor  # (splits, rows, spans, state) C^T at the ends of spans, tile by tile
    dC: Tensor  # the same of dC^T
    column: Column | None


class Scan(NamedTuple):
    """What a scan leaves behind."""

    out: Tensor  # (B, T, H, X)
    dot: Tensor | None  # (parts, rows, slots, L) shares of the row dot products
    final: Tensor  # (N, H, A, X)
    column: Tensor | None  # (N, H, X)
    ends: Tensor | None  # (splits, rows, spans, state) states at the ends of spans
    meets: Meets | None


def scan(
    name: str,
    a: Tensor,
    b: Tensor,
    x: Tensor,
    grid: Grid,
    state: Tensor | None = None,
    *,
    reverse: bool = False,
    column: Column | None = None,
    dot: Tensor | None = None,
    keep: bool = False,
    against: Scan | None = None,
) -> Scan:
    """The primitive; see ``tfla.reference.scan``. A wide contraction is done in pieces, each adding to the last one's output."""
    B, T, H, _, _ = grid.shape
    A, X = a.shape[-1], x.shape[-1]
    tile: Tile = getattr(grid.plan, name)
    a, b, x = rows_of(a), rows_of(b), rows_of(x)
    if column is not None and not reverse:
        dot = None  # the column knows q . dq already
    y = None if dot is None else rows_of(dot)
    tiles = triton.cdiv(X, tile.block_x)
    out = x.new_empty(B, T, H, X)
    f32 = {"dtype": torch.float32, "device": x.device}
    final = torch.empty(grid.N, H, A, X, **f32)
    dots = None if y is None else torch.empty(tiles * grid.size, **f32)
    ends = None
    if keep:
        low = torch.bfloat16 if x.dtype != torch.float32 else torch.float32
        shape = (tile.splits, grid.rows, grid.spans, tiles * tile.block_a * tile.block_x)
        ends = torch.empty(shape, dtype=low, device=x.device)
    previous = None
    width = triton.cdiv(A, tile.splits)
    for split in range(tile.splits):
        piece = slice(split * width, min((split + 1) * width, A))
        last = split == tile.splits - 1
        target = out if last else torch.empty(B, T, H, X, **f32)
        _scan_piece(
            tile, a[..., piece], b[..., piece], x, target, previous, y if last else None, dots, grid,
            None if state is None else state[:, :, piece], final[:, :, piece],
            None if ends is None else ends[split], reverse, column if last else None,
        )  # fmt: skip
        previous = target
    share = column.q_dq if column is not None and not reverse else dots
    first = column.dn_first if column is not None and reverse else None
    meets = None
    if against is not None:
        assert against.ends is not None and ends is not None
        meets = Meets(against.ends, ends, column)
    return Scan(out, share, final, first, ends, meets)


def _scan_piece(
    tile: Tile, a: Tensor, b: Tensor, x: Tensor, out: Tensor, partial: Tensor | None, y: Tensor | None, dots: Tensor | None,
    grid: Grid, state: Tensor | None, final: Tensor, ends: Tensor | None, reverse: bool,
    column: Column | None,
) -> None:  # fmt: skip
    """One launch of the scan, with the two before it that make the states of the pieces of a cut sequence."""
    _, T, H, _, _ = grid.shape
    A, X = a.shape[-1], x.shape[-1]
    tiles = triton.cdiv(X, tile.block_x)
    packed = grid.cu_seqlens is not None
    segment = grid.plan.segment
    cut = segment > 0
    pieces = grid.N
    if cut:
        pieces = T // segment + grid.N if packed else grid.N * max(triton.cdiv(T, segment), 1)
    descriptor = tile.descriptor and all(t is None or aligned(t) for t in (a, b, x, y, out))
    vector = None
    if column is not None:
        vector = column.dn_chunk if reverse else grid.n_chunk

    def run(out: Tensor | None, state: Tensor | None, final: Tensor, left: Tensor | None) -> None:
        whole = out is not None
        launch(
            _scan_kernel, (tiles * H * pieces,), tile.warps,
            a, b, x, out, partial if whole else None, y if whole else None, dots if whole else None,
            grid.weights, grid.decay, column.d if column is not None and whole else None, vector if whole else None,
            state, final, ends if whole else None, left, grid.cu_seqlens, grid.tables[2],
            *a.stride()[:3], *b.stride()[:3], *x.stride()[:3], *(y if y is not None else x).stride()[:3],
            *(final if state is None else state).stride(), *final.stride(), *grid.common(), grid.spans, segment,
            grid.size, A, X, L=grid.plan.L, BLOCK_A=tile.block_a, BLOCK_X=tile.block_x, SPAN=grid.plan.span,
            REVERSE=reverse, CUT=cut, TRANSPOSED=tile.transposed, DESCRIPTOR=descriptor, STAGES=tile.stages,
            PRECISION=precision(x),
        )  # fmt: skip

    if cut:
        local = torch.empty(pieces, H, A, X, dtype=torch.float32, device=x.device)
        left = torch.empty(pieces, H, dtype=torch.float32, device=x.device)
        run(None, None, local, left)
        strides = (0, 0, 0, 0) if state is None else state.stride()
        launch(
            _join_kernel, (grid.N * H, triton.cdiv(A * X, 1024)), 4,
            local, left, state, grid.cu_seqlens, *strides, T, H, segment, A, X, BLOCK=1024, REVERSE=reverse,
        )  # fmt: skip
        state = local
    run(out, state, final, None)


def gate_gradients(
    i: Tensor, f: Tensor, q_dq: Tensor, k_dk: Tensor, meets: Meets, grid: Grid, activations: Activations
) -> tuple[Tensor, Tensor]:
    """(di, df), fp32; see ``tfla.reference.gate_gradients``."""
    B, T, H, K, _ = grid.shape
    di, df = q_dq.new_empty(2, B, T, H).unbind(0)
    packed = grid.cu_seqlens is not None
    column = meets.column
    launch(
        g._gradients_kernel, (grid.rows * grid.spans,), 4,
        i, f, grid.cu_seqlens, grid.tables[1], grid.weights, q_dq, k_dk, meets.C, meets.dC, grid.n_chunk, grid.n_final,
        None if column is None else column.dn_chunk, di, df, *i.stride(), *f.stride(),
        T, H, grid.slots, grid.spans, grid.size, grid.rows, K, meets.C.shape[-1],
        L=grid.plan.L, SPAN=grid.plan.span, BLOCK_K=grid.plan.block_k, Q_PARTS=q_dq.numel() // grid.size if grid.size else 1,
        K_PARTS=k_dk.numel() // grid.size if grid.size else 1, SPLITS=meets.C.shape[0],
        SIGMOID_I=activations.sigmoid_i, SIGMOID_F=activations.sigmoid_f, NORMALIZE=column is not None, PACKED=packed,
    )  # fmt: skip
    return di, df
