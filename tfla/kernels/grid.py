"""What one call has on the device: sizes, weights, kept states, and the buffer that holds what the
backward pass needs. Out of __init__.py, which launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfla.kernels import gates
from tfla.kernels.host import padded
from tfla.plan import Plan


class Grid(NamedTuple):
    """The weights of a problem on the device, and where they lie."""

    plan: Plan
    shape: tuple[int, int, int, int, int]  # B, T, H, K, V
    N: int
    cu_seqlens: Tensor | None
    tables: tuple[Tensor | None, ...]  # of chunks, spans and segments; None unless packed
    rows: int
    slots: int  # chunks a row
    spans: int  # kept states a row
    buffer: Tensor  # everything the backward pass needs, in one piece
    weights: Tensor  # (rows, slots, VECTORS, L)
    undivided: Tensor | None  # the same without the denominator, where the scan of h makes it
    decay: Tensor  # (rows, slots)
    # (rows, spans, *plan.kept) C at the ends of spans, where the backward pass starts from
    C_ends: Tensor | None
    dC_ends: Tensor | None  # the same of dC
    n_chunk: Tensor | None  # (rows, slots, K) n entering each chunk
    n_final: Tensor | None  # (N, H, K)
    m_final: Tensor | None  # (N, H)
    scale: float
    normalize: bool
    ends: bool  # are states kept at the ends of sequences too?

    @property
    def size(self) -> int:
        return self.rows * self.slots * self.plan.L

    def chunks(self) -> int:
        """Slots of chunks in all, over which small kernels run."""
        return self.rows * self.slots

    def common(self) -> tuple[int, int, int]:
        return self.shape[1], self.shape[2], self.slots


def _geometry(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, plan: Plan, normalize: bool, keep: bool,
    ends: bool,
) -> tuple[int, int, int, int, list[int]]:  # fmt: skip
    """(N, rows, slots, spans, sizes): sizes of the parts of the buffer that the forward pass hands
    to the backward pass."""
    B, T, H, K = q.shape
    packed = cu_seqlens is not None
    N = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else B
    rows = H if packed else B * H
    slots, spans = (T // unit + N if packed else -(-T // unit) for unit in (plan.L, plan.span))
    if not ends:  # fewer than pieces: where they meet
        spans = T // plan.span if packed else max(spans - 1, 0)
    kept = rows * spans * plan.kept[0] * plan.kept[1]
    sizes = [gates.VECTORS.value * rows * slots * plan.L, rows * slots, kept if keep else 0]
    if normalize:
        sizes += [rows * slots * K, N * H * K, N * H]
    return N, rows, slots, spans, sizes


def _split(buffer: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts of a buffer, each of its size, at aligned places."""
    parts = buffer.split([padded(size) for size in sizes])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
