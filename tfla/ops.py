"""The forward and the backward pass as PyTorch knows them: an autograd.Function and operators.

Eager calls take the autograd.Function (13 us), graphs the torch.library operators (60 to 90 us to
dispatch); both run the same two functions of ``tfla.algorithm``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from tfla import _compat, algorithm, log
from tfla.algorithm import backend_of, can_fold_packing
from tfla.backend import Exchange, Results
from tfla.dtypes import state_dtype
from tfla.spec import (
    OPTIONS,
    STEP_OPTIONS,
    CallSpec,
    Inputs,
    Options,
    State,
    StepInputs,
    StepOptions,
)


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """The dtypes of a backend are its own; nothing to do where autocast is off, which is the usual
    case."""
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def forward(x: Inputs, spec: CallSpec) -> tuple[Tensor, ...]:
    """(h, C_T, n_T, m_T, saved); empty tensors for what is not wanted or not there."""
    return _filled(_outputs(spec, x), state_dtype(spec.dtype))


def backward(
    dh: Tensor | None,
    dC: Tensor | None,
    dn: Tensor | None,
    h: Tensor,
    saved: Tensor,
    x: Inputs,
    spec: CallSpec,
    exchange: Exchange | None = None,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, di, df, dC_0, dn_0, dm_0); the last three are empty where there was no initial
    state. dq needs no final state: an ``exchange`` begins before it, and ends after it with dC and
    dn (see ``tfla.parallel``)."""
    grads = _gradients(spec, (*x, h, saved, dh, dC, dn), exchange)
    return _filled(grads, state_dtype(spec.dtype))


def _outputs(spec: CallSpec, x: tuple[Any, ...]) -> Results:
    """(h, C_T, n_T, m_T, saved), None for what is not wanted."""
    with no_autocast(x[0].device.type):
        return backend_of(spec.backend).execute(algorithm.forward, spec, x)


def _gradients(
    spec: CallSpec, tensors: tuple[Any, ...], exchange: Exchange | None = None
) -> Results:
    """(dq, dk, dv, di, df, dC_0, dn_0, dm_0) of what ``algorithm.backward`` takes."""
    *head, h, saved, dh, dC, dn = tensors
    with no_autocast(h.device.type):
        if dh is None:
            tensors = *head, h, saved, torch.zeros_like(h), dC, dn
        backend = backend_of(spec.backend)
        *grads, dC_0, dn_0 = backend.execute(algorithm.backward, spec, tensors, exchange)
        x: Inputs[Any] = Inputs(*head)
        return *grads, dC_0, dn_0, algorithm.initial_gauge_gradient(x.C, x.n, dC_0, dn_0)


def _filled(results: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """An operator's results are tensors, and distinct."""
    first: Any = results[0]
    return tuple(first.new_empty(0, dtype=dtype) if t is None else t for t in results)


def run(x: Inputs, spec: CallSpec) -> tuple[Any, ...]:
    """(h, C_T, n_T, m_T), differentiable; states that are not wanted may be None."""
    if torch.compiler.is_compiling():
        return torch.ops.tfla.forward(*x, *spec.options)[:4]
    _refuse_transforms()
    if by_operator(*x):
        return torch.ops.tfla.forward(*x, *spec.options)[:4]
    if spec.needs_grad or _compat.forward_derivatives():
        return _Forward.apply(spec, *x)
    return _outputs(spec, x)[:4]


def step(x: StepInputs, options: StepOptions, inplace: bool) -> tuple[Tensor, State]:
    """One token, no gradient: h and the state after it, written over the one that came if
    ``inplace``."""
    if not inplace:
        n, m = (None if s is None else s.clone() for s in (x.n, x.m))
        x = x._replace(C=x.C.clone(), n=n, m=m)
    tracing = torch.compiler.is_compiling()
    if not tracing:
        _refuse_transforms()
    h = torch.ops.tfla.step(*x, *options) if tracing or by_operator(*x) else _step(x, options)
    return h, State(x.C, x.n, x.m)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def by_operator(*tensors: Tensor | None) -> bool:
    """Is somebody to see the operators in place of what they do: a dispatch mode (selective
    checkpointing, FakeTensorMode, modes that count) or tensors of another make, or of no values?"""
    if _compat.dispatch_modes() or tensors[0].is_meta:  # type: ignore[union-attr]
        return True
    return not are_plain(*tensors)


def are_plain(*tensors: Any) -> bool:
    """Are these torch's own tensors, or None?"""
    return _PLAIN.issuperset(map(type, tensors))


# ---------------------------------------------------------------- eager


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: CallSpec, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        h, C, n, m, saved = _outputs(spec, tensors)
        ctx.spec = spec
        ctx.save_for_backward(*tensors, h, saved)
        if m is not None:
            ctx.mark_non_differentiable(m)
        ctx.set_materialize_grads(False)
        return h, C, n, m

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("tfla has no forward-mode derivatives: use torch.autograd.grad.")

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None, _: Any) -> Any:
        _refuse_batches(dh, dC, dn)
        tensors = *ctx.saved_tensors, dh, dC, dn
        if torch.is_grad_enabled():  # create_graph: a node that refuses
            grads = _Backward.apply(ctx.spec, *tensors)
        else:
            grads = _gradients(ctx.spec, tensors)
        return None, *match(grads, tensors), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: CallSpec, *tensors: Tensor | None) -> Any:
        return _gradients(spec, tensors)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        refuse_second_derivative()


