"""The forward and the backward pass, written once over the primitive ``scan`` of a backend.

    forward     h  = scan(q, k, v; C_0)               D_ts = exp(p_s - M_t) scale / den_t
    backward    dq = scan([dh | d], [v | 1], k; [C_0 | n_0]^T)
                dk = reverse scan([v | 1], [dh | d], q; [dC_T | dn_T]^T)
                dv = reverse scan(k, q, dh; dC_T)

and the gate gradients follow: "triton" sums the row dot products q . dq and k . dk, "reference"
what flows across the border of each token. Nothing here knows which backend it is, nor which gate.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from tfla import log
from tfla.backend import Backend, D, Exchange, Results, S, W
from tfla.spec import BackendName, CallSpec, Inputs, X

if TYPE_CHECKING:  # both backends have all functions of the protocol, of these types
    from torch import Tensor

    from tfla import kernels, reference
    from tfla.kernels.program import Symbol

    _reference: Backend[Tensor, reference.GateWeights, reference.NormalizerGrad, reference.Scan]
    _reference = reference
    _triton: Backend[Symbol, kernels.GateWeights, kernels.NormalizerGrad, kernels.Scan] = kernels

BACKENDS: dict[BackendName, str] = {"reference": "tfla.reference", "triton": "tfla.kernels"}


@functools.cache  # the import machinery takes 3 us to say that it knows a module
def backend_of(name: BackendName) -> Backend[Any, Any, Any, Any]:
    """The backend of a name; its values go from one of its functions to another of its own."""
    found: Any = importlib.import_module(BACKENDS[name])
    return found


# ---------------------------------------------------------------- packed sequences


def can_fold_packing(backend: Backend[X, W, D, S], spec: CallSpec) -> bool:
    """May packed sequences be one to the backend? They may be where they neither start from states
    nor leave any: each begins by forgetting everything, exp(log_f + m - m') = 0, and df there is 0.
    A log_f above 0 could raise m beyond any log_f. The one is packed, too, for tokens that belong
    to no sequence are none of its."""
    if not (spec.packed and backend.FOLDS_PACKING) or spec.initial_state or spec.final_state:
        return False
    return spec.sigmoid_f or not spec.normalize


def _fold_packing(
    backend: Backend[X, W, D, S], x: Inputs[X], spec: CallSpec
) -> tuple[Inputs[X], CallSpec]:
    if x.cu_seqlens is None or not can_fold_packing(backend, spec):
        return x, spec
    f, ends = backend.fold_packing(x.f, x.cu_seqlens)
    return x._replace(f=f, cu_seqlens=ends), spec.but(N=1)


def ordered(backend: Backend[X, W, D, S], x: Inputs[X]) -> Inputs[X]:
    """x with offsets that the backend can rely on."""
    if x.cu_seqlens is None:
        return x
    return x._replace(cu_seqlens=backend.offsets(x.cu_seqlens, x.q.shape[1]))


def clear(backend: Backend[X, W, D, S], x: Inputs[X], *outputs: X) -> None:
    """Zeros in outputs (B, T, ...) at tokens that belong to no sequence."""
    if x.cu_seqlens is not None:
        backend.clear(x.cu_seqlens, *outputs)


# ---------------------------------------------------------------- forward


def forward(spec: CallSpec, *tensors: Any) -> Results:
    """(h, C_T, n_T, m_T, saved) of the tensors of ``Inputs``; None where nothing goes out."""
    if log.ON:
        log.sequence(spec)
    return _forward(backend_of(spec.backend), Inputs(*tensors), spec)


def _forward(backend: Backend[X, W, D, S], x: Inputs[X], spec: CallSpec) -> Results[X]:
    given = ordered(backend, x)
    x, one = _fold_packing(backend, given, spec)
    weights = backend.gate_weights(x, one)
    h = backend.scan("h", x.q, x.k, x.v, weights, x.C, final=spec.final_state)
    clear(backend, given, h.out)
    saved = backend.saved(weights) if spec.needs_grad else None
    C, n, m = h.final if spec.final_state else None, None, None
    if spec.normalize and spec.at_sequence_end:
        n, m = weights.n_final if spec.final_state else None, weights.m_final
    return h.out, C, n, m, saved


# ---------------------------------------------------------------- backward


BACKWARD = (*Inputs._fields, "h", "saved", "dh", "dC", "dn")  # what ``backward`` takes


def backward(spec: CallSpec, *tensors: Any) -> Results:
    """(dq, dk, dv, di, df, dC_0, dn_0) of the tensors that ``BACKWARD`` names and, if there is one,
    an ``Exchange``; None where there was no initial state."""
    x, (h, saved, dh, dC, dn, *exchange) = Inputs(*tensors[:9]), tensors[9:]
    # An output that was not wanted is empty, and so is its cotangent.
    dC = dC if spec.final_state else None
    dn = dn if spec.final_state and spec.normalize else None
    after = _After(h, saved, dh, dC, dn)
    return _backward(backend_of(spec.backend), x, spec, after, exchange[0] if exchange else None)


class _After(NamedTuple, Generic[X]):
    """What a backward pass takes besides the inputs of the forward pass."""

    h: X
    saved: X
    dh: X
    dC: X | None
    dn: X | None


def _backward(
    backend: Backend[X, W, D, S],
    x: Inputs,
    spec: CallSpec,
    after: _After[X],
    exchange: Exchange | None,
) -> Results[X]:
    """dq needs no final state: an exchange begins before it, and ends after it with dC and dn."""
    h, saved, dh, dC, dn = after
    given = ordered(backend, x)
    x, one = _fold_packing(backend, given, spec)
    weights = backend.gate_weights(x, one, saved)

    def scan_dv(dC: X | None, dot: X | None) -> S:
        return backend.scan("dv", x.k, x.q, dh, weights, dC, final=x.C is not None, dot=dot)

    dv: S | None = None
    column: D | None = None
    arrives = None
    # dv reads dh anyway: where nothing is exchanged, dh . h comes with it.
    if exchange is None:
        dv = scan_dv(dC, h if spec.normalize else None)
    if spec.normalize:
        column = backend.normalizer_grad(dh, h, x.q, x.n, weights, dv)
    if exchange is not None:
        arrives = exchange(weights, column)
    C_0 = None if x.C is None else x.C.mT
    dq = backend.scan("dq", dh, x.v, x.k, weights, C_0, column=column, dot=x.q)
    if arrives is not None:
        dC, dn = arrives()
    if dv is None:
        dv = scan_dv(dC, None)
    if column is not None:
        column = backend.with_final_grad(column, dn, weights)
    dC_T = None if dC is None else dC.mT
    dk = backend.scan("dk", x.v, dh, x.q, weights, dC_T, column=column, dot=x.k, dq=dq)
    di, df = backend.gate_gradients(x.i, x.f, dq, dk, weights, spec.gate_dtypes)
    clear(backend, given, dq.out, dk.out, dv.out, di, df)
    dC_0, dn_0 = (None, None) if x.C is None else backend.initial_gradients(dv, dk)
    return dq.out, dk.out, dv.out, di, df, dC_0, None if x.n is None else dn_0


def initial_gauge_gradient(
    C: Tensor | None, n: Tensor | None, dC: Tensor | None, dn: Tensor | None
) -> Tensor | None:
    """dm_0 (N, H) of an initial state and its gradients: the gauge scales both C and n."""
    if C is None or n is None or dC is None or dn is None:
        return None
    # In fp64: the two cancel where the normaliser is active.
    dm = (dC.double() * C).sum((-2, -1)) + (dn.double() * n).sum(-1)
    return dm.to(dn.dtype)
