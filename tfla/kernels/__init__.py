"""The backend "triton": the scan algebra as launches of the kernels in this folder, with the
functions of ``tfla.backend``.

They work on ``Symbol``s: what they allocate and launch becomes a ``Program`` (program.py), once for
a kind of call, which runtime.py plays on tensors. A call allocates everything it needs and never
asks the device for a value. Files: layout.py (where things lie), gates.py (exponents, gate
gradients), normalizer.py, scan.py (the scan), mma.py and hopper.py with their parts (the scan by
hand), groups.py (dq and dk where many heads share q and k), pointwise.py (for models), step.py
(decode), planning.py (which plan), weights.py (sizes and what is saved).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tfla.backend import ScanName
from tfla.kernels import gates, groups, normalizer
from tfla.kernels.layout import _fold_packing_kernel
from tfla.kernels.planning import plan_of
from tfla.kernels.program import Symbol, name_of
from tfla.kernels.scan import _join_splits_kernel, _scan_kernel
from tfla.kernels.weights import (
    GateWeights,
    clear,
    offsets,
    saved_elements,
    saved_parts,
    sizes_of,
    strides,
    tables,
)
from tfla.plan import StoredSizes, Tile, power_of_two
from tfla.spec import CallSpec, Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from tfla.kernels.decode import update
    from tfla.kernels.runtime import execute
else:

    def __getattr__(name: str) -> Any:
        """What works on tensors comes when it is asked for: who has JAX may have no torch."""
        if name == "execute":
            from tfla.kernels.runtime import execute as found
        elif name == "update":
            from tfla.kernels.decode import update as found
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


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


def saved_shape(spec: CallSpec) -> tuple[int, ...]:
    """The shape that ``saved`` will have; sizes of the call may be symbols."""
    return (saved_elements(spec),)


def saved(weights: GateWeights) -> Symbol:
    """What the backward pass needs of the forward's weights."""
    return weights.vectors.builder.whole


