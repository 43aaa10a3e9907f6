"""What a backend is: the few functions of the scan algebra, and the values between them.

The modules ``tfla.reference`` and ``tfla.kernels`` are backends; mypy holds them to this, where
``tfla.algorithm`` names them. X are the arrays that they work on: tensors, or symbols of them in a
pass that becomes a ``Program``. Each has types of its own for the three values that pass between
its functions: W, the weights of the tokens (``GateWeights``); D, the gradient of the division by
the normaliser (``NormalizerGrad``); S, what a scan leaves behind (``Scan``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from tfla.spec import CallSpec, Inputs, StepInputs, StepOptions, X

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ScanName = Literal["h", "dv", "dq", "dk"]
Results = tuple[X | None, ...]


X_co = TypeVar("X_co", covariant=True)


class FinalGauge(Protocol[X_co]):
    """Of the weights of a normalised call, once h is there: what belongs to the final state."""

    @property
    def n_final(self) -> X_co | None:
        """(N, H, K), or None where nothing is normalised."""

    @property
    def m_final(self) -> X_co | None:
        """(N, H), likewise."""


class Output(Protocol[X_co]):
    """Of what a scan leaves behind: its output and its last state."""

    @property
    def out(self) -> X_co:
        """(B, T, H, X), in the dtype of what was scanned."""

    @property
    def final(self) -> X_co | None:
        """(N, H, A, X): the state at the end (in reverse: the start) of each sequence, if asked."""


W = TypeVar("W", bound=FinalGauge[Any])
D = TypeVar("D")
S = TypeVar("S", bound=Output[Any])

# Begins what ranks exchange, of the weights and the normaliser's gradient; what it returns is
# called for (dC, dn) at the end of the sequences.
Exchange = Callable[[Any, Any], Callable[[], tuple[Any, Any]]]


class Backend(Protocol[X, W, D, S]):
    """The scan algebra. Shapes: q, k (B, T, H, K); v, h, dh (B, T, H, V); gates (B, T, H); states
    (N, H, ...). No function waits for the device, but "reference" to read offsets. The results of
    the scans of dv and dq may be there only when that of dk has run: a backward pass calls all
    three, and dk last."""

    @property
    def FOLDS_PACKING(self) -> bool:
        """Are packed sequences faster as one, made by ``fold_packing``?"""

    def gate_weights(self, x: Inputs[X], spec: CallSpec, saved: X | None = None) -> W:
        """The weights D_ts of all tokens. saved: what ``saved`` gave in the forward pass, in the
        backward pass."""

    def saved(self, weights: W) -> X:
        """What the backward pass needs of the forward's weights."""

    def saved_shape(self, spec: CallSpec) -> tuple[int, ...]:
        """The shape of that, in the dtype of states; sizes may be symbols."""

    def scan(
        self,
        name: ScanName,
        a: X,
        b: X,
        x: X,
        weights: W,
        state: X | None = None,
        *,
        column: D | None = None,
        dot: X | None = None,
        final: bool = True,
        dq: S | None = None,
    ) -> S:
        """out_t = sum_{s<=t} D_ts (a_t . b_s) x_s + w_t a_t^T state, "dv" and "dk" in reverse. See
        ``tfla.reference.scan``. dq: with "dk", the scan of dq, with which it may share work."""

    def normalizer_grad(self, dh: X, h: X, q: X, n: X | None, weights: W, dv: S | None) -> D:
        """The gradient of the division by the normaliser; ``dv``: its scan, where it ran before."""

    def with_final_grad(self, column: D, dn: X | None, weights: W) -> D:
        """The same, with dn (N, H, K), the gradient of the final n."""

    def gate_gradients(
        self,
        i: X,
        f: X,
        dq: S,
        dk: S,
        weights: W,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> tuple[X, X]:
        """(di, df), in these dtypes."""

    def initial_gradients(self, dv: S, dk: S) -> tuple[X, X | None]:
        """(dC_0, dn_0)."""

    def initial_state_decay(
        self, weights: Any, column: Any, first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) each: what the initial state weighs at every token, and d of ``column``: those
        that an ``Exchange`` is called with. first: (1,) the only sequence that matters, if
        packed."""

    def offsets(self, cu_seqlens: X, T: int) -> X:
        """Offsets that the other functions can rely on, whatever the values that come in."""

    def clear(self, offsets: X, *outputs: X) -> None:
        """Zeros in outputs (1, T, ...) at tokens that belong to no sequence."""

    def fold_packing(self, f: X, cu_seqlens: X) -> tuple[X, X]:
        """Packed sequences as one: its forget gates, closed where sequences begin, and offsets."""

    def update(self, x: StepInputs, options: StepOptions) -> Tensor:
        """One token: writes new states over old (in rows ``slots``, or all); h (B, H, V)."""

    def execute(
        self,
        function: Callable[..., Results],
        spec: CallSpec,
        tensors: tuple[Any, ...],
        exchange: Exchange | None = None,
    ) -> Results:
        """``function(spec, *tensors)``, or with ``exchange`` behind them. What the function does
        may depend on its spec and on strides and dtypes of the tensors, and on nothing else: a
        backend may know it from an earlier call."""
