"""What a backend is: the few functions of the scan algebra, and the values between them.

The modules ``tfla.reference`` and ``tfla.kernels`` are backends; mypy holds them to this, where
``tfla.algorithm`` names them. Each has types of its own for the three values that pass between its
functions: W, the weights of the tokens (``GateWeights``); D, the gradient of the division by the
normaliser (``NormalizerGrad``); S, what a scan leaves behind (``Scan``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from tfla.spec import CallSpec, Inputs, StepInputs, StepOptions

ScanName = Literal["h", "dv", "dq", "dk"]
Results = tuple[Tensor | None, ...]


class FinalGauge(Protocol):
    """Of the weights of a normalised call, once h is there: what belongs to the final state."""

    @property
    def n_final(self) -> Tensor | None:
        """(N, H, K), or None where nothing is normalised."""

    @property
    def m_final(self) -> Tensor | None:
        """(N, H), likewise."""


class Output(Protocol):
    """Of what a scan leaves behind: its output and its last state."""

    @property
    def out(self) -> Tensor:
        """(B, T, H, X), in the dtype of what was scanned."""

    @property
    def final(self) -> Tensor | None:
        """(N, H, A, X): the state at the end (in reverse: the start) of each sequence, if asked."""


W = TypeVar("W", bound=FinalGauge)
D = TypeVar("D")
S = TypeVar("S", bound=Output)


class Backend(Protocol[W, D, S]):
    """The scan algebra. Shapes: q, k (B, T, H, K); v, h, dh (B, T, H, V); gates (B, T, H); states
    (N, H, ...). No function waits for the device."""

    @property
    def FOLDS_PACKING(self) -> bool:
        """Are packed sequences faster as one, made by ``fold_packing``?"""

    def gate_weights(
        self, x: Inputs, spec: CallSpec, at_ends: bool, saved: Tensor | None = None
    ) -> W:
        """The weights D_ts of all tokens. at_ends: may there be a dC where sequences end? saved:
        what ``saved`` gave in the forward pass, in the backward pass."""

    def saved(self, weights: W) -> Tensor:
        """What the backward pass needs of the forward's weights."""

    def saved_shape(self, spec: CallSpec, at_ends: bool) -> tuple[int, ...]:
        """The shape of that, in the dtype of states; sizes may be symbols."""

    def scan(
        self,
        name: ScanName,
        a: Tensor,
        b: Tensor,
        x: Tensor,
        weights: W,
        state: Tensor | None = None,
        *,
        column: D | None = None,
        dot: Tensor | None = None,
        against: S | None = None,
        final: bool = True,
    ) -> S:
        """out_t = sum_{s<=t} D_ts (a_t . b_s) x_s + w_t a_t^T state, "dv" and "dk" in reverse. See
        ``tfla.reference.scan``."""

    def normalizer_grad(
        self, dh: Tensor, h: Tensor, q: Tensor, n: Tensor | None, weights: W, dv: S | None
    ) -> D:
        """The gradient of the division by the normaliser; ``dv``: its scan, where it ran before."""

    def with_final_grad(self, column: D, dn: Tensor | None, weights: W) -> D:
        """The same, with dn (N, H, K), the gradient of the final n."""

    def gate_gradients(
        self, i: Tensor, f: Tensor, dq: S, dk: S, weights: W
    ) -> tuple[Tensor, Tensor]:
        """(di, df), in the dtype of states."""

    def initial_gradients(self, dv: S, dk: S) -> tuple[Tensor, Tensor | None]:
        """(dC_0, dn_0)."""

    def initial_state_decay(
        self, weights: W, column: D | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) each: what the initial state weighs at every token, and d of ``column``.
        first: (1,) the only sequence that matters, if packed."""

    def offsets(self, cu_seqlens: Tensor, T: int) -> Tensor:
        """Offsets that the other functions can rely on, whatever the values that come in."""

    def clear(self, offsets: Tensor, *outputs: Tensor) -> None:
        """Zeros in outputs (1, T, ...) at tokens that belong to no sequence."""

    def fold_packing(self, f: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Packed sequences as one: its forget gates, closed where sequences begin, and offsets."""

    def update(self, x: StepInputs, options: StepOptions) -> Tensor:
        """One token: writes new states over old (in rows ``slots``, or all); h (B, H, V)."""

    def execute(
        self, function: Callable[..., Results], spec: CallSpec, tensors: tuple[Any, ...]
    ) -> Results:
        """``function(spec, *tensors)``, which a backend may know from an earlier call."""
