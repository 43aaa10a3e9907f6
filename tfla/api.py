"""The public functions: argument checks, dtypes, the choice of a backend, and nothing else.

Dimensions: B batch, T tokens, H heads, K q/k head dim, V v head dim, L chunk length, N sequences, G segments.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfla import ops
from tfla.gates import INPUT_GATES, Activations

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class State(NamedTuple):
    """The state of N sequences: all that a linear recurrent model remembers.

    C: (N, H, K, V) memory. n: (N, H, K) normaliser and m: (N, H) gauge, or None when the layer is not normalised.
    fp32, or fp64 for fp64 inputs. m is a gauge: (C, n, m) and (e^-c C, e^-c n, m + c) are the same state, so compare C e^m and
    n e^m, never C and m by themselves; m carries no gradient.
    """

    C: Tensor
    n: Tensor | None
    m: Tensor | None

    def detach(self) -> State:
        """The same state, cut off from the graph (truncated backpropagation through time)."""
        return State(*(None if t is None else t.detach() for t in self))  # type: ignore[arg-type]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: str = "exp",
    normalize: bool | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    r"""The mLSTM over whole sequences.

        m_t = max(log_f_t + m_{t-1}, log_i_t)                         log_f = logsigmoid(f)
        C_t = exp(log_f_t + m_{t-1} - m_t) C_{t-1} + exp(log_i_t - m_t) k_t v_t^T
        n_t = exp(log_f_t + m_{t-1} - m_t) n_{t-1} + exp(log_i_t - m_t) k_t
        h_t = C_t^T (scale q_t) / max(|n_t . scale q_t|, exp(-m_t))

    with log_i = i for the exponential input gate. With the sigmoid gate log_i = logsigmoid(i), m = 0, and there is no n and no
    division unless ``normalize=True``. Source: Beck et al., arXiv 2405.04517 and 2503.14376 (mLSTMexp and mLSTMsig).

    Args:
        q, k: (B, T, H, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64; any strides. Under autocast they are cast first.
        i, f: (B, T, H) gate pre-activations, any floating dtype; computed in fp32 (fp64 for fp64 q).
        input_gate: "exp" or "sigmoid".
        normalize: divide by the normaliser? None: True for "exp", False for "sigmoid", the paper's two variants.
        scale: factor of q; None: K ** -0.5.
        initial_state: State of N = B sequences (with ``cu_seqlens``: as many as are packed), or None for an empty memory.
        output_final_state: also return the state after the last token.
        cu_seqlens: (N + 1,) int32 or int64 offsets 0 = c_0 <= ... <= c_N = T of sequences packed along T; B must be 1.
        backend: None picks the fastest that can do it; "reference" or "triton" is obeyed or raises.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None. Gradients are exact for any loss, through the normaliser and
        through both states; a second derivative raises RuntimeError.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted. RuntimeError: a named backend cannot serve.

    Example:
        >>> import torch, tfla
        >>> q, k, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
        >>> i, f = torch.randn(2, 100, 4), torch.randn(2, 100, 4) + 3
        >>> h, state = tfla.mlstm(q, k, v, i, f, output_final_state=True)
        >>> h.shape, state.C.shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 4, 32, 32]))
    """
    gate = _gate(input_gate)
    normalize = gate.normalize if normalize is None else normalize
    activations = Activations(sigmoid_i=gate.sigmoid, sigmoid_f=True)
    gate_tensors = {"i": _tensor("i", i), "f": _tensor("f", f)}
    return _sequence(
        q, k, v, gate_tensors, activations, normalize, scale, initial_state, output_final_state, cu_seqlens, backend
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
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    r"""Linear attention with scalar gates: the mother of the family.

        C_t = exp(log_f_t) C_{t-1} + exp(log_i_t) k_t v_t^T          h_t = C_t^T (scale q_t)

    Linear attention has no gates; retention and Lightning attention a constant log_f per head, (H,); simple GLA log_f (B, T, H);
    Mamba-2's SSD log_f = A dt and log_i = log dt, with q = C, k = B, v = x. With ``normalize`` h_t is divided by max(|n_t . scale q_t|, 1),
    n the same recurrence over k, in a gauge m that cannot overflow (see ``mlstm``). Source: arXiv 2006.16236, 2307.08621, 2405.21060.

    Args:
        q, k: (B, T, H, K), v: (B, T, H, V); one dtype of fp16, bf16, fp32, fp64; any strides.
        log_f, log_i: (B, T, H), (H,) or None (= 0): natural logarithms of the decay and of the weight of each token. Positive ones are
            allowed, and may overflow when not normalised: that is the function asked for.
        normalize, scale, initial_state, output_final_state, cu_seqlens, backend: as in ``mlstm``.

    Returns:
        h: (B, T, H, V) in v's dtype, and the final State or None. One token (T = 1) without gradients takes the decode step.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``mlstm``.

    Example:
        >>> import torch, tfla
        >>> q, k, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
        >>> retention = torch.log1p(-torch.exp2(-5.0 - torch.arange(4)))
        >>> h, _ = tfla.linear_attention(q, k, v, retention)
    """
    gates = {"log_i": log_i, "log_f": log_f}
    activations = Activations(sigmoid_i=False, sigmoid_f=False)
    return _sequence(
        q, k, v, gates, activations, normalize, scale, initial_state, output_final_state, cu_seqlens, backend
    )


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    *,
    input_gate: str = "exp",
    normalize: bool | None = None,
    scale: float | None = None,
    inplace: bool = False,
    slots: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One token of ``mlstm``: the decode step.

    Args:
        q, k: (B, H, K), v: (B, H, V), i, f: (B, H): as in ``mlstm``, without the T axis.
        state: State of B rows; C and n in fp32 or bf16 (fp64 for fp64 q), returned in the dtype given; m in fp32 (fp64).
        input_gate, normalize, scale, backend: as in ``mlstm``.
        inplace: update ``state`` itself and return it; raises if anything requires grad.
        slots: (B,) int32 or int64, distinct rows of a larger in-place state that the batch uses; needs ``inplace=True``.

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
    gate = _gate(input_gate)
    normalize = gate.normalize if normalize is None else normalize
    activations = Activations(sigmoid_i=gate.sigmoid, sigmoid_f=True)
    gates = {"i": _tensor("i", i), "f": _tensor("f", f)}
    return _step(q, k, v, gates, activations, normalize, scale, state, inplace, slots, backend)


# ---------------------------------------------------------------- what the three share


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    activations: Activations,
    normalize: bool,
    scale: float | None,
    state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, State | None]:
    q, k, v = _operands(q, k, v, ("B", "T", "H"))
    B, T, H, K = q.shape
    V = v.shape[-1]
    i, f = (_log_gate(name, x, q) for name, x in gates.items())
    N = _sequences(cu_seqlens, q)
    if state is not None:
        state = _check_state(state, normalize, q, (N, H, K, V), "initial_state")
    name = pick_backend(backend, q)
    scale = _scale(scale, K)
    if T == 1 and cu_seqlens is None and not _requires_grad(q, k, v, i, f, state):
        # The decode step, from an empty memory if there is no other.
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        if state is None:
            n, m = (q.new_zeros(B, H, K, dtype=dtype), q.new_zeros(B, H, dtype=dtype)) if normalize else (None, None)
            state = State(q.new_zeros(B, H, K, V, dtype=dtype), n, m)
        h, after = _run_step(*(x[:, 0] for x in (q, k, v, i, f)), state, activations, scale, False, None, name)
        return h[:, None], after if output_final_state else None
    if scale < 0:  # the kernels take the scale into an exponent
        q, scale = -q, -scale
    C, n, m = (None, None, None) if state is None else state
    options = ops.Options(scale, *activations, normalize, output_final_state, name)
    h, C, n, m, _ = ops.run(ops.Inputs(q, k, v, i, f, C, n, m, cu_seqlens), options)
    if not output_final_state:
        return h, None
    return h, State(C, n, m) if normalize else State(C, None, None)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    activations: Activations,
    normalize: bool,
    scale: float | None,
    state: State,
    inplace: bool,
    slots: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, State]:
    q, k, v = _operands(q, k, v, ("B", "H"))
    B, H, K = q.shape
    V = v.shape[-1]
    i, f = (_log_gate(name, x, q) for name, x in gates.items())
    if slots is not None:
        if not inplace:
            raise ValueError("slots says which rows of an in-place state the batch uses; pass inplace=True with it.")
        if slots.shape != (B,) or slots.dtype not in (torch.int32, torch.int64) or slots.device != q.device:
            raise ValueError(
                f"slots must be ({B},) int32 or int64 on {q.device}, one row of the state for each of the {B} in the batch; "
                f"got {_what(slots)}."
            )
    rows = None if slots is not None else B
    state = _check_state(state, normalize, q, (rows, H, K, V), "state", low=True)
    name = pick_backend(backend, q)
    scale = _scale(scale, K)
    needs_grad = _requires_grad(q, k, v, i, f, state)
    if inplace and needs_grad:
        raise ValueError(
            "inplace=True overwrites the state, which autograd would need: call under torch.no_grad(), detach the inputs, "
            "or use inplace=False."
        )
    if not needs_grad:
        return _run_step(q, k, v, i, f, state, activations, scale, inplace, slots, name)
    dtypes = (state.C.dtype, None if state.n is None else state.n.dtype)
    if scale < 0:
        q, scale = -q, -scale
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide = (None if s is None else s.to(full) for s in state)
    options = ops.Options(scale, *activations, normalize, True, name)
    h, C, n, m, _ = ops.run(ops.Inputs(*(x[:, None] for x in (q, k, v, i, f)), *wide, None), options)
    C, n, m = C.to(dtypes[0]), (n.to(dtypes[1]) if normalize else None), (m if normalize else None)
    return h[:, 0], State(C, n, m)


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
    backend: str,
) -> tuple[Tensor, State]:
    h, *after = ops.step(q, k, v, i, f, *state, slots, scale, activations, inplace, backend)
    return h, state if inplace else State(*after)


# ---------------------------------------------------------------- checks


def _gate(name: str) -> Any:
    if name not in INPUT_GATES:
        raise ValueError(f"input_gate must be one of {', '.join(map(repr, INPUT_GATES))}; got {name!r}.")
    return INPUT_GATES[name]


def _what(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    return f"{type(x).__name__} {x!r}" if isinstance(x, (int, float, str, bool, type(None))) else type(x).__name__


def _tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {_what(x)}.")
    return x


def _operands(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        last = "V" if name == "v" else "K"
        if _tensor(name, x).dim() != len(axes) + 1:
            raise ValueError(f"{name} must have {len(axes) + 1} axes ({', '.join(axes)}, {last}); got {_what(x)}.")
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (x.to(low) if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64; got {_what(x)}.")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one dtype; got {name} {_what(x)} beside q {_what(q)}.")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device; got {name} {_what(x)} beside q {_what(q)}.")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}; got {_what(k)}.")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"v must be ({', '.join(axes)}, V) with {tuple(q.shape[:-1])} as in q; got {_what(v)}.")
    if q.shape[-1] == 0 or v.shape[-1] == 0 or q.shape[-2] == 0:
        raise ValueError(f"H, K and V must be at least 1; got q {_what(q)} and v {_what(v)}.")
    return q, k, v


def _log_gate(name: str, x: Tensor | None, q: Tensor) -> Tensor:
    """A gate as (B, T, H) or (B, H), in the dtype of the gate arithmetic."""
    shape = q.shape[:-1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if x is None:
        return q.new_zeros((), dtype=dtype).expand(shape)
    _tensor(name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point; got {_what(x)}.")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}; got {_what(x)}.")
    if x.shape != shape:
        if name.startswith("log_") and x.shape == shape[-1:]:
            return x.expand(shape)
        per_head = " or (H,)" if name.startswith("log_") else ""
        axes = "(B, T, H)" if len(shape) == 3 else "(B, H)"
        raise ValueError(f"{name} must be {axes} = {tuple(shape)}{per_head}; got {_what(x)}.")
    return x


def _sequences(cu_seqlens: Tensor | None, q: Tensor) -> int:
    """N. The values of cu_seqlens are checked where they are read: never by the host when they are on a GPU."""
    if cu_seqlens is None:
        return q.shape[0]
    _tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (N + 1,) int32 or int64 offsets; got {_what(cu_seqlens)}.")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on the device of q, {q.device}; got {_what(cu_seqlens)}.")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences along T, so B must be 1; got q {_what(q)}.")
    return cu_seqlens.shape[0] - 1


def _check_state(
    state: Any, normalize: bool, q: Tensor, sizes: tuple[int | None, int, int, int], argument: str, low: bool = False
) -> State:
    """The state, or an error that says what it should be. ``low``: C and n may be bf16."""
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        raise TypeError(f"{argument} must be a tfla.State (C, n, m); got {_what(state)}.")
    state = State(*state)
    N, H, K, V = sizes
    N = state.C.shape[0] if N is None and isinstance(state.C, Tensor) and state.C.dim() else N
    if normalize != (state.n is not None) or normalize != (state.m is not None):
        kind = "(C, n, m): this layer is normalised" if normalize else "(C, None, None): this layer is not normalised"
        got = ", ".join("None" if t is None else "tensor" for t in state)
        raise ValueError(f"{argument} must be {kind}; got ({got}).")
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, t, shape in (("C", state.C, (N, H, K, V)), ("n", state.n, (N, H, K)), ("m", state.m, (N, H))):
        if t is None:
            continue
        if _tensor(f"{argument}.{name}", t).shape != shape:
            raise ValueError(f"{argument}.{name} must be {shape}; got {_what(t)}.")
        allowed = (full, torch.bfloat16) if low and name != "m" else (full,)
        if t.dtype not in allowed:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"{argument}.{name} must be {wanted} beside {q.dtype} q; got {_what(t)}.")
        if t.device != q.device:
            raise ValueError(f"{argument}.{name} must be on the device of q, {q.device}; got {_what(t)}.")
    return state


def _scale(scale: float | None, K: int) -> float:
    if scale is None:
        return K**-0.5
    if isinstance(scale, Tensor) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a Python number or None; got {_what(scale)}.")
    return float(scale)


def _requires_grad(*tensors: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    flat = [t for x in tensors if x is not None for t in (x if isinstance(x, tuple) else (x,)) if t is not None]
    return any(t.requires_grad for t in flat)


# ---------------------------------------------------------------- backends

_why_not: dict[torch.device, str | None] = {}


def pick_backend(backend: str | None, q: Tensor) -> str:
    """The backend that serves q: the one named, or the fastest that can."""
    if backend is None:
        if q.device.type != "cuda" or q.dtype == torch.float64:
            return "reference"
        if q.device not in _why_not:
            _why_not[q.device] = why_not_triton(q)
            if _why_not[q.device]:
                warnings.warn(f'tfla runs on its backend "reference" here: {_why_not[q.device]}', stacklevel=4)
        return "reference" if _why_not[q.device] else "triton"
    if backend not in ops.BACKENDS:
        raise ValueError(f"backend must be None, {', '.join(map(repr, ops.BACKENDS))}; got {backend!r}.")
    if backend == "triton" and (reason := why_not_triton(q)):
        raise RuntimeError(f'backend="triton" cannot serve this call: {reason}')
    return backend


def why_not_triton(q: Tensor) -> str | None:
    """Why the backend "triton" cannot serve q, or None if it can."""
    if q.dtype == torch.float64:
        return 'it computes in fp16, bf16 and fp32; for fp64 use backend="reference".'
    if q.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the program starts, or move them to a GPU."
    elif q.device.type != "cuda":
        return f"it needs an NVIDIA or AMD GPU; the tensors are on {q.device}."
    elif torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"it needs compute capability 8.0 or later; {torch.cuda.get_device_name(q.device)} has {major}.{minor}."
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f'Triton cannot be imported ({error}); install it with: pip install "triton>=3.6".'
    return None
