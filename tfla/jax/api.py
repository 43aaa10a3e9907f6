"""The public functions: checks, and one call of a backend.

Dimensions: B batch, T tokens, H heads, G groups of q and k, K q/k head dim, V v head dim, N
sequences.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tfla.jax import checks, dispatch, reference, shards
from tfla.jax.checks import State
from tfla.jax.spec import BackendName, InputGate, Inputs, Options
from tfla.plan import Device

__all__ = ["State", "linear_attention", "mlstm", "mlstm_step"]


def mlstm(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    *,
    input_gate: InputGate = "exp",
    normalize: bool | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Array | None = None,
    reverse: bool = False,
    group: None = None,
    backend: BackendName | None = None,
) -> tuple[Array, State | None]:
    r"""The mLSTM over whole sequences, as ``tfla.mlstm`` computes it.

        m_t = max(log_f_t + m_{t-1}, log_i_t)                         log_f = logsigmoid(f)
        C_t = exp(log_f_t + m_{t-1} - m_t) C_{t-1} + exp(log_i_t - m_t) k_t v_t^T
        n_t = exp(log_f_t + m_{t-1} - m_t) n_{t-1} + exp(log_i_t - m_t) k_t
        h_t = C_t^T (scale q_t) / max(|n_t . scale q_t|, exp(-m_t))

    with log_i = i for the exponential input gate. With the sigmoid gate log_i = logsigmoid(i), m =
    0, and there is no n and no division unless ``normalize=True``. Source: Beck et al., arXiv
    2405.04517 and 2503.14376 (mLSTMexp and mLSTMsig).

    Args:
        q, k: (B, T, G, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64. H is a multiple of
            G; head h reads group h // (H // G) of q and k.
        i, f: (B, T, H) gate pre-activations, any floating dtype; computed in fp32 (fp64 for fp64
            q). f = +-inf and i = -inf are exact limits. Log-gates above 2^100 (1.3e30) count as
            that, i = +inf among them, those below -2^100 as -inf. In fp32 a sum of gates has 24
            bits where it decides which token is the largest: beside 2^24 (2e7) of one gate a
            difference of 1 in another is lost. NaN stays NaN, in its own and later tokens.
        input_gate: "exp" or "sigmoid".
        normalize: divide by the normaliser? None: True for "exp", False for "sigmoid", the paper's
            two variants.
        scale: factor of q, a Python number; None: K ** -0.5.
        initial_state: State of N = B sequences (with ``cu_seqlens``: as many as are packed), or
            None for an empty memory.
        output_final_state: also return the state after the last token.
        cu_seqlens: (N + 1,) int32 or int64 offsets 0 = c_0 <= ... <= c_N = T of sequences packed
            along T; B must be 1. Traced offsets, and those on a GPU or TPU, are not read by the
            host: there an offset out of range or below an earlier one counts as the nearest that is
            not, and tokens before the first and behind the last get zeros, in h and in gradients.
        reverse: token t sees t, t + 1, ... in place of t, t - 1, ...: the same as T flipped in
            every input and in h, of packed sequences each by itself. The states are then those
            behind a sequence's last token and before its first.
        group: None; T is not split over processes here.
        backend: "reference" runs on all that JAX runs on; "triton" on NVIDIA GPUs of compute
            capability 8.0 or later, where Triton 3.6 to 3.9 is installed, in fp16, bf16 and fp32.
            None: "triton" where it can run, else "reference", on a GPU with one warning that says
            why. A function that is traced is planned for JAX's default device.

    What is not finite stays in its row of B, its packed sequence and its head (in all heads of a
    group, if it is in q or k), and in later tokens; NaN and inf in q, k and v may reach earlier
    tokens of their own chunk of up to 64. Finite inputs never spoil an earlier token.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None. JAX may differentiate them
        through the normaliser and through both states: on "reference" in both modes and any number
        of times, on "triton" once, in reverse mode.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: ``backend="triton"`` where it cannot serve the call.
        NotImplementedError: ``group``; on "triton" a derivative of a derivative.

    Example:
        >>> import jax, tfla.jax
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> q, k, v = (jax.random.normal(key, (2, 100, 4, 32)) for key in keys)
        >>> i, f = q[..., 0], k[..., 0] + 3
        >>> h, state = tfla.jax.mlstm(q, k, v, i, f, output_final_state=True)
        >>> h.shape, state.C.shape
        ((2, 100, 4, 32), (2, 4, 32, 32))
    """
    by_gate = checks.input_gate(input_gate)
    normalize = by_gate if normalize is None else normalize
    checks.array("i", i)
    checks.array("f", f)
    options = Options(0.0, input_gate, True, normalize, output_final_state, reverse)
    return _sequence(
        (q, k, v), {"i": i, "f": f}, scale, initial_state, cu_seqlens, group, backend, options
    )


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    log_f: Array | None = None,
    log_i: Array | None = None,
    *,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Array | None = None,
    reverse: bool = False,
    group: None = None,
    backend: BackendName | None = None,
) -> tuple[Array, State | None]:
    r"""Linear attention with scalar gates, as ``tfla.linear_attention`` computes it.

        C_t = exp(log_f_t) C_{t-1} + exp(log_i_t) k_t v_t^T          h_t = C_t^T (scale q_t)

    Linear attention has no gates; retention and Lightning attention a constant log_f per head,
    (H,); simple GLA log_f (B, T, H); Mamba-2's SSD log_f = A dt with q = C, k = B (G groups of
    them), v = dt x and scale = 1. With ``normalize`` h_t is divided by max(|n_t . scale q_t|, 1), n
    the same recurrence over k, in a gauge m that cannot overflow (see ``mlstm``). Source: arXiv
    2006.16236, 2307.08621, 2405.21060.

    Args:
        q, k: (B, T, G, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64.
        log_f, log_i: (B, T, H), (H,) or None (= 0): natural logarithms of the decay and of the
            weight of each token, with the limits of ``mlstm``. Positive ones are allowed, and may
            overflow when not normalised, as log_f = +inf does: that is the function asked for.
        normalize, scale, initial_state, output_final_state, cu_seqlens, reverse, group, backend: as
            in ``mlstm``.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in ``mlstm``.

    Example:
        >>> import jax, jax.numpy as jnp, tfla.jax
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> q, k, v = (jax.random.normal(key, (2, 100, 4, 32)) for key in keys)
        >>> retention = jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(4)))
        >>> h, _ = tfla.jax.linear_attention(q, k, v, retention)
    """
    gates = {"log_i": log_i, "log_f": log_f}
    options = Options(0.0, "exp", False, normalize, output_final_state, reverse)
    return _sequence((q, k, v), gates, scale, initial_state, cu_seqlens, group, backend, options)


def mlstm_step(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    state: State,
    *,
    input_gate: InputGate = "exp",
    normalize: bool | None = None,
    scale: float | None = None,
    inplace: bool = False,
    slots: Array | None = None,
    backend: BackendName | None = None,
) -> tuple[Array, State]:
    """One token of ``mlstm``: the decode step, as ``tfla.mlstm_step`` computes it.

    Args:
        q, k: (B, G, K), v: (B, H, V), i, f: (B, H): as in ``mlstm``, without the T axis.
        state: State of B rows; C and n in fp32 or bf16 (fp64 for fp64 q), returned in the dtype
            given; m in fp32 (fp64).
        input_gate, normalize, scale, backend: as in ``mlstm``.
        inplace: donate ``state``: the one returned lies where it lay, and its arrays are deleted.
            In a function that is traced (by ``jax.jit`` or ``jax.grad``, say) this changes nothing:
            there XLA updates in place what is not used again, and a program donates its own
            arguments.
        slots: (B,) int32 or int64: distinct rows of a larger state that the batch uses, and that
            come back in it; needs ``inplace=True``. Where the host does not read them (see
            ``cu_seqlens``), h is NaN for a row that does not exist, and no state is touched; where
            a row is named twice, its state and the h of both are of no use, but no other's.

    Returns:
        h: (B, H, V) in v's dtype, and the State after the token.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in ``mlstm``.

    Example:
        >>> import jax, tfla.jax
        >>> from jax.numpy import ones, zeros
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 32))
        >>> i, f = zeros((2, 4)), ones((2, 4))
        >>> state = tfla.jax.State(zeros((2, 4, 32, 32)), zeros((2, 4, 32)), zeros((2, 4)))
        >>> h, state = tfla.jax.mlstm_step(q, k, v, i, f, state)
    """
    by_gate = checks.input_gate(input_gate)
    normalize = by_gate if normalize is None else normalize
    checks.array("i", i)
    checks.array("f", f)
    checks.flags(normalize=normalize, inplace=inplace)
    q, k, v = checks.operands(q, k, v, ("B", "H"))
    (B, _, K), (H, V) = q.shape, v.shape[1:]
    i, f = checks.gate("i", i, v), checks.gate("f", f, v)
    rows = B if slots is None else None
    state = checks.state(state, normalize, v, (rows, H, K, V), "state", low=True)
    if slots is not None:
        slots = checks.slots(slots, B, state.C.shape[0], inplace)
    device = dispatch.pick_backend(backend, q, k, v, state.C)
    options = Options(checks.scale_of(scale, K), input_gate, True, normalize)
    arrays = _alike(q, k, v, i, f, state, slots)
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))
    run = _run_step_inplace if inplace and not is_traced else _run_step
    return run(*arrays, options=options, device=device)


# ---------------------------------------------------------------- what the three share


def _sequence(
    operands: tuple[Array, Array, Array],
    gates: dict[str, Array | None],
    scale: float | None,
    state: State | None,
    cu_seqlens: Array | None,
    group: None,
    backend: BackendName | None,
    options: Options,
) -> tuple[Array, State | None]:
    """gates: i and f by their names. options: all but the scale."""
    checks.flags(
        normalize=options.normalize,
        output_final_state=options.final_state,
        reverse=options.reverse,
    )
    checks.refuse_group(group)
    q, k, v = checks.operands(*operands, ("B", "T", "H"))
    (K, V), H = (q.shape[-1], v.shape[-1]), v.shape[-2]
    i, f = (checks.gate(name, x, v) for name, x in gates.items())
    offsets, N = checks.sequences(cu_seqlens, q)
    if state is not None:
        state = checks.state(state, options.normalize, v, (N, H, K, V), "initial_state")
    device = dispatch.pick_backend(backend, q, k, v)
    options = options.but(scale=checks.scale_of(scale, K))
    C, n, m = (None, None, None) if state is None else state
    inputs = Inputs(*_alike(q, k, v, i, f, C, n, m, offsets))
    return _run_sequence(inputs, options=options, device=device)


@partial(jax.jit, static_argnames=("options", "device"))
def _run_sequence(
    inputs: Inputs, *, options: Options, device: Device | None
) -> tuple[Array, State | None]:
    if device is None:
        h, C, n, m = reference.sequence(inputs, options)
    else:
        from tfla.jax import triton  # imports Triton

        h, C, n, m = triton.sequence(inputs, options, device)
    return h, State(C, n, m) if options.final_state else None


def _step(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    state: State,
    slots: Array | None,
    *,
    options: Options,
    device: Device | None,
) -> tuple[Array, State]:
    if device is None:
        step = reference.step
    else:
        from tfla.jax import triton  # imports Triton

        step = partial(triton.step, device=device)
    if slots is None:
        h, C, n, m = step(q, k, v, i, f, state, options)
        return h, State(C, n, m)
    N = len(state.C)
    is_row = (slots >= 0) & (slots < N)
    rows = jnp.where(is_row, slots, N)
    used = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), state)
    h, *after = step(q, k, v, i, f, used, options)
    h = jnp.where(is_row[:, None, None], h, jnp.nan)
    return h, jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), state, State(*after))


_static = "options", "device"
_run_step = jax.jit(_step, static_argnames=_static)
_run_step_inplace = jax.jit(_step, static_argnames=_static, donate_argnames="state")


def _alike(*arrays: Any) -> Any:
    """All of them vary over the axes of a mesh over which any does."""
    return shards.varying(arrays, shards.axes_of(arrays))
