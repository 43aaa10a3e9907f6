"""The public functions: from what a person types to one call of the operators.

Dimensions: B batch, T tokens, H heads, K q/k head dim, V v head dim, L chunk length, N sequences,
G segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tfla import checks, dispatch, ops, parallel
from tfla import gates as input_gates
from tfla.checks import State
from tfla.gates import Activations, InputGate
from tfla.offsets import check_offsets
from tfla.spec import BackendName, CallSpec, Inputs, Options, products_of

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
        q, k: (B, T, H, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64; any strides. Under
            autocast they are cast first.
        i, f: (B, T, H) gate pre-activations, any floating dtype; computed in fp32 (fp64 for fp64
            q), their sums in fp64. f = +-inf and i = -inf are exact limits. Log-gates above 2^100
            (1.3e30) count as that, i = +inf among them, those below -2^100 as -inf. A sum of gates
            has 53 bits: sums of gates up to 1e6 are exact to 1e-8, and beside 2^53 (9e15) of one
            gate a difference of 1 in another is lost. The final m is fp32 (fp64 for fp64 q): up
            to 1e9 its rounding is made up for by C and n, beyond it m alone is rounded. NaN stays
            NaN, in its own and later tokens.
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
        reverse: token t sees t, t + 1, ... in place of t, t - 1, ...; True is not implemented yet.
        group: a torch.distributed process group (or DeviceMesh of one dimension) over whose ranks T
            is split evenly, in rank order: each rank gives and gets its own tokens, but the whole
            ``cu_seqlens`` and ``initial_state``, and gets the whole final state. Gradients are
            those of the sum of all ranks' losses; that of ``initial_state`` is on the rank where a
            sequence begins, 0 on the others. All ranks must call, and run backward.
        backend: None picks the fastest that can do it; "reference" or "triton" is obeyed or raises.

    What is not finite stays in its row of B and its head, and in later tokens; NaN and inf in q, k
    and v may reach earlier tokens of their own chunk of up to 64. It stays in its packed sequence,
    but for "triton" without states in or out: there sequences run as one row, in which a closed
    forget gate clears the state, and NaN and inf may reach the two neighbours of a sequence (on
    Hopper, whose kernel multiplies the state by 0, all that follow, or in gradients precede it).
    Finite inputs never spoil an earlier token.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None. Gradients are exact for any
        loss, through the normaliser and through both states; a second derivative raises
        RuntimeError.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted. RuntimeError: a
        named backend cannot serve. NotImplementedError: ``reverse=True``, and fewer heads of q and
        k than of v, which are to come.

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
        q,
        k,
        v,
        i,
        f,
        ("i", "f"),
        activations,
        normalize,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        reverse,
        group,
        backend,
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
    r"""Linear attention with scalar gates: the mother of the family.

        C_t = exp(log_f_t) C_{t-1} + exp(log_i_t) k_t v_t^T          h_t = C_t^T (scale q_t)

    Linear attention has no gates; retention and Lightning attention a constant log_f per head,
    (H,); simple GLA log_f (B, T, H); Mamba-2's SSD log_f = A dt with q = C, k = B, v = dt x and
    scale = 1 (log_i = log dt is the same function, but its gradient is NaN where dt = 0, which is
    how padding is masked). With ``normalize`` h_t is divided by max(|n_t . scale q_t|, 1), n the
    same recurrence over k, in a gauge m that cannot overflow (see ``mlstm``). Source: arXiv
    2006.16236, 2307.08621, 2405.21060.

    Args:
        q, k: (B, T, H, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64; any strides.
        log_f, log_i: (B, T, H), (H,) or None (= 0): natural logarithms of the decay and of the
            weight of each token, with the limits of ``mlstm``. Positive ones are allowed, and may
            overflow when not normalised, as log_f = +inf does: that is the function asked for.
        normalize, scale, initial_state, output_final_state, cu_seqlens, reverse, group, backend: as
            in ``mlstm``.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None. One token (T = 1) without
        gradients takes the decode step.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in ``mlstm``.

    Example:
        >>> import torch, tfla
        >>> q, k, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
        >>> retention = torch.log1p(-torch.exp2(-5.0 - torch.arange(4)))
        >>> h, _ = tfla.linear_attention(q, k, v, retention)
    """
    activations = Activations("exp", sigmoid_f=False)
    return _sequence(
        q,
        k,
        v,
        log_i,
        log_f,
        ("log_i", "log_f"),
        activations,
        normalize,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        reverse,
        group,
        backend,
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
        q, k: (B, H, K), v: (B, H, V), i, f: (B, H): as in ``mlstm``, without the T axis.
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
        TypeError, ValueError, RuntimeError, NotImplementedError: as in ``mlstm``.

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
    gates = {"i": checks.tensor("i", i), "f": checks.tensor("f", f)}
    return _step(q, k, v, gates, activations, normalize, scale, state, inplace, slots, backend)


# ---------------------------------------------------------------- what the three share


# Calls that were validated, by all that validation depends on but the values of offsets.
_specs: dict[tuple[Any, ...], CallSpec] = {}


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor | None,
    f: Tensor | None,
    names: tuple[str, str],
    activations: Activations,
    normalize: bool,
    scale: float | None,
    state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
    group: Any,
    backend: BackendName | None,
) -> tuple[Tensor, State | None]:
    key, spec = None, None
    # What is no State is no plain tensor either, and validation says so.
    given: Any = (None, None, None) if state is None else state if type(state) is State else (0,)
    tensors = q, k, v, i, f, cu_seqlens, *given
    if group is None and reverse is False and ops.are_plain(*tensors) and _is_usual(q):
        grad = torch.is_grad_enabled()
        needs_grad = grad and any([t is not None and t.requires_grad for t in tensors])
        key = (
            activations,
            normalize,
            type(normalize),
            scale,
            type(scale),
            output_final_state,
            type(output_final_state),
            backend,
            needs_grad,
            products_of(q.dtype),
            *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
        )
        try:
            spec = _specs.get(key)
        except TypeError:  # an argument of a kind that is no key
            key = None
    if spec is not None and spec.backend == dispatch.pick_backend(backend, q):
        if cu_seqlens is not None and checks.host_has_values(cu_seqlens):
            check_offsets(cu_seqlens, spec.T)
        i, f = checks.expanded(i, q), checks.expanded(f, q)
    else:
        q, k, v, i, f, state, spec, group = _validated(
            q,
            k,
            v,
            i,
            f,
            names,
            activations,
            normalize,
            scale,
            state,
            output_final_state,
            cu_seqlens,
            reverse,
            group,
            backend,
        )
        if key is not None:
            if len(_specs) >= 10_000:  # lengths without end
                _specs.clear()
            _specs[key] = spec
    if spec.T == 1 and not (spec.packed or spec.needs_grad) and group is None:
        # The decode step, from an empty memory if there is no other.
        h, after = _run_step(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            i[:, 0],
            f[:, 0],
            state or _empty_state(q, spec),
            activations,
            -spec.scale if _is_negative(scale) else spec.scale,
            False,
            None,
            spec.backend,
        )
        return h[:, None], after if output_final_state else None
    if _is_negative(scale):  # the kernels take the scale into an exponent
        q = -q
    C, n, m = (None, None, None) if state is None else state
    h, C, n, m = _run(Inputs(q, k, v, i, f, C, n, m, cu_seqlens), spec, group)
    if not output_final_state:
        return h, None
    return h, State(C, n, m) if normalize else State(C, None, None)


def _is_usual(q: Tensor | None) -> bool:
    """Is a call like others that look like it? Not where autocast would cast, nor in a trace."""
    device = "meta" if q is None else q.device.type
    if torch.compiler.is_compiling() or device == "meta":
        return False
    return not torch.is_autocast_enabled(device)


def _is_negative(scale: float | None) -> bool:
    return scale is not None and scale < 0


def _validated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor | None,
    f: Tensor | None,
    names: tuple[str, str],
    activations: Activations,
    normalize: bool,
    scale: float | None,
    state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
    group: Any,
    backend: BackendName | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, State | None, CallSpec, Any]:
    """(q, k, v, i, f, state, spec, group), checked, cast and expanded."""
    if names[0] == "i":  # of mlstm, where neither may be left out
        checks.tensor("i", i)
        checks.tensor("f", f)
    checks.flags(normalize=normalize, output_final_state=output_final_state, reverse=reverse)
    checks.refuse_reverse(reverse)
    q, k, v = checks.operands(q, k, v, ("B", "T", "H"))
    H, K, V = *q.shape[2:], v.shape[-1]
    i, f = checks.gate_tensor(names[0], i, q), checks.gate_tensor(names[1], f, q)
    group = checks.group_of(group)
    N = checks.sequences(cu_seqlens, q, 1 if group is None else group.size())
    if state is not None:
        state = checks.check_state(state, normalize, q, (N, H, K, V), "initial_state")
    name = dispatch.pick_backend(backend, q)
    needs_grad = checks.requires_grad(q, k, v, i, f, state)
    options = Options(
        abs(checks.scale_of(scale, K)),
        *activations,
        normalize,
        output_final_state,
        needs_grad,
        name,
        products_of(q.dtype),
    )
    C, n, m = (None, None, None) if state is None else state
    spec = CallSpec.of(Inputs(q, k, v, i, f, C, n, m, cu_seqlens), options)
    return q, k, v, i, f, state, spec, group


def _empty_state(q: Tensor, spec: CallSpec) -> State:
    def zeros(*shape: int) -> Tensor:
        return q.new_zeros(shape, dtype=spec.state_dtype)

    N, H, K, V = spec.N, spec.H, spec.K, spec.V
    n, m = (zeros(N, H, K), zeros(N, H)) if spec.normalize else (None, None)
    return State(zeros(N, H, K, V), n, m)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor | None],
    activations: Activations,
    normalize: bool,
    scale: float | None,
    state: State,
    inplace: bool,
    slots: Tensor | None,
    backend: BackendName | None,
) -> tuple[Tensor, State]:
    checks.flags(normalize=normalize, inplace=inplace)
    q, k, v = checks.operands(q, k, v, ("B", "H"))
    B, H, K = q.shape
    V = v.shape[-1]
    i, f = (checks.gate_tensor(name, x, q) for name, x in gates.items())
    rows = None if slots is not None else B
    state = checks.check_state(state, normalize, q, (rows, H, K, V), "state", low=True)
    if inplace:
        checks.check_writable(state)
    if slots is not None:
        checks.check_slots(slots, B, state.C.shape[0], q, inplace)
    name = dispatch.pick_backend(backend, q)
    scale = checks.scale_of(scale, K)
    needs_grad = checks.requires_grad(q, k, v, i, f, state)
    if inplace and needs_grad:
        raise ValueError(
            "inplace=True overwrites the state, which autograd would need: call under "
            "torch.no_grad(), detach the inputs, or use inplace=False."
        )
    if not needs_grad:
        return _run_step(q, k, v, i, f, state, activations, scale, inplace, slots, name)
    if scale < 0:
        q, scale = -q, -scale
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    C, n, m = (None if s is None else s.to(full) for s in state)
    one = (x[:, None] for x in (q, k, v, i, f))
    options = Options(scale, *activations, normalize, True, True, name, products_of(q.dtype))
    inputs = Inputs(*one, C, n, m, None)  # type: ignore[call-arg]
    h, *after = _run(inputs, CallSpec.of(inputs, options), None)
    # C and n go back in the dtypes that they came in; what is not there stays None.
    end = [None if s is None else t.to(s.dtype) for s, t in zip(state, after[:3], strict=True)]
    return h[:, 0], State(*end)  # type: ignore[arg-type]


def _run(inputs: Inputs, spec: CallSpec, group: Any) -> tuple[Any, ...]:
    """(h, C, n, m). Triton's interpreter multiplies the bit patterns of bf16 tiles as if they were
    integers (3.6 to 3.9), so what it would get in bf16 it gets in fp32, and gives back in bf16."""
    q, k, v = inputs.q, inputs.k, inputs.v
    narrow = spec.backend == "triton" and spec.dtype == torch.bfloat16 and checks.interpreted()
    if narrow:
        inputs = inputs._replace(q=q.float(), k=k.float(), v=v.float())
        spec = spec.but(dtype=torch.float32, precision=products_of(torch.float32))
    h, *after = ops.run(inputs, spec) if group is None else parallel.run(inputs, spec, group)
    return h.to(v.dtype) if narrow else h, *after


def _run_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    activations: Activations,
    scale: float,
    inplace: bool,
    slots: Tensor | None,
    backend: BackendName,
) -> tuple[Tensor, State]:
    h, *after = ops.step(q, k, v, i, f, *state, slots, scale, activations, inplace, backend)
    return h, state if inplace else State(*after)  # type: ignore[arg-type]