def match(grads: tuple[Any, ...], x: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the eight differentiable inputs, None for the states that were not given,
    in the dtypes given."""
    pairs = zip(grads, x[:8], strict=True)
    return tuple([t if t is None else g if g.dtype == t.dtype else g.to(t.dtype) for g, t in pairs])


def _refuse_transforms() -> None:
    # Torch's own error, in Function.apply, asks for a change of this file.
    if _compat.functorch_transforms():
        raise RuntimeError(
            "tfla does not run under the transforms of torch.func (vmap, grad, jvp and the like): "
            "put what vmap maps over into B, and take gradients with torch.autograd.grad."
        )


def _refuse_batches(*cotangents: Tensor | None) -> None:
    # The batches of torch.autograd are no transform of torch.func: only the tensors show them.
    if any([x is not None and _compat.is_batched(x) for x in cotangents]):
        raise RuntimeError(
            "tfla's backward pass does not take a batch of gradients (is_grads_batched=True, "
            "jacobian with vectorize=True): call torch.autograd.grad once for each of them, or "
            "jacobian with vectorize=False."
        )


def refuse_second_derivative() -> None:
    raise RuntimeError(
        "tfla computes first derivatives only: the gradients of mlstm and linear_attention cannot "
        "be differentiated again. Call backward without create_graph=True, or detach the gradients "
        "before you use them in a loss."
    )


# ---------------------------------------------------------------- torch.library


# The operators' one list of arguments: tensors, then what they do not say.
CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? C, Tensor? n, Tensor? m, Tensor? "
    f"cu_seqlens, {OPTIONS}"
)


def call_of(*args: Any) -> tuple[Inputs, CallSpec]:
    """The arguments of ``CALL`` as values with names."""
    x = Inputs(*args[:9])
    return x, CallSpec.of(x, Options(*args[9:17]))


@torch.library.custom_op(
    "tfla::forward",
    mutates_args=(),
    schema=f"({CALL}) -> (Tensor h, Tensor C_T, Tensor n_T, Tensor m_T, Tensor saved)",
)
def _forward_op(*args: Any) -> tuple[Tensor, ...]:
    return forward(*call_of(*args))


@_forward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    x, spec = call_of(*args)

    def new(*shape: int) -> Tensor:
        return x.q.new_empty(shape, dtype=state_dtype(spec.dtype))

    N, H, K, V = spec.N, spec.H, spec.K, spec.V
    normalized = spec.final_state and spec.normalize
    C = new(N, H, K, V) if spec.final_state else new(0)
    n, m = (new(N, H, K), new(N, H)) if normalized else (new(0), new(0))
    saved = new(0)
    if spec.needs_grad:
        backend = backend_of(spec.backend)
        one = spec.but(N=1) if can_fold_packing(backend, spec) else spec
        saved = new(*backend.saved_shape(one))
    return x.v.new_empty(x.v.shape), C, n, m, saved


@torch.library.custom_op(
    "tfla::backward",
    mutates_args=(),
    schema=f"(Tensor? dh, Tensor? dC, Tensor? dn, Tensor h, Tensor saved, {CALL}) -> (Tensor dq, "
    "Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dC_0, Tensor dn_0, Tensor dm_0)",
)
def _backward_op(
    dh: Tensor | None, dC: Tensor | None, dn: Tensor | None, h: Tensor, saved: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return backward(dh, dC, dn, h, saved, *call_of(*args))


@_backward_op.register_fake
def _(dh: Any, dC: Any, dn: Any, h: Tensor, saved: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return gradients_like(*call_of(*args))


def gradients_like(x: Inputs, spec: CallSpec) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes of what ``backward`` returns."""
    states = (x.C, x.n, x.m)
    return (
        *(t.new_empty(t.shape) for t in (x.q, x.k, x.v, x.i, x.f)),
        *(
            x.q.new_empty((0,) if t is None else t.shape, dtype=state_dtype(spec.dtype))
            for t in states
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, _, _, m, saved = output
    ctx.options = inputs[9:]
    ctx.save_for_backward(h, saved, *inputs[:9])
    ctx.mark_non_differentiable(m, saved)
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, dh: Any, dC: Any, dn: Any, *_: Any) -> tuple[Any, ...]:
    h, saved, *tensors = ctx.saved_tensors
    grads = torch.ops.tfla.backward(dh, dC, dn, h, saved, *tensors, *ctx.options)
    return *match(grads, Inputs(*tensors)), *[None] * (1 + len(ctx.options))


def _backward_of_backward(ctx: Any, *_: Any) -> None:
    refuse_second_derivative()


_forward_op.register_autograd(_backward_of_forward, setup_context=_setup_context)
_backward_op.register_autograd(_backward_of_backward)


def _step(x: StepInputs, options: StepOptions) -> Tensor:
    if log.ON:
        log.step(x, options)
    with no_autocast(x.q.device.type):
        return backend_of(options.backend).update(x, options)


# The operator's list of arguments: the tensors of ``StepInputs``, then ``StepOptions``.
STEP = (
    "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, Tensor(b!)? n, "
    f"Tensor(c!)? m, Tensor? slots, {STEP_OPTIONS}"
)


@torch.library.custom_op("tfla::step", mutates_args=("C", "n", "m"), schema=f"({STEP}) -> Tensor h")
def _step_op(*args: Any) -> Tensor:
    return _step(StepInputs(*args[:9]), StepOptions(*args[9:]))


@_step_op.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(StepInputs(*args[:9]).v, memory_format=torch.contiguous_format)
