"""The public functions: from what a person types to one call of the operators.

Dimensions: B batch, T tokens, H heads, G heads of q and k, K and V head dims, N sequences.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfla import checks, dispatch, ops, parallel, shapes
from tfla import gates as input_gates
from tfla.dtypes import products_of, state_dtype
from tfla.gates import InputGate
from tfla.offsets import check_offsets
from tfla.spec import (
    Activations,
    BackendName,
    CallSpec,
    Inputs,
    Options,
    State,
    StepInputs,
    StepOptions,
)

__all__ = ["State", "linear_attention", "mlstm", "mlstm_step"]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: InputGate = "exp",
    normalize: bool | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    group: Any = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, State | None]:
    r"""The mLSTM over whole sequences.

        m_t = max(log_f_t + m_{t-1}, log_i_t)                         log_f = logsigmoid(f)
        C_t = exp(log_f_t + m_{t-1} - m_t) C_{t-1} + exp(log_i_t - m_t) k_t v_t^T
        n_t = exp(log_f_t + m_{t-1} - m_t) n_{t-1} + exp(log_i_t - m_t) k_t
        h_t = C_t^T (scale q_t) / max(|n_t . scale q_t|, exp(-m_t))

    with log_i = i for the exponential input gate. With the sigmoid gate log_i = logsigmoid(i), m =
    0, and there is no n and no division unless ``normalize=True``. Source: Beck et al., arXiv
    2405.04517 and 2503.14376 (mLSTMexp and mLSTMsig).

    Args:
        q, k: (B, T, G, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64; any strides. Under
            autocast they are cast first. H is a multiple of G: head h reads group h // (H // G) of
            q and k, and dq and dk are sums over a group, made in fp32.
        i, f: (B, T, H) gate pre-activations, any floating dtype; computed in fp32 (fp64 for fp64
            q), their sums in fp64. f = +-inf and i = -inf are exact limits. Log-gates above 2^100
            (1.3e30) count as 2^100, i = +inf among them; those below -2^100 count as -inf. Sums of
            gates have 53 bits: up to 1e6 they are exact to 1e-8, and next to a gate of 2^53 (9e15)
            a difference of 1 in another is lost. The final m is fp32 (fp64 for fp64 q). Up to 1e9
            C and n compensate for its rounding. NaN stays NaN, in its own and later tokens.
        input_gate: "exp" or "sigmoid".
        normalize: divide by the normaliser? None: True for "exp", False for "sigmoid", the paper's
            two variants.
        scale: factor of q; None: K ** -0.5.
        initial_state: State of N = B sequences (with ``cu_seqlens``: as many as are packed), or
            None for an empty memory.
        output_final_state: also return the state after the last token.
        cu_seqlens: (N + 1,) int32 or int64 offsets 0 = c_0 <= ... <= c_N = T of sequences packed
            along T, any stride; B must be 1. On a GPU the host does not read them: there an offset
            out of range or below an earlier one counts as the nearest that is not, and tokens
            before the first and behind the last get zeros, in h and in gradients.
        reverse: token t sees t, t + 1, ... in place of t, t - 1, ...: the same as T flipped in
            every input and in h, of packed sequences each by itself. The states are then those
            behind a sequence's last token and before its first.
        group: a torch.distributed process group (or DeviceMesh of one dimension) over whose ranks T
            is split evenly, in rank order. Each rank passes its own tokens, but the whole
            ``cu_seqlens`` and ``initial_state``; it gets h of its own tokens and the whole final
            state. Gradients are those of the sum of all ranks' losses; that of ``initial_state`` is
            on the rank where a sequence begins, 0 on the others. All ranks must call, and all must
            run the backward pass.
        backend: None picks the fastest that supports the call; "reference" or "triton" runs or
            raises an error.

    NaN and inf reach later tokens of their head and their row of B, and no other head or row. Those
    in q, k and v may also reach earlier tokens of their own chunk of up to 64. They stay in their
    packed sequence, except on "triton" without states in or out. There packed sequences run as one
    row, in which a closed forget gate clears the state, and NaN and inf may reach the two
    neighbours of a sequence (on Hopper, whose kernel multiplies the state by 0, all that follow;
    in gradients, all that precede). Finite inputs never spoil an earlier token.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None. Gradients are exact for any
        loss, through the normaliser and through both states; a second derivative raises
        RuntimeError.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: the backend that ``backend`` names cannot serve the call.

    Example:
        >>> import torch, tfla
        >>> q, k, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
        >>> i, f = torch.randn(2, 100, 4), torch.randn(2, 100, 4) + 3
        >>> h, state = tfla.mlstm(q, k, v, i, f, output_final_state=True)
        >>> h.shape, state.C.shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 4, 32, 32]))
    """
    gate = input_gates.input_gate(input_gate)
    normalize = gate.normalize if normalize is None else normalize
    activations = Activations(gate.name, sigmoid_f=True)
    return _sequence(
        _Call(
            q=q,
            k=k,
            v=v,
            i=i,
            f=f,
            gate_names=("i", "f"),
            activations=activations,
            normalize=normalize,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            group=group,
            backend=backend,
        )
    )


def mlstm_allowing_tf32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: InputGate,
    normalize: bool,
    initial_state: State | None,
    output_final_state: bool,
) -> tuple[Tensor, State | None]:
    """``mlstm`` with fp32 products as ``torch.set_float32_matmul_precision("high")`` makes them,
    whatever torch is set to: for integrations whose callers know kernels that compute in TF32."""
    return _sequence(
        _Call(
            q=q,
            k=k,
            v=v,
            i=i,
            f=f,
            gate_names=("i", "f"),
            activations=Activations(input_gates.input_gate(input_gate).name, sigmoid_f=True),
            normalize=normalize,
            scale=None,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=None,
            reverse=False,
            group=None,
            backend=None,
            allow_tf32=True,
        )
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor | None = None,
    log_i: Tensor | None = None,
    *,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    group: Any = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, State | None]:
    r"""Linear attention with scalar gates: the family that ``mlstm`` belongs to.

        C_t = exp(log_f_t) C_{t-1} + exp(log_i_t) k_t v_t^T          h_t = C_t^T (scale q_t)

    Linear attention has no gates; retention and Lightning attention a constant log_f per head,
    (H,); simple GLA log_f (B, T, H); Mamba-2's SSD log_f = A dt with q = C, k = B, v = dt x and
    scale = 1 (log_i = log dt is the same function, but its gradient is NaN where dt = 0, which is
    how padding is masked). With ``normalize`` h_t is divided by max(|n_t . scale q_t|, 1), n the
    same recurrence over k, in a gauge m that cannot overflow (see ``mlstm``). Source: arXiv
    2006.16236, 2307.08621, 2405.21060.

    Args:
        q, k: (B, T, G, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64; any strides; H a
            multiple of G, as in ``mlstm`` (Mamba-2's B and C have G = 1 or 8).
        log_f, log_i: (B, T, H), (H,) or None (= 0): natural logarithms of the decay and of the
            weight of each token, with the limits of ``mlstm``. Positive ones are allowed, and may
            overflow when not normalised, as log_f = +inf does, because the function does.
        normalize, scale, initial_state, output_final_state, cu_seqlens, reverse, group, backend: as
            in ``mlstm``.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None. One token (T = 1) without
        gradients takes the decode step.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``mlstm``.

    Example:
        >>> import torch, tfla
        >>> q, k, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
        >>> retention = torch.log1p(-torch.exp2(-5.0 - torch.arange(4)))
        >>> h, _ = tfla.linear_attention(q, k, v, retention)
    """
    activations = Activations("exp", sigmoid_f=False)
    return _sequence(
        _Call(
            q=q,
            k=k,
            v=v,
            i=log_i,
            f=log_f,
            gate_names=("log_i", "log_f"),
            activations=activations,
            normalize=normalize,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            group=group,
            backend=backend,
        )
    )


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    *,
    input_gate: InputGate = "exp",
    normalize: bool | None = None,
    scale: float | None = None,
    inplace: bool = False,
    slots: Tensor | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, State]:
    """One token of ``mlstm``: the decode step.

    Args:
        q, k: (B, G, K), v: (B, H, V), i, f: (B, H): as in ``mlstm``, without the T axis.
        state: State of B rows; C and n in fp32 or bf16 (fp64 for fp64 q), returned in the dtype
            given; m in fp32 (fp64).
        input_gate, normalize, scale, backend: as in ``mlstm``.
        inplace: update ``state`` itself and return it; raises if anything requires grad.
        slots: (B,) int32 or int64, any stride: distinct rows of a larger in-place state that the
            batch uses; needs ``inplace=True``. On a GPU the host does not read them: there h is NaN
            for a row that does not exist, and no state is touched; where a row is named twice, its
            state and the h of both are of no use, but no other's.

    Returns:
        h: (B, H, V) in v's dtype, and the State after the token.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``mlstm``.

    Example:
        >>> import torch, tfla
        >>> q, k, v = torch.randn(3, 2, 4, 32).unbind(0)
        >>> i, f = torch.zeros(2, 4), torch.ones(2, 4)
        >>> state = tfla.State(torch.zeros(2, 4, 32, 32), torch.zeros(2, 4, 32), torch.zeros(2, 4))
        >>> h, state = tfla.mlstm_step(q, k, v, i, f, state)
    """
    gate = input_gates.input_gate(input_gate)
    normalize = gate.normalize if normalize is None else normalize
    activations = Activations(gate.name, sigmoid_f=True)
    checks.tensor("i", i)
    checks.tensor("f", f)
    return _step(
        _StepCall(
            q=q,
            k=k,
            v=v,
            i=i,
            f=f,
            activations=activations,
            normalize=normalize,
            scale=scale,
            state=state,
            inplace=inplace,
            slots=slots,
            backend=backend,
        )
    )


# ---------------------------------------------------------------- calls over sequences


class _Call(NamedTuple):
    """A call of ``mlstm`` or ``linear_attention``, as it came."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor | None
    f: Tensor | None
    gate_names: tuple[str, str]  # of i and f, for messages
    activations: Activations
    normalize: bool
    scale: float | None
    initial_state: State | None
    output_final_state: bool
    cu_seqlens: Tensor | None
    reverse: bool
    group: Any
    backend: BackendName | None
    allow_tf32: bool = False  # for fp32 products, whatever torch is set to

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All of them. What is no State is no plain tensor either, and validation says so."""
        state = self.initial_state
        given: Any = (
            (None, None, None) if state is None else state if type(state) is State else (0,)
        )
        return self.q, self.k, self.v, self.i, self.f, self.cu_seqlens, *given


class _ValidCall(NamedTuple):
    """A call whose arguments were checked, cast and expanded."""

    inputs: Inputs  # q and k with the heads that were given
    spec: CallSpec
    group: Any = None


# Calls that were validated, by all that validation depends on but the values of offsets.
_specs: dict[tuple[Any, ...], CallSpec] = {}
MOST_KEPT = 10_000  # of those, and of steps: lengths without end


def _sequence(call: _Call) -> tuple[Tensor, State | None]:
    valid = _known(call, key := _key(call))
    if valid is None:
        valid = _validated(call)
        if key is not None:
            _keep(_specs, key, valid.spec)
    x, spec, group = valid
    if spec.T == 1 and not (spec.packed or spec.needs_grad) and group is None:
        h, state = _step_of_sequence(x, spec, _is_negative(call.scale))
        return h, state if spec.final_state else None
    if _is_negative(call.scale):  # the kernels take the scale into an exponent
        x = x._replace(q=-x.q)
    ranks = 1 if group is None else group.size()
    if call.reverse:
        x = shapes.mirrored(x, spec.T * ranks)
    h, C, n, m = _run(x, spec, group, call.reverse)
    if call.reverse:
        h = h.flip(1)
        C, n, m = shapes.mirrored_states((C, n, m), spec.packed)
    if not spec.final_state:
        return h, None
    return h, State(C, n, m) if spec.normalize else State(C, None, None)


def _key(call: _Call) -> tuple[Any, ...] | None:
    """What the validation of a call depends on, or None where it must be done anew."""
    tensors = call.tensors
    if call.group is not None or not (ops.are_plain(*tensors) and _is_usual(call.q)):
        return None
    needs_grad = torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in tensors]
    )
    options = call.normalize, call.scale, call.output_final_state, call.reverse
    return (
        call.activations,
        *options,
        *[type(option) for option in options],  # True is 1 to a dictionary
        call.backend,
        needs_grad,
        products_of(call.q.dtype, call.allow_tf32),
        *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
    )


def _known(call: _Call, key: tuple[Any, ...] | None) -> _ValidCall | None:
    """The call with the spec of one that was validated before; offsets are always looked at."""
    try:
        spec = None if key is None else _specs.get(key)
    except TypeError:  # an argument of a kind that is no key
        return None
    if spec is None or spec.backend != dispatch.pick_backend(call.backend, call.q):
        return None
    if call.cu_seqlens is not None and checks.host_has_values(call.cu_seqlens):
        check_offsets(call.cu_seqlens, spec.T)
    i, f = checks.expanded(call.i, call.v), checks.expanded(call.f, call.v)
    C, n, m = call.initial_state or (None, None, None)
    return _ValidCall(Inputs(call.q, call.k, call.v, i, f, C, n, m, call.cu_seqlens), spec)


def _keep(shelf: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    with contextlib.suppress(TypeError):  # an argument of a kind that is no key
        if len(shelf) >= MOST_KEPT:
            shelf.clear()
        shelf[key] = value


def _validated(call: _Call) -> _ValidCall:
    normalize, state = call.normalize, call.initial_state
    for name, gate in zip(call.gate_names, (call.i, call.f), strict=True):
        if not name.startswith("log_"):  # only of linear_attention may they be left out
            checks.tensor(name, gate)
    checks.flags(
        normalize=normalize, output_final_state=call.output_final_state, reverse=call.reverse
    )
    q, k, v = checks.operands(call.q, call.k, call.v, ("B", "T", "H"))
    H, K, V = v.shape[2], q.shape[-1], v.shape[-1]
    i, f = (
        checks.gate_tensor(name, gate, v)
        for name, gate in zip(call.gate_names, (call.i, call.f), strict=True)
    )
    group = checks.group_of(call.group)
    N = checks.sequences(call.cu_seqlens, q, 1 if group is None else group.size())
    if state is not None:
        state = checks.check_state(state, normalize, q, (N, H, K, V), "initial_state")
    name = dispatch.pick_backend(call.backend, q)
    scale = abs(checks.scale_of(call.scale, K))
    needs_grad = checks.requires_grad(q, k, v, i, f, state)
    options = Options(
        scale,
        *call.activations,
        normalize,
        call.output_final_state,
        needs_grad,
        name,
        products_of(q.dtype, call.allow_tf32),
    )
    C, n, m = state or (None, None, None)
    inputs = Inputs(q, k, v, i, f, C, n, m, call.cu_seqlens)
    return _ValidCall(inputs, CallSpec.of(inputs, options), group)


def _is_usual(q: Tensor | None) -> bool:
    """Is a call like others that look like it? Not where autocast would cast, nor in a trace."""
    device = "meta" if q is None else q.device.type
    if torch.compiler.is_compiling() or device == "meta":
        return False
    return not torch.is_autocast_enabled(device)


def _is_negative(scale: float | None) -> bool:
    return scale is not None and scale < 0


def _run(x: Inputs, spec: CallSpec, group: Any = None, reverse: bool = False) -> tuple[Any, ...]:
    """(h, C, n, m) of inputs that are mirrored already; reverse: the last rank of the group holds
    the first tokens. Triton's interpreter multiplies the bit patterns of bf16 tiles as if they were
    integers (3.6 to 3.9), so what it would get in bf16 it gets in fp32, and gives back in bf16."""
    q, k, v = x.q, x.k, x.v
    narrow = spec.backend == "triton" and spec.dtype == torch.bfloat16 and checks.interpreted()
    if narrow:
        x = x._replace(q=q.float(), k=k.float(), v=v.float())
        spec = spec.but(dtype=torch.float32, precision=products_of(torch.float32))
    if group is None:
        h, *after = ops.run(x, spec)
    else:
        h, *after = parallel.run(x, spec, group, reverse)
    return h.to(v.dtype) if narrow else h, *after


# ---------------------------------------------------------------- calls of one token


def _step_of_sequence(x: Inputs, spec: CallSpec, negative: bool) -> tuple[Tensor, State]:
    """A sequence of one token, as the decode step; from an empty memory if there is no other."""
    C, n, m = x.C, x.n, x.m
    if C is None:
        N, H, K, V = spec.N, spec.H, spec.K, spec.V
        C = x.q.new_zeros(N, H, K, V, dtype=state_dtype(spec.dtype))
        n, m = (C.new_zeros(N, H, K), C.new_zeros(N, H)) if spec.normalize else (None, None)
    q, k, v, i, f = (t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f))
    scale = -spec.scale if negative else spec.scale
    options = StepOptions(scale, spec.input_gate, spec.sigmoid_f, spec.backend)
    h, after = _run_step(StepInputs(q, k, v, i, f, C, n, m, None), options, inplace=False)
    return h[:, None], after


class _StepCall(NamedTuple):
    """A call of ``mlstm_step``, as it came."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor
    activations: Activations
    normalize: bool
    scale: float | None
    state: State
    inplace: bool
    slots: Tensor | None
    backend: BackendName | None


# Steps without gradients that were validated, by all that validation depends on but the values of
# slots.
_steps: dict[tuple[Any, ...], StepOptions] = {}


def _step(call: _StepCall) -> tuple[Tensor, State]:
    key = _step_key(call)
    try:
        options = None if key is None else _steps.get(key)
    except TypeError:  # an argument of a kind that is no key
        options, key = None, None
    if options is not None and options.backend == dispatch.pick_backend(call.backend, call.q):
        if call.slots is not None:
            checks.check_slot_values(call.slots, call.state.C.shape[0])
        x = StepInputs(call.q, call.k, call.v, call.i, call.f, *call.state, call.slots)
        return _run_step(x, options, call.inplace)
    x, options, needs_grad = _validated_step(call)
    if needs_grad:
        return _step_with_gradients(x, options, call.normalize)
    if key is not None:
        _keep(_steps, key, options)
    return _run_step(x, options, call.inplace)


def _step_key(call: _StepCall) -> tuple[Any, ...] | None:
    """What the validation of a step depends on, or None where it must be done anew."""
    if type(call.state) is not State:
        return None
    tensors = call.q, call.k, call.v, call.i, call.f, call.slots, *call.state
    if not (ops.are_plain(*tensors) and _is_usual(call.q)):
        return None
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return None
    options = call.normalize, call.scale, call.inplace
    return (
        call.activations,
        *options,
        *[type(option) for option in options],
        call.backend,
        *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
        *[None if t is None else t.stride() for t in call.state],  # two in one place are refused
    )


def _validated_step(call: _StepCall) -> tuple[StepInputs, StepOptions, bool]:
    """The call as the operators take it, and whether gradients are wanted."""
    checks.flags(normalize=call.normalize, inplace=call.inplace)
    q, k, v = checks.operands(call.q, call.k, call.v, ("B", "H"))
    (B, H, V), K = v.shape, q.shape[-1]
    i, f = checks.gate_tensor("i", call.i, v), checks.gate_tensor("f", call.f, v)
    rows = None if call.slots is not None else B
    state = checks.check_state(call.state, call.normalize, q, (rows, H, K, V), "state", low=True)
    if call.inplace:
        checks.check_writable(state)
    if call.slots is not None:
        checks.check_slots(call.slots, B, state.C.shape[0], q, call.inplace)
    name = dispatch.pick_backend(call.backend, q)
    needs_grad = checks.requires_grad(q, k, v, i, f, state)
    if call.inplace and needs_grad:
        raise ValueError(
            "inplace=True overwrites the state, which autograd would need: call under "
            "torch.no_grad(), detach the inputs, or use inplace=False."
        )
    options = StepOptions(checks.scale_of(call.scale, K), *call.activations, name)
    return StepInputs(q, k, v, i, f, *state, call.slots), options, needs_grad


def _run_step(x: StepInputs, options: StepOptions, inplace: bool) -> tuple[Tensor, State]:
    given = State(x.C, x.n, x.m)
    h, after = ops.step(x, options, inplace)
    return h, given if inplace else after


def _step_with_gradients(
    x: StepInputs, options: StepOptions, normalize: bool
) -> tuple[Tensor, State]:
    """A step as a sequence of one token."""
    q, scale = (-x.q, -options.scale) if options.scale < 0 else (x.q, options.scale)
    states = x.C, x.n, x.m
    C, n, m = (None if s is None else s.to(state_dtype(q.dtype)) for s in states)
    q, k, v, i, f = (t[:, None] for t in (q, x.k, x.v, x.i, x.f))
    one = Inputs(q, k, v, i, f, C, n, m, None)
    names = options.input_gate, options.sigmoid_f
    wanted = Options(scale, *names, normalize, True, True, options.backend, products_of(q.dtype))
    h, *after = _run(one, CallSpec.of(one, wanted))
    # C and n go back in the dtypes that they came in; what is not there stays None.
    end = [None if s is None else t.to(s.dtype) for s, t in zip(states, after, strict=True)]
    return h[:, 0], State(*end)  # type: ignore[arg-type]