def fold_packing(f: Symbol, cu_seqlens: Symbol) -> tuple[Symbol, Symbol]:
    """The forget gates of packed sequences as of one, in fp32, and the (2,) offsets of that one.
    See ``tfla.algorithm``."""
    (_, T, H), builder = f.shape, f.builder
    out = builder.new("f folded", 1, T, H)
    out_offsets = builder.new("offsets folded", 2, dtype="i64")
    builder.launch(
        "fold packing",
        _fold_packing_kernel,
        (max(-(-T // 64), 1),),
        4,
        1,
        reads={"f": f, "cu_seqlens": cu_seqlens},
        writes={"out": out, "out_offsets": out_offsets},
        numbers={"T": T, "N": cu_seqlens.shape[0] - 1, "H": H}
        | {"stride_ft": f.strides[1], "stride_fh": f.strides[2]},
        constants={"BLOCK": 64, "BLOCK_H": 16},
    )
    return out, out_offsets


def gate_weights(x: Inputs[Symbol], spec: CallSpec, saved: Symbol | None = None) -> GateWeights:
    """The weights of every chunk, with the denominator in the exponents of targets; see
    ``tfla.reference.gate_weights``."""
    plan, builder = plan_of(spec), x.q.builder
    stored = StoredSizes(plan.L, plan.checkpoint_every, plan.checkpoint_shape)
    parts, trains = saved_parts(spec, stored), spec.needs_grad or saved is not None

    def part(name: str) -> Symbol | None:
        if name not in parts:
            return None
        shape, dtype = parts[name]
        if trains:
            return builder.part(name, *shape, dtype=dtype, given=saved is not None)
        return builder.new(name, *shape, dtype=dtype)

    vectors, decay, C_checkpoints, n_chunk, n_final = map(
        part, ("vectors", "decay", "C_checkpoints", "n_chunk", "n_final")
    )
    assert vectors is not None and decay is not None
    forward = saved is None
    dC_checkpoints = None
    if not forward and C_checkpoints is not None:
        shape, dtype = C_checkpoints.shape, C_checkpoints.dtype
        dC_checkpoints = builder.new("dC_checkpoints", *shape, dtype=dtype)
    # fp16 would lose what is small beside a gauge and not beside a denominator.
    vectors_without_den = None
    if spec.normalize and plan.fuse_denominator and x.q.dtype != "fp16" and forward:
        vectors_without_den = (
            builder.new("vectors without den", *vectors.shape) if trains else vectors
        )
    weights = GateWeights(
        spec=spec,
        plan=plan,
        sizes=sizes_of(spec, stored),
        cu_seqlens=x.cu_seqlens,
        tables=tables(x.cu_seqlens, spec.T, plan),
        vectors=vectors,
        vectors_without_den=vectors_without_den,
        decay=decay,
        C_checkpoints=C_checkpoints,
        dC_checkpoints=dC_checkpoints,
        n_chunk=n_chunk,
        n_final=n_final,
        m_final=builder.new("m_final", spec.N, spec.H) if spec.normalize and forward else None,
    )
    if forward and spec.normalize:
        _normalized(x, weights)
    elif forward:
        builder.launch(
            "weights",
            gates._weights_kernel,
            (weights.chunks,),
            plan.gate_warps,
            2,
            reads={"i": x.i, "f": x.f, "cu_seqlens": x.cu_seqlens, "table": weights.tables[0]},
            writes={"weights": vectors, "decay": decay},
            numbers=strides("i", x.i) | strides("f", x.f) | weights.common | {"scale": spec.scale},
            constants={"L": plan.L} | _gate_forms(spec),
        )
    return weights


def _gate_forms(spec: CallSpec) -> dict[str, Any]:
    log_i = gates.form_of(spec.input_gate).log_i
    return {"LOG_I": log_i, "SIGMOID_F": spec.sigmoid_f, "PACKED": spec.packed}


def _normalized(x: Inputs[Symbol], weights: GateWeights) -> None:
    """The launches that make the weights of a normalised call: the gauge of each chunk by itself,
    the gauge over the chunks, and, unless the scan of h does it, the denominator."""
    spec, plan, builder = weights.spec, weights.plan, x.q.builder
    N, H, K, chunks = spec.N, spec.H, spec.K, weights.chunks
    rows = weights.sizes.rows, weights.sizes.chunks
    sums = builder.new("sums", *rows, K)
    chunk_f, chunk_p = (builder.new(name, *rows, dtype="fp64") for name in ("chunk_f", "chunk_p"))
    gauge = (
        builder.new("gauge", *rows, dtype="fp64") if weights.vectors_without_den is None else None
    )
    made = weights.vectors if weights.vectors_without_den is None else weights.vectors_without_den
    where = {"cu_seqlens": x.cu_seqlens, "table": weights.tables[0]}
    builder.launch(
        "sums",
        normalizer._sums_kernel,
        (chunks,),
        plan.gate_warps,
        2,
        reads={"k": x.k, "i": x.i, "f": x.f} | where,
        writes={"sums": sums, "chunk_f": chunk_f, "chunk_p": chunk_p, "weights": made},
        numbers=strides("k", x.k)
        | strides("i", x.i)
        | strides("f", x.f)
        | weights.common
        | {"K": K, "R": spec.R},
        constants={"L": plan.L, "BLOCK_K": plan.block_k} | _gate_forms(spec),
    )
    builder.launch(
        "gauge",
        normalizer._gauge_kernel,
        (N * H, -(-K // plan.block_n)),
        4,
        2,
        reads={
            "cu_seqlens": x.cu_seqlens,
            "sums": sums,
            "chunk_f": chunk_f,
            "chunk_p": chunk_p,
            "n_first": x.n,
            "m_first": x.m,
        },
        updates={"weights": made if gauge is None else None},
        writes={
            "gauge": gauge,
            "decay": weights.decay,
            "n_chunk": weights.n_chunk,
            "n_last": weights.n_final,
            "m_last": weights.m_final,
        },
        numbers=weights.common | {"K": K, "scale": spec.scale},
        constants={
            "L": plan.L,
            "BLOCK": plan.block_c,
            "BLOCK_K": plan.block_n,
            "HAS_N": x.n is not None,
            "HAS_M": x.m is not None,
            "PACKED": spec.packed,
        },
    )
    if gauge is None:
        return
    builder.launch(
        "denominator",
        normalizer._denominator_kernel,
        (chunks,),
        plan.small_warps,
        2,
        reads={"q": x.q, "k": x.k}
        | where
        | {
            "gauge": gauge,
            "m_last": weights.m_final,
            "n_chunk": weights.n_chunk,
            "chunk_f": chunk_f,
            "chunk_p": chunk_p,
        },
        updates={"weights": made},
        writes={},
        numbers=strides("q", x.q)
        | strides("k", x.k)
        | weights.common
        | {"K": K, "R": spec.R, "scale": spec.scale},
        constants={
            "L": plan.L,
            "BLOCK_K": plan.block_k,
            "PACKED": spec.packed,
            "PRECISION": plan.denominator,
        },
    )


class NormalizerGrad(NamedTuple):
    """The normaliser's share of the backward pass."""

    d: Symbol  # (rows, chunks, L)
    sums: Symbol  # (rows, chunks, K) of each chunk, for dn
    dn_chunk: Symbol | None = None  # (rows, chunks, K) dn at the end of each chunk
    dn_first: Symbol | None = None  # (N, H, K)


def normalizer_grad(
    dh: Symbol, h: Symbol, q: Symbol, n: Symbol | None, weights: GateWeights, dv: Scan | None
) -> NormalizerGrad:
    """The column that makes the gradient of the division exact; see
    ``tfla.reference.normalizer_grad``. The scan of dv may have made dh . h."""
    spec, plan, builder = weights.spec, weights.plan, q.builder
    dh_h = None if dv is None else dv.dot
    rows = weights.sizes.rows, weights.sizes.chunks
    column = NormalizerGrad(builder.new("d", *rows, plan.L), builder.new("dn sums", *rows, spec.K))
    builder.launch(
        "column",
        normalizer._column_kernel,
        (weights.chunks,),
        plan.small_warps if dh_h is None else plan.gate_warps,
        2,
        reads={
            "dh": dh if dh_h is None else None,
            "h": h if dh_h is None else None,
            "q": q,
            "dh_h": dh_h,
            "cu_seqlens": weights.cu_seqlens,
            "table": weights.tables[0],
            "weights": weights.vectors,
        },
        writes={"d": column.d, "sums": column.sums},
        numbers=strides("d", dh)
        | strides("h", h)
        | strides("q", q)
        | weights.common
        | {"size": weights.size, "K": spec.K, "V": spec.V, "R": spec.R},
        constants={
            "L": plan.L,
            "BLOCK_K": plan.block_k,
            "BLOCK_V": plan.block_v,
            "PARTS": 0 if dh_h is None else dh_h.shape[0],
            "PACKED": spec.packed,
        },
    )
    return column


def with_final_grad(
    column: NormalizerGrad, dn: Symbol | None, weights: GateWeights
) -> NormalizerGrad:
    """dn from the end of each sequence to its start; see ``tfla.reference.with_final_grad``."""
    spec, plan, builder = weights.spec, weights.plan, column.d.builder
    dn_chunk = builder.new("dn_chunk", *column.sums.shape)
    dn_first = builder.new("dn_first", spec.N, spec.H, spec.K)
    builder.launch(
        "column states",
        normalizer._column_state_kernel,
        (spec.N * spec.H, -(-spec.K // plan.block_n)),
        4,
        2,
        reads={
            "cu_seqlens": weights.cu_seqlens,
            "sums": column.sums,
            "decay": weights.decay,
            "dn_last": dn,
        },
        writes={"dn_chunk": dn_chunk, "dn_first": dn_first},
        numbers=weights.common | {"K": spec.K},
        constants={
            "L": plan.L,
            "BLOCK": plan.block_c,
            "BLOCK_K": plan.block_n,
            "HAS_DN": dn is not None,
            "PACKED": spec.packed,
        },
    )
    return column._replace(dn_chunk=dn_chunk, dn_first=dn_first)


def initial_state_decay(
    weights: Any, column: Any, first: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the state before token 0 weighs at every token, and d; see ``tfla.reference``. Past the
    end of the sequence ``first`` (1,), which token 0 belongs to, they are any numbers. Weights and
    column have tensors here, for an exchange lies between Programs."""
    spec, sizes, L = weights.spec, weights.sizes, weights.plan.L
    B, T, H, chunks = spec.B, spec.T, spec.H, -(-spec.T // L)
    parts = [weights.vectors[:, :, 2], weights.decay]
    if column is not None:
        parts.append(column.d)
    if first is not None:  # its first chunk lies at its own number: what came before it is empty
        import torch

        chosen = (first + torch.arange(chunks, device=first.device)).clamp(max=sizes.chunks - 1)
        parts = [part.index_select(1, chosen) for part in parts]
    edge, decay, *d = parts
    before = decay.double().cumprod(1).roll(1, 1)  # along the last axis, as GPUs do it well
    before[:, :1] = 1.0

    def tokens(x: Tensor) -> Tensor:
        return x.reshape(B, H, -1)[..., :T].transpose(1, 2)

    return tokens((edge * before[..., None]).float()), tokens(d[0]) if d else None


class Scan(NamedTuple):
    """What a scan writes."""

    out: Symbol  # (B, T, H, X)
    dot: Symbol | None  # (parts, rows, chunks, L) shares of the row dot products
    final: Symbol | None  # (N, H, A, X)
    column: NormalizerGrad | None
    scores: groups.Scores | None = None  # of groups of heads: made with dq, for dk


class _Slice(NamedTuple):
    """The part of a contraction that one launch of a scan takes, and what that launch has besides
    the operands."""

    first: int  # column of a and b
    width: int
    out: Symbol
    partial: Symbol | None  # what the slices before it add up to, fp32
    is_last: bool


def scan(
    name: ScanName,
    a: Symbol,
    b: Symbol,
    x: Symbol,
    weights: GateWeights,
    state: Symbol | None = None,
    *,
    column: NormalizerGrad | None = None,
    dot: Symbol | None = None,
    final: bool = True,
    dq: Scan | None = None,
) -> Scan:
    """The primitive; see ``tfla.reference.scan``. h and dv store their states at checkpoints, dq
    and dk start from them.

    A wide contraction is done in slices, each adding to the last one's output in fp32.
    """
    spec, plan, sizes, builder = weights.spec, weights.plan, weights.sizes, a.builder
    B, T, H, A, X = spec.B, spec.T, spec.H, a.shape[-1], x.shape[-1]
    if plan.group is not None and name in ("dq", "dk"):
        return _of_groups(name, a, b, x, weights, state, column, dot, dq)
    tile = plan.tile(name)
    if name == "dv" and not tile.hopper:
        dot = None
    # Over whole sequences, for dq and dk to follow from checkpoint to checkpoint.
    over_sequences = name in ("h", "dv")
    checkpoints = weights.dC_checkpoints if name in ("dv", "dk") else weights.C_checkpoints
    store_states = over_sequences and checkpoints is not None
    if checkpoints is None and plan.split_len:
        checkpoints = builder.new("states", sizes.rows, sizes.checkpoints, *plan.checkpoint_shape)
    shared = spec.R > 1 and not over_sequences  # dq and dk, of few heads a group
    call = _Scan(
        name=name,
        tile=tile,
        a=a,
        b=b,
        x=x,
        y=dot,
        out=builder.new(f"{name} of heads" if shared else name, B, T, H, X, dtype=x.dtype),
        dots=None
        if dot is None
        else builder.new(f"{name} dot", tile.tiles, sizes.rows, sizes.chunks, plan.L),
        final=builder.new(f"{name} final", spec.N, H, A, X) if over_sequences and final else None,
        weights=weights,
        state=state,
        checkpoints=checkpoints,
        store_states=store_states,
        column=column,
    )
    partial = None
    for first in range(0, A, tile.block_a):
        last = first + tile.block_a >= A
        out = call.out if last else builder.new(f"{name} partial", B, T, H, X)
        width = min(tile.block_a, A - first)
        call.launch(_Slice(first, width, out, partial, last))
        partial = out
    out = call.out
    if shared:
        out = builder.new(name, B, T, spec.G, X, dtype=x.dtype)
        groups.add(name, call.out, out, spec.R, X)
    return Scan(out, call.dots, call.final, column)


def _of_groups(
    name: ScanName,
    a: Symbol,
    b: Symbol,
    x: Symbol,
    weights: GateWeights,
    state: Symbol | None,
    column: NormalizerGrad | None,
    y: Symbol | None,
    dq: Scan | None,
) -> Scan:
    """dq, or dk after it, where heads share q and k; see groups.py."""
    assert y is not None
    d, vector = None, None
    if column is not None:
        d, vector = column.d, weights.n_chunk if name == "dq" else column.dn_chunk
    made = None if dq is None else dq.scores
    if made is None:
        made = groups.scores(y, x, b, a, d, weights)
    operands = groups.Operands(a, b, x, y, state, d, vector)
    out = groups.gradient(operands, made, weights, reverse=name == "dk")
    return Scan(out, made.q_dq if name == "dq" else made.k_dk, None, column, made)


class _Scan(NamedTuple):
    """A scan with all that its launches share."""

    name: ScanName
    tile: Tile
    a: Symbol
    b: Symbol
    x: Symbol
    y: Symbol | None
    out: Symbol
    dots: Symbol | None
    final: Symbol | None
    weights: GateWeights
    state: Symbol | None
    checkpoints: Symbol | None
    store_states: bool
    column: NormalizerGrad | None

    @property
    def shared(self) -> dict[str, int]:
        """How many heads share one of a and b, and of x and y."""
        R = self.weights.spec.R
        return {"R": R, "R_X": 1} if self.over_sequences else {"R": 1, "R_X": R}

    @property
    def reverse(self) -> bool:
        return self.name in ("dv", "dk")

    @property
    def over_sequences(self) -> bool:
        """Does it run over whole sequences? Else it starts from the checkpoints of one that did."""
        return self.name in ("h", "dv")

    def launch(self, k_slice: _Slice) -> None:
        """One launch; where h or dv is split along T, two before it make the states that its splits
        start from."""
        plan, spec = self.weights.plan, self.weights.spec
        T, N, H = spec.T, spec.N, spec.H
        split_len = plan.split_len if self.over_sequences else plan.checkpoint_every
        split_t = split_len > 0 and self.checkpoints is not None
        splits = N
        if split_t:
            splits = T // split_len + N if spec.packed else N * max(-(-T // split_len), 1)
        if split_t and self.over_sequences:
            split_decay = self.a.builder.new(f"{self.name} split decay", splits, H)
            self._split_states(k_slice, split_decay, split_len, splits)
            self._join(k_slice, split_decay, split_len)
        self._whole(k_slice, split_len, split_t, splits)

    def _whole(self, k_slice: _Slice, split_len: int, split_t: bool, splits: int) -> None:
        weights, tile, last = self.weights, self.tile, k_slice.is_last
        column = self.column if last else None
        vector = None
        if column is not None:
            vector = column.dn_chunk if self.reverse else weights.n_chunk
        vectors, n_in, weights_with_den = weights.vectors, None, None
        if tile.hopper and self.name == "h" and weights.vectors_without_den is not None:
            # The scan makes the denominator, and notes it for the backward pass.
            vectors, n_in = weights.vectors_without_den, weights.n_chunk
            weights_with_den = weights.vectors if self.store_states else None
        reads = {
            "a": self.a,
            "b": self.b,
            "x": self.x,
            "y": self.y if last else None,
            "partial": k_slice.partial,
            "weights": vectors,
            "decay": weights.decay,
            "d": None if column is None else column.d,
            "vector": vector,
            **({"n_in": n_in} if tile.hopper else {}),
            "state": self.state,
            "cu_seqlens": weights.cu_seqlens,
            "table": weights.tables[2 if self.over_sequences else 1],
        }
        # Checkpoints are read where a split starts from one, updated where it also stores some.
        starts = split_t and self.checkpoints is not None
        writes = {
            "final": self.final,
            "out": k_slice.out,
            "dot": self.dots if last else None,
            "split_decay": None,
            **({"weights_with_den": weights_with_den} if tile.hopper else {}),
        }
        self._launch(
            self.name,
            k_slice,
            split_len,
            split_t,
            splits,
            reads,
            writes,
            store_states=self.store_states,
            starts=starts,
        )

    def _split_states(
        self, k_slice: _Slice, split_decay: Symbol, split_len: int, splits: int
    ) -> None:
        """What each split makes of an empty state, to where the next one starts from."""
        weights, hopper = self.weights, self.tile.hopper
        reads = {
            "a": None,
            "b": self.b,
            "x": self.x,
            "y": None,
            "partial": None,
            "weights": self._sources(),
            "decay": weights.decay,
            "d": None,
            "vector": None,
            **({"n_in": None} if hopper else {}),
            "state": None,
            "cu_seqlens": weights.cu_seqlens,
            "table": weights.tables[2],
        }
        writes = {"final": None, "out": None, "dot": None, "split_decay": split_decay}
        writes |= {"weights_with_den": None} if hopper else {}
        label = f"{self.name}: splits"
        self._launch(
            label, k_slice, split_len, True, splits, reads, writes, store_states=False, starts=False
        )

    def _sources(self) -> Symbol:
        weights = self.weights
        if self.tile.hopper and self.name == "h" and weights.vectors_without_den is not None:
            return weights.vectors_without_den
        return weights.vectors

    def _launch(
        self,
        label: str,
        k_slice: _Slice,
        split_len: int,
        split_t: bool,
        splits: int,
        reads: dict[str, Symbol | None],
        writes: dict[str, Symbol | None],
        *,
        store_states: bool,
        starts: bool,
    ) -> None:
        weights, plan, spec, tile = self.weights, self.weights.plan, self.weights.spec, self.tile
        # Checkpoints and the final state stand between what is read and what is written: each slice
        # adds its rows to those of the slices before it.
        checkpoints, updates = {"checkpoints": self.checkpoints}, dict[str, Symbol | None]()
        is_first = k_slice.first == 0
        if not store_states and writes["out"] is not None:
            reads = reads | checkpoints
        elif starts or not is_first:
            updates = checkpoints
        else:
            writes = checkpoints | writes
        if not is_first:
            updates = updates | {"final": writes.pop("final")}
        X, y = self.x.shape[-1], self.y if k_slice.is_last else None
        stride_a, stride_x = _checkpoint_strides(plan.checkpoint_shape, self.over_sequences)
        kernel, forms = _kernel_of(tile, spec.precision, self.over_sequences and y is not None)
        self.a.builder.launch(
            label,
            kernel,
            (tile.tiles * spec.H * splits,),
            tile.warps,
            tile.stages,
            reads=reads,
            updates=updates,
            writes=writes,
            numbers=strides("a", self.a)
            | strides("b", self.b)
            | strides("x", self.x)
            | strides("y", self.x if y is None else y)
            | _strides_of("s", self.state)
            | _strides_of("f", self.final)
            | weights.common
            | {
                "checkpoints_per_head": weights.sizes.checkpoints,
                "split_len": split_len,
                "size": weights.size,
                "stride_checkpoint": plan.checkpoint_shape[0] * plan.checkpoint_shape[1],
                "first_a": k_slice.first or None,  # none to add costs no register
                "A": k_slice.width,
                "X": X,
                **self.shared,
            },
            constants={
                "L": plan.L,
                "BLOCK_A": tile.block_a,
                "BLOCK_X": tile.block_x,
                "CHECKPOINT_EVERY": plan.checkpoint_every,
                "STRIDE_CHECKPOINT_A": stride_a,
                "STRIDE_CHECKPOINT_X": stride_x,
                "REVERSE": self.reverse,
                "SPLIT_T": split_t,
                "STORE_STATES": store_states,
                "AT_SEQUENCE_END": spec.at_sequence_end,
                **forms,
            },
        )

    def _join(self, k_slice: _Slice, split_decay: Symbol, split_len: int) -> None:
        """From what each split makes of an empty state to the state at its end."""
        weights, plan, spec = self.weights, self.weights.plan, self.weights.spec
        X = self.x.shape[-1]
        self.a.builder.launch(
            f"{self.name}: splits",
            _join_splits_kernel,
            (spec.N * spec.H, -(-k_slice.width * X // 1024)),
            4,
            2,
            reads={
                "split_decay": split_decay,
                "state": self.state,
                "cu_seqlens": weights.cu_seqlens,
            },
            updates={"checkpoints": self.checkpoints},
            writes={},
            numbers=_strides_of("s", self.state)
            | {
                "T": spec.T,
                "H": spec.H,
                "checkpoints_per_head": weights.sizes.checkpoints,
                "split_len": split_len,
                "stride_checkpoint": plan.checkpoint_shape[0] * plan.checkpoint_shape[1],
                "first_a": k_slice.first or None,  # none to add costs no register
                "A": k_slice.width,
                "X": X,
            },
            constants={
                "CHECKPOINT_EVERY": plan.checkpoint_every,
                "BLOCK": 1024,
                "STRIDE_CHECKPOINT_A": _checkpoint_strides(plan.checkpoint_shape, True)[0],
                "REVERSE": self.reverse,
                "AT_SEQUENCE_END": spec.at_sequence_end,
            },
        )


def _checkpoint_strides(shape: tuple[int, int], straight: bool) -> tuple[int, int]:
    """Of a checkpoint (A, X): h and dv store it so, dq and dk read it as (X, A)."""
    return (shape[1], 1) if straight else (1, shape[1])


def _strides_of(name: str, x: Symbol | None) -> dict[str, int]:
    """Of a state, or zeros."""
    if x is None:
        return {f"stride_{name}{axis}": 0 for axis in "nhax"}
    return strides(name, x, "nhax")


def _kernel_of(tile: Tile, precision: str, of_x: bool) -> tuple[Any, dict[str, Any]]:
    """The kernel of a tile, and the constants that it alone has. of_x: are the row products those
    of x and y?"""
    if tile.hopper:
        from tfla.kernels.hopper import _scan_hopper_kernel

        return _scan_hopper_kernel, {"OF_X": of_x, "STAGES": tile.stages, "PARTS": tile.parts}
    if tile.mma:
        from tfla.kernels.mma import _scan_mma_kernel

        return _scan_mma_kernel, {
            "STAGES": tile.stages,
            "Y_AHEAD": tile.y_ahead,
            "WARPS": tile.warps,
            "PARTS": tile.parts,
        }
    return _scan_kernel, {
        "TRANSPOSED": tile.transposed,
        "DESCRIPTOR": tile.descriptor,
        "PRECISION": precision,
    }


def gate_gradients(
    i: Symbol, f: Symbol, dq: Scan, dk: Scan, weights: GateWeights, dtypes: tuple[Any, Any]
) -> tuple[Symbol, Symbol]:
    """(di, df) in these dtypes; see ``tfla.reference.gate_gradients``."""
    spec, plan, builder = weights.spec, weights.plan, i.builder
    B, T, H = spec.B, spec.T, spec.H
    di, df = (
        builder.new(name, B, T, H, dtype=name_of(dtype))
        for name, dtype in zip(("di", "df"), dtypes, strict=True)
    )
    column = dk.column
    assert dq.dot is not None and dk.dot is not None
    intervals = (
        T // plan.checkpoint_every + spec.N if spec.packed else B * -(-T // plan.checkpoint_every)
    )
    builder.launch(
        "gate gradients",
        gates._gradients_kernel,
        (intervals * H,),
        8,
        2,
        reads={
            "i": i,
            "f": f,
            "cu_seqlens": weights.cu_seqlens,
            "table": weights.tables[1],
            "weights": weights.vectors,
            "q_dq": dq.dot,
            "k_dk": dk.dot,
            "C_checkpoints": weights.C_checkpoints,
            "dC_checkpoints": weights.dC_checkpoints,
            "n_chunk": weights.n_chunk,
            "n_last": weights.n_final,
            "dn_chunk": None if column is None else column.dn_chunk,
        },
        writes={"di": di, "df": df},
        numbers=strides("i", i)
        | strides("f", f)
        | weights.common
        | {
            "checkpoints_per_head": weights.sizes.checkpoints,
            "size": weights.size,
            "K": spec.K,
            "state": plan.checkpoint_shape[0] * plan.checkpoint_shape[1],
        },
        constants={
            "L": plan.L,
            "CHECKPOINT_EVERY": plan.checkpoint_every,
            "BLOCK": power_of_two(plan.checkpoint_every),
            "BLOCK_K": plan.block_k,
            "Q_PARTS": dq.dot.shape[0],
            "K_PARTS": dk.dot.shape[0],
            "GRADIENT_I": gates.form_of(spec.input_gate).gradient,
            "SIGMOID_F": spec.sigmoid_f,
            "NORMALIZE": spec.normalize,
            "PACKED": spec.packed,
            "AT_SEQUENCE_END": spec.at_sequence_end,
        },
    )
    return di, df


def initial_gradients(dv: Scan, dk: Scan) -> tuple[Symbol, Symbol | None]:
    """(dC_0, dn_0): what the reverse scans leave at the start of the sequences."""
    assert dv.final is not None
    return dv.final, None if dk.column is None else dk.column.dn_first
