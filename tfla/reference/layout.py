"""Where the chunks of a call lie, and which of them are worked on at once.

Dimensions: B batch, T tokens, H heads, D any width, L chunk length, N sequences, C chunks of all
sequences, R rows of a block: its chunks times heads, each a matrix of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfla.offsets import check_offsets

# The most tokens of a chunk. What is not finite may reach tokens of its own chunk, so this is a
# promise too.
L = 64
# Numbers in each matrix of a block: few enough that a dozen of them stay in a cache, enough that
# the time of an operation is not that of its call.
BLOCK = 2**17
# Several chunks of the same sequences are a block if they have no more than these together.
FEW = 2**16


class Block(NamedTuple):
    """Chunks that are worked on at once: ``number`` consecutive ones of some sequences."""

    chunks: slice  # of the C chunks, ordered by number and then by sequence
    places: slice  # the sequences, by their place
    number: int  # consecutive chunks of each sequence; more than 1 only of all sequences at once
    size: int  # tokens in each chunk
    tokens: slice  # of those sequences, where all are of one length


class Group(NamedTuple):
    """Sequences that are worked on from end to end before the next ones are."""

    places: slice
    blocks: list[Block]  # in the order of time; later ones may leave out the last sequences


class ChunkLayout(NamedTuple):
    """Sequences are ordered by falling length (a sequence has a *place* in this order), chunks by
    their number in the sequence, then by place: what continues a chunk is in a later slice."""

    size: int  # tokens of a chunk, L at most
    lengths: Tensor  # (N,) by place
    rows: Tensor | None  # (C, L) rows of T, T past the end of a sequence; None where not packed
    order: Tensor | None  # (N,) the sequence at each place; None where they are the same
    place_of: Tensor | None  # (N,) the place of each sequence
    counts: list[int]  # how many sequences have a chunk of each number
    starts: list[int]  # the first of these in the order of chunks
    groups: list[Group]

    @staticmethod
    def make(
        B: int, T: int, H: int, cu_seqlens: Any, width: int, device: torch.device, longest: int
    ) -> ChunkLayout:
        """width: of the widest operand. longest: the most tokens of a chunk."""
        cpu = torch.device("cpu")  # whatever torch's default device is
        if cu_seqlens is None:
            start = length = torch.full((B,), T, device=cpu)
            order = None
        else:
            offsets = torch.tensor(check_offsets(cu_seqlens, T), device=cpu)
            start, length = offsets[:-1], offsets.diff()
            length, order = length.sort(descending=True, stable=True)
        most = int(length[0]) if len(length) else 0
        number = -(-most // longest)
        # Chunks of one length leave the least past the end.
        size = longest if order is not None and number > 1 else -(-most // max(number, 1))
        size = max(size, 1)
        first = torch.arange(number, device=cpu) * size
        counts = torch.searchsorted(-length, -first)  # how many sequences are longer than that
        starts = counts.cumsum(0) - counts
        rows, place_of = None, None
        if order is not None:
            places = torch.cat([torch.arange(n, device=cpu) for n in [0, *counts.tolist()]])
            position = first.repeat_interleave(counts)[:, None] + torch.arange(size, device=cpu)
            past = position >= length[places, None]
            rows = torch.where(past, T, start[order[places], None] + position).to(device)
            order, place_of = order.to(device), order.argsort().to(device)
        layout = ChunkLayout(
            size, length, rows, order, place_of, counts.tolist(), starts.tolist(), []
        )
        numbers = H * size * max(size, width)  # in a matrix of one chunk, all heads
        layout.groups.extend(layout._groups(numbers))
        return layout

    def _groups(self, numbers: int) -> list[Group]:
        """numbers: those of one chunk."""
        N, room = len(self.lengths), max(BLOCK // numbers, 1)
        several = FEW // max(N * numbers, 1) if self.rows is None else 1
        groups = []
        for r in range(0, N, room):
            places, blocks = slice(r, min(r + room, N)), []
            whole = int(self.lengths[r]) // self.size  # chunks that are full
            c = 0
            while c < len(self.counts) and self.counts[c] > r:
                count = max(min(several, whole - c), 1)
                last = min(places.stop, self.counts[c])
                at = self.starts[c] + r
                stop = self.starts[c + count - 1] + last
                size, tokens = self.size, slice(0)
                if self.rows is None:
                    end = min((c + count) * self.size, int(self.lengths[r]))
                    tokens = slice(c * self.size, end)
                    size = (end - tokens.start) // count
                blocks.append(Block(slice(at, stop), slice(r, last), count, size, tokens))
                c += count
            groups.append(Group(places, blocks))
        return groups

    @property
    def C(self) -> int:
        """Chunks of all sequences."""
        return sum(self.counts)

    def steps(self) -> list[slice]:
        """The places of the sequences that the first chunks belong to, the second ones, ..."""
        return [slice(0, count) for count in self.counts]

    # ------------------------------------------------------------ states

    def by_place(self, x: Tensor) -> Tensor:
        """(N, ...) by sequence -> by place."""
        return x if self.order is None else x[self.order]

    def by_sequence(self, x: Tensor) -> Tensor:
        """(N, ...) by place -> by sequence."""
        return x if self.place_of is None else x[self.place_of]

    # ------------------------------------------------------------ numbers of tokens

    def chunks_of(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """(B, T, H) -> (C, H, L), contiguous, in ``dtype``; ``fill`` past the end."""
        if self.rows is None:
            B, T, H = x.shape
            T, number = T if B else 0, len(self.counts)
            out = x.new_empty(number, B, H, self.size, dtype=dtype)
            full = T // self.size
            if full:
                cut = x[:, : full * self.size].unflatten(1, (full, self.size))
                out[:full].copy_(cut.permute(1, 0, 3, 2))
            if full < number:
                rest = T - full * self.size
                out[full, ..., :rest].copy_(x[:, full * self.size :].transpose(1, 2))
                out[full, ..., rest:].fill_(fill)
            return out.flatten(0, 1)
        past = self.rows == x.shape[1]
        y = x[0].index_select(0, self.rows.masked_fill(past, 0).flatten())
        y = y.view(*self.rows.shape, x.shape[2]).masked_fill_(past[..., None], fill)
        return y.transpose(1, 2).to(dtype).contiguous()

    def tokens_of(self, x: Tensor, B: int, T: int) -> Tensor:
        """(C, H, L) -> (B, T, H): the inverse."""
        H = x.shape[1]
        if not len(x):
            return x.new_zeros(B, T, H)
        if self.rows is None:
            number = len(self.counts)
            out = x.view(number, B, H, self.size).permute(1, 0, 3, 2).flatten(1, 2)
            return out[:, :T]
        rows = x.new_empty(T + 1, H)
        rows.index_copy_(0, self.rows.flatten(), x.transpose(1, 2).flatten(0, 1))
        return rows[None, :T]

    def of_block(self, x: Tensor, block: Block) -> Tensor:
        """(C, H, L) -> (R, L), of the chunks of a block."""
        return x[block.chunks, :, : block.size].reshape(-1, block.size)

    # ------------------------------------------------------------ operands

    def view(self, x: Tensor, block: Block) -> Tensor:
        """(B, T, H, D) -> (number, sequences, H, L, D) of a block: a view of its memory, where
        sequences are of one length."""
        tokens = x[block.places, block.tokens].unflatten(1, (block.number, block.size))
        return tokens.permute(1, 0, 3, 2, 4)

    def operand(
        self, x: Tensor, dtype: torch.dtype, block: Block, factor: Tensor | None = None
    ) -> Tensor:
        """(B, T, H, D) -> (R, L, D) in ``dtype``, times factor (R, L); 0 past the end. Memory of
        the caller where nothing has to be moved."""
        if self.rows is None:
            part = self.view(x, block)
        else:
            index = self.rows[block.chunks]
            past = index == x.shape[1]
            part = x[0].index_select(0, index.masked_fill(past, 0).flatten())
            part = part.view(*index.shape, *x.shape[2:])
            part = part.masked_fill_(past[..., None, None], 0.0).transpose(1, 2)[None]
        R, D = part.shape[:-2].numel(), part.shape[-1]
        if factor is None and part.dtype == dtype:
            return part.reshape(R, block.size, D)
        out = torch.empty(part.shape, dtype=dtype, device=x.device)
        if factor is None:
            out.copy_(part)
        else:
            torch.mul(part, factor.view(*part.shape[:-1], 1), out=out)
        return out.view(R, block.size, D)

    def outputs(self, x: Tensor, B: int, T: int) -> Tensor:
        """Memory for a result (B, T, H, D) of the dtype and the width of x."""
        room = 0 if self.rows is None else 1  # a row for what is past the ends
        return torch.empty(B, T + room, *x.shape[2:], dtype=x.dtype, device=x.device)

    def store(self, y: Tensor, out: Tensor, block: Block, factor: Tensor | None = None) -> None:
        """(R, L, D) times factor (R, L) into (B, T, H, D) of ``outputs``."""
        sequences = block.places.stop - block.places.start
        y = y.view(block.number, sequences, -1, block.size, y.shape[-1])
        factor = None if factor is None else factor.view(*y.shape[:-1], 1)
        if self.rows is None:
            part = self.view(out, block)
            if factor is None:
                part.copy_(y)
            else:
                torch.mul(y, factor, out=part)
            return
        y = y if factor is None else y * factor
        rows = y[0].transpose(1, 2).flatten(0, 1).to(out.dtype)
        out[0].index_copy_(0, self.rows[block.chunks].flatten(), rows)
