"""The weights of a call and where they lie: sizes, the tables of packed sequences, and the arrays
that the forward pass saves for the backward pass."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from tfla.kernels import gates
from tfla.kernels.layout import _clear_kernel, _offsets_kernel, _tables_kernel
from tfla.kernels.planning import stored_sizes_of
from tfla.kernels.program import Symbol, name_of, padded, saved_room
from tfla.plan import FEW_HEADS, Plan, StoredSizes
from tfla.spec import CallSpec

Tables = tuple[Symbol | None, Symbol | None, Symbol | None]


class Sizes(NamedTuple):
    """How many of what a call has. They may be symbols."""

    rows: int  # of chunks: (batch, head), or heads alone when sequences are packed
    chunks: int  # a row, some of which may be empty
    checkpoints: int  # stored states a row


def sizes_of(spec: CallSpec, stored: StoredSizes) -> Sizes:
    T, N, H = spec.T, spec.N, spec.H
    if spec.packed:
        inside = T // stored.checkpoint_every
        return Sizes(H, T // stored.L + N, inside + N if spec.at_sequence_end else inside)
    chunks, checkpoints = -(-T // stored.L), -(-T // stored.checkpoint_every)
    if not spec.at_sequence_end:  # no gradient comes from there: none at the end of a sequence
        checkpoints += 1 // (1 + checkpoints) - 1
    return Sizes(spec.B * H, chunks, checkpoints)


class SavedPart(NamedTuple):
    """An array that the backward pass needs of the forward pass."""

    shape: tuple[int, ...]
    dtype: str = "fp32"

    @property
    def elements(self) -> int:
        """Of fp32 that it takes in one allocation, with room for one more (see ``program``)."""
        return saved_room(math.prod(self.shape), self.dtype)


def saved_parts(spec: CallSpec, stored: StoredSizes) -> dict[str, SavedPart]:
    """What the backward pass needs of the forward pass."""
    s = sizes_of(spec, stored)
    parts = {
        "vectors": SavedPart((s.rows, s.chunks, gates.VECTORS.value, stored.L)),
        "decay": SavedPart((s.rows, s.chunks)),
    }
    if spec.needs_grad:
        shape = s.rows, s.checkpoints, *stored.checkpoint_shape
        parts["C_checkpoints"] = SavedPart(shape, checkpoint_dtype(spec))
    if spec.normalize:
        parts["n_chunk"] = SavedPart((s.rows, s.chunks, spec.K))
        parts["n_final"] = SavedPart((spec.N, spec.H, spec.K))
    return parts


def checkpoint_dtype(spec: CallSpec) -> str:
    """Of stored states. Where many heads share q and k there are many of them, and products of bf16
    round them anyway; fp16 might not hold a state."""
    return "bf16" if spec.R > FEW_HEADS and name_of(spec.dtype) == "bf16" else "fp32"


def saved_elements(spec: CallSpec) -> int:
    """Of all of them in one allocation."""
    return sum(
        is_so * sum(part.elements for part in saved_parts(spec, stored).values())
        for is_so, stored in stored_sizes_of(spec)
    )


class GateWeights(NamedTuple):
    """The weights of a call, and where they lie."""

    spec: CallSpec
    plan: Plan
    sizes: Sizes
    cu_seqlens: Symbol | None
    tables: Tables  # which sequence each chunk, checkpoint and split belongs to; None unless packed
    vectors: Symbol  # (rows, chunks, VECTORS, L), see gates.py
    # The same without the denominator, where the scan of h makes it.
    vectors_without_den: Symbol | None
    decay: Symbol  # (rows, chunks)
    # (rows, checkpoints, *plan.checkpoint_shape) C, from which the backward pass starts
    C_checkpoints: Symbol | None
    dC_checkpoints: Symbol | None  # the same of dC
    n_chunk: Symbol | None  # (rows, chunks, K) n entering each chunk
    n_final: Symbol | None  # (N, H, K)
    m_final: Symbol | None  # (N, H), in the forward pass

    @property
    def chunks(self) -> int:
        """Of all rows, over which small kernels run."""
        return self.sizes.rows * self.sizes.chunks

    @property
    def size(self) -> int:
        """Numbers in a vector of all rows."""
        return self.chunks * self.plan.L

    @property
    def common(self) -> dict[str, int]:
        return {"T": self.spec.T, "H": self.spec.H, "chunks_per_head": self.sizes.chunks}


@functools.cache
def _stride_names(name: str, axes: str) -> tuple[str, ...]:
    return tuple([f"stride_{name}{axis}" for axis in axes])


def strides(name: str, x: Symbol, axes: str = "bth") -> dict[str, int]:
    """The first strides of x as parameters of a kernel."""
    return dict(zip(_stride_names(name, axes), x.strides, strict=False))


# ---------------------------------------------------------------- packed sequences


def offsets(cu_seqlens: Symbol, T: int) -> Symbol:
    """The offsets that kernels read: dense, int64, ascending within [0, T], whatever was given."""
    (count,), builder = cu_seqlens.shape, cu_seqlens.builder
    out = builder.new("offsets", count, dtype="i64")
    builder.launch(
        "offsets",
        _offsets_kernel,
        (1,),
        8,
        1,
        reads={"cu_seqlens": cu_seqlens},
        writes={"out": out},
        numbers={"T": T, "N": count - 1, "stride": cu_seqlens.strides[0]},
        constants={"BLOCK": 2048},
    )
    return out


def clear(offsets: Symbol, *outputs: Symbol) -> None:
    """Zeros in up to five outputs (1, T, ...) at tokens that belong to no sequence, in one launch.
    ``offsets``: those of the function of this name."""
    T, N = outputs[0].shape[1], offsets.shape[0] - 1
    given = [*outputs, *[None] * (5 - len(outputs))]
    names = "abcde"
    offsets.builder.launch(
        "clear",
        _clear_kernel,
        (offsets.builder.device.multiprocessors * 2 if T else 0,),
        4,
        1,
        reads={"offsets": offsets},
        updates=dict(zip(names, given, strict=True)),
        writes={},
        numbers={"T": T, "N": N}
        | {
            f"width_{name}": 0 if x is None else x.numel // max(T, 1)
            for name, x in zip(names, given, strict=True)
        },
        constants={"BLOCK": 2048},
    )


def tables(cu_seqlens: Symbol | None, T: int, plan: Plan) -> Tables:
    """Of packed sequences: which one each chunk, interval between checkpoints and split
    belongs to, in one launch."""
    if cu_seqlens is None:
        return None, None, None
    N, builder = cu_seqlens.shape[0] - 1, cu_seqlens.builder
    lengths = (plan.L, plan.checkpoint_every, plan.split_len or plan.checkpoint_every)
    counts = [padded(T // length + N) for length in lengths]
    chunk, checkpoint, split = (
        builder.new(f"{name} table", count, dtype="i32")
        for name, count in zip(("chunk", "checkpoint", "split_len"), counts, strict=True)
    )
    builder.launch(
        "tables",
        _tables_kernel,
        (-(-sum(counts) // 256),),
        4,
        1,
        reads={"cu_seqlens": cu_seqlens},
        writes={"table_0": chunk, "table_1": checkpoint, "table_2": split},
        numbers={"N": N}
        | {f"length_{n}": length for n, length in enumerate(lengths)}
        | {f"count_{n}": count for n, count in enumerate(counts)},
        constants={"BLOCK": 256},
    )
    return chunk, checkpoint, split
