"""A call as a value: its tensors by name, and all that it is besides their numbers.

Dimensions: B batch, T tokens, H heads, G heads of q and k, K q/k head dim, V v head dim, N
sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:  # who has JAX may have no torch
    import torch
    from torch import Tensor

    from tfla.plan import Device

BackendName = Literal["reference", "triton"]
Precision = Literal["ieee", "tf32"]


class Array(Protocol):
    """A tensor, or what a backend has in its place."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def mT(self) -> Any:
        """With its last two axes exchanged."""


X = TypeVar("X", bound=Array)


class State(NamedTuple):
    """The state of N sequences: all that a linear recurrent model remembers.

    C: (N, H, K, V) memory. n: (N, H, K) normaliser and m: (N, H) gauge, or None when the layer is
    not normalised.
    fp32, or fp64 for fp64 inputs. m is a gauge: (C, n, m) and (e^-c C, e^-c n, m + c) are the same
    state, so compare C e^m and n e^m, never C and m by themselves; m carries no gradient.
    """

    C: Tensor
    n: Tensor | None
    m: Tensor | None

    def detach(self) -> State:
        """The same state, cut off from the graph (truncated backpropagation through time)."""
        return State(*(None if t is None else t.detach() for t in self))  # type: ignore[arg-type]


State.__module__ = "tfla"  # pickled by its public name, wherever it is defined


class Activations(NamedTuple):
    """How log-gates come from what the caller passes."""

    input_gate: str  # the name of a gate of ``tfla.gates``; a log_i that is passed is that of "exp"
    sigmoid_f: bool  # log_f = logsigmoid(f), else f is log_f already


class TritonForm(NamedTuple):
    """An input gate as two ``@triton.jit`` functions. Each is compiled into the kernels that call
    it, works on scalars and blocks, and keeps the dtype that comes in."""

    log_i: Any  # (i) -> log_i: fp64 over sequences, fp32 in the decode step
    gradient: Any  # (dlog_i, i) -> di, fp32


class Inputs(NamedTuple, Generic[X]):
    """The tensors of a call over sequences."""

    q: X  # (B, T, G, K)
    k: X  # (B, T, G, K)
    v: X  # (B, T, H, V)
    i: X  # (B, T, H)
    f: X  # (B, T, H)
    C: X | None  # (N, H, K, V)
    n: X | None  # (N, H, K)
    m: X | None  # (N, H)
    cu_seqlens: X | None  # (N + 1,)


class Options(NamedTuple):
    """What a call is that its tensors do not say: what the operators take besides tensors."""

    scale: float  # of q, not negative
    input_gate: str  # the name of a gate of ``tfla.gates``
    sigmoid_f: bool  # log_f = logsigmoid(f), else f is log_f
    normalize: bool  # is h divided by the normaliser?
    final_state: bool  # does the state after the last token go out?
    needs_grad: bool  # will there be a backward pass?
    backend: str
    precision: str  # of products of fp32 numbers: "ieee", 24 bits, or "tf32", 11 or more


# The same in the language of torch.library's schemas.
OPTIONS = (
    "float scale, str input_gate, bool sigmoid_f, bool normalize, bool final_state, "
    "bool needs_grad, str backend, str precision"
)


class StepInputs(NamedTuple):
    """The tensors of a call of one token."""

    q: Tensor  # (B, G, K)
    k: Tensor  # (B, G, K)
    v: Tensor  # (B, H, V)
    i: Tensor  # (B, H)
    f: Tensor  # (B, H)
    C: Tensor  # (N, H, K, V)
    n: Tensor | None  # (N, H, K); None where nothing is normalised
    m: Tensor | None  # (N, H), likewise
    slots: Tensor | None  # (B,) rows of the states; None: all, in their order


class StepOptions(NamedTuple):
    """What a call of one token is that its tensors do not say."""

    scale: float  # of q
    input_gate: str  # the name of a gate of ``tfla.gates``
    sigmoid_f: bool  # log_f = logsigmoid(f), else f is log_f
    backend: BackendName

    @property
    def activations(self) -> Activations:
        return Activations(self.input_gate, self.sigmoid_f)


STEP_OPTIONS = "float scale, str input_gate, bool sigmoid_f, str backend"


@dataclass(frozen=True, eq=False)
class CallSpec:
    """All that a call over sequences is besides its data. Validation makes it, once for calls that
    are alike, and everything below takes it. Equal ones describe the same call.

    In a graph that is being traced sizes may be symbols; such a spec is no key.
    """

    B: int  # rows; 1 if packed
    T: int  # tokens in each, of this rank
    H: int  # heads of v, the gates and the states
    G: int  # of q and k: head h of v reads group h // (H // G)
    K: int  # width of q and k
    V: int  # width of v and h
    N: int  # sequences: B, or as many as are packed
    packed: bool  # are sequences packed along T?
    # Of q, k, v and h, and of i and f. On "triton" NumPy's dtypes, as JAX has them, do as well.
    dtype: torch.dtype
    gate_dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device | Device  # where the tensors are, or what is planned for
    initial_state: bool  # does a state come in?
    scale: float  # of q, not negative
    input_gate: str  # the name of a gate of ``tfla.gates``
    sigmoid_f: bool  # log_f = logsigmoid(f), else f is log_f
    normalize: bool  # is h divided by the normaliser?
    final_state: bool  # does the state after the last token go out?
    needs_grad: bool  # will there be a backward pass?
    backend: BackendName
    precision: Precision  # of products of fp32 numbers: "ieee", 24 bits, or "tf32", 11 or more
    split: bool = False  # is T split over processes?
    # Where the rows are those of many calls alike, how many one of them has: it plans for all, so
    # that what is saved is laid out as if they came one by one. None: it is one call.
    planned_rows: int | None = None

    @staticmethod
    def of(x: Inputs[Tensor], options: Options) -> CallSpec:
        """The call of these tensors."""
        (B, T, H, V), (G, K), packed = x.v.shape, x.q.shape[-2:], x.cu_seqlens is not None
        N = B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
        return CallSpec(
            B,
            T,
            H,
            G,
            K,
            V,
            N,
            packed,
            x.q.dtype,
            (x.i.dtype, x.f.dtype),
            x.q.device,
            x.C is not None,
            *options,  # type: ignore[arg-type]
        )

    @property
    def options(self) -> Options:
        return Options(
            self.scale,
            self.input_gate,
            self.sigmoid_f,
            self.normalize,
            self.final_state,
            self.needs_grad,
            self.backend,
            self.precision,
        )

    @property
    def activations(self) -> Activations:
        return Activations(self.input_gate, self.sigmoid_f)

    @property
    def R(self) -> int:
        """Heads of a group: those that share a head of q and k."""
        return self.H // self.G

    @property
    def at_sequence_end(self) -> bool:
        """May there be gradients of the states where sequences end?"""
        return self.final_state or self.split

    def but(self, **fields: Any) -> CallSpec:
        """The same with some fields changed."""
        return dataclasses.replace(self, **fields)

    # A spec is a part of keys of calls: hashed once, and compared by identity where it is the same.
    def _key(self) -> tuple[Any, ...]:
        found = self.__dict__.get("_values")
        if found is None:
            found = self.__dict__["_values"] = tuple(
                [getattr(self, field.name) for field in dataclasses.fields(self)]
            )
        return found

    def __hash__(self) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = hash(self._key())
        return found

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, CallSpec) and self._key() == other._key()
