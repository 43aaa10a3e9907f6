"""tfla behind the operators of flash-linear-attention that are scalar-gated linear attention.

    fla.ops.simple_gla      chunk_simple_gla, fused_chunk_simple_gla, fused_recurrent_simple_gla,
                            parallel_simple_gla
    fla.ops.retention       chunk_retention, fused_chunk_retention, fused_recurrent_retention,
                            parallel_retention
    fla.ops.lightning_attn  chunk_lightning_attn, fused_recurrent_lightning_attn
    fla.ops.linear_attn     chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn

All are C_t = exp(g_t) C_{t-1} + k_t v_t^T, o_t = C_t^T (scale q_t), with a g of their own. Written
for fla-core 0.6.0. A call that tfla does not serve goes to fla as before. docs/migrate/fla.md says
which.
"""

from __future__ import annotations

import importlib
import inspect
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

import tfla
from tfla import dispatch, log
from tfla.integrations.rerouting import Handler, Rerouted

Output = tuple[Tensor, Any]


def install() -> None:
    """Let fla's operators compute with tfla, under every name they already have.

    Names that were imported before are served too: the functions themselves are changed. With tfla
    in place an operator may stand in a full graph of torch.compile; what was compiled before keeps
    fla. A second call changes nothing.

    With ``TFLA_LOG=1`` each kind of call has a line that says who serves it, and if fla, why.

    Raises:
        ImportError: fla is not installed.
        UserWarning (a warning): an operator of this version of fla has other arguments than those
            of 0.6.0. It is left alone.

    Example:
        >>> import tfla.integrations.fla
        >>> tfla.integrations.fla.install()                           # doctest: +SKIP
        >>> from fla.ops.simple_gla import chunk_simple_gla           # doctest: +SKIP
        >>> o, state = chunk_simple_gla(q, k, v, g)                   # doctest: +SKIP
        >>> tfla.integrations.fla.uninstall()                         # doctest: +SKIP
    """
    with _lock:
        if _rerouted:
            return
        modules = {name: importlib.import_module(f"fla.ops.{name}") for name in OPERATORS}
        for name, operators in OPERATORS.items():
            for serve in operators:
                function = getattr(modules[name], serve.__name__, None)
                if why := _unknown(function, serve):
                    warnings.warn(
                        f"tfla leaves fla.ops.{name}.{serve.__name__} to fla: {why}", stacklevel=2
                    )
                    continue
                _rerouted.append(Rerouted(function, _handler_of(serve)))


def uninstall() -> None:
    """Give each operator of fla its own code back. Without ``install`` before, nothing happens."""
    with _lock:
        while _rerouted:
            _rerouted.pop().restore()


_lock = threading.Lock()
_rerouted: list[Rerouted] = []


@dataclass(frozen=True)
class NotServed:
    """What an operator below returns in place of a result, for fla to make it."""

    reason: str


def _positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]


def _unknown(function: Any, serve: Callable[..., Any]) -> str | None:
    """Why a function of fla is none that `serve` can stand for, or None."""
    if not isinstance(function, FunctionType):
        return "this version of fla has no such function."
    theirs, ours = _positional(function), _positional(serve)
    return None if theirs[: len(ours)] == ours else f"its arguments are {', '.join(theirs)}."


def _handler_of(serve: Callable[..., Any]) -> Callable[[FunctionType], Handler]:
    name, most = serve.__name__, len(_positional(serve))

    def handler(original: FunctionType) -> Handler:
        def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = NotServed("more arguments") if len(args) > most else serve(*args, **kwargs)
            declined = isinstance(out, NotServed)
            if log.ON and not torch.compiler.is_compiling():
                log.note(f"{name} of fla: {f'fla, {out.reason}' if declined else 'tfla'}")
            return original(*args, **kwargs) if declined else out

        return handle

    return handler


# ------------------------------------------------------------------------------- the operators


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    **others: Any,
) -> Output | NotServed:
    """g (B, T, H) or g_gamma (H,), natural logarithms."""
    return _attend(
        q,
        k,
        v,
        _Decay(g, g_gamma),
        scale,
        _States(initial_state, output_final_state, state_v_first, cu_seqlens),
        others=others,
    )


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_simple_gla."""
    states = _States(initial_state, output_final_state, False, cu_seqlens)
    return _attend(q, k, v, _Decay(g, g_gamma), scale, states, others=others)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_simple_gla; reverse: token t sees t, t + 1, ..."""
    states = _States(initial_state, output_final_state, state_v_first, cu_seqlens, reverse)
    return _attend(q, k, v, _Decay(g, g_gamma), scale, states, others=others)


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_simple_gla without states; the matrix of attention is never made."""
    if output_attentions:
        return NotServed("output_attentions: tfla makes no T x T matrix")
    return _attend(q, k, v, _Decay(g, None), scale, _States(cu_seqlens=cu_seqlens), others=others)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    **others: Any,
) -> Output | NotServed:
    """Simple GLA whose decay is that of ``retention_decay``."""
    states = _States(initial_state, output_final_state, False, cu_seqlens)
    return _attend(q, k, v, retention_decay, scale, states, others=others)


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_retention."""
    states = _States(initial_state, output_final_state, False, cu_seqlens)
    return _attend(q, k, v, retention_decay, scale, states, others=others)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_retention; reverse: token t sees t, t + 1, ..."""
    states = _States(initial_state, output_final_state, state_v_first, cu_seqlens, reverse)
    return _attend(q, k, v, retention_decay, scale, states, others=others)


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_retention without states; the matrix of attention is never made."""
    if output_attentions:
        return NotServed("output_attentions: tfla makes no T x T matrix")
    return _attend(q, k, v, retention_decay, scale, _States(cu_seqlens=cu_seqlens), others=others)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    **others: Any,
) -> Output | NotServed:
    """Simple GLA whose decay is that of ``lightning_decay``."""
    states = _States(initial_state, output_final_state, False, cu_seqlens)
    decay = lightning_decay(layer_idx, num_layers)
    return _attend(q, k, v, decay, scale, states, others=others)


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_lightning_attn; reverse: token t sees t, t + 1, ..."""
    states = _States(initial_state, output_final_state, False, cu_seqlens, reverse)
    decay = lightning_decay(layer_idx, num_layers)
    return _attend(q, k, v, decay, scale, states, others=others)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """No decay. normalize: o_t divided by scale q_t . sum_{s <= t} k_s + 1e-10, which is not the
    normaliser of the mLSTM: it may be negative, and there is no floor."""
    states = _States(initial_state, output_final_state, False, cu_seqlens)
    return _linear_attend(q, k, v, scale, states, normalize, others)


def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_linear_attn."""
    states = _States(initial_state, output_final_state, False, cu_seqlens)
    return _linear_attend(q, k, v, scale, states, normalize, others)


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Output | NotServed:
    """As chunk_linear_attn, not normalised by default; reverse: token t sees t, t + 1, ..."""
    states = _States(initial_state, output_final_state, False, cu_seqlens, reverse)
    return _linear_attend(q, k, v, scale, states, normalize, others)


OPERATORS: dict[str, tuple[Callable[..., Output | NotServed], ...]] = {
    "simple_gla": (
        chunk_simple_gla,
        fused_chunk_simple_gla,
        fused_recurrent_simple_gla,
        parallel_simple_gla,
    ),
    "retention": (
        chunk_retention,
        fused_chunk_retention,
        fused_recurrent_retention,
        parallel_retention,
    ),
    "lightning_attn": (chunk_lightning_attn, fused_recurrent_lightning_attn),
    "linear_attn": (chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn),
}


# ------------------------------------------------------------------------------- what they share


@dataclass(frozen=True)
class _Decay:
    """The logarithm of the decay: g (B, T, H) or g_gamma (H,) or neither."""

    g: Tensor | None
    g_gamma: Tensor | None


@dataclass(frozen=True)
class _States:
    """Where a sequence starts and which way it runs."""

    initial_state: Any = (
        None  # (N, H, K, V), or (N, H, V, K); of normalised linear attention a pair
    )
    output_final_state: bool = False
    v_first: bool = False
    cu_seqlens: Tensor | None = None
    reverse: bool = False


HeadDecay = Callable[[int, torch.device], Tensor]


def retention_decay(H: int, device: torch.device) -> Tensor:
    """log(1 - 2^(-5 - h)) for head h (arXiv 2307.08621)."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(H, dtype=torch.float32, device=device)))


def lightning_decay(layer_idx: int, num_layers: int) -> HeadDecay:
    """-8 h / H (1 - layer / layers) for head h (arXiv 2405.17381)."""

    def decay(H: int, device: torch.device) -> Tensor:
        slope = -(8 / H * (1 - layer_idx / num_layers))
        return slope * torch.arange(H, dtype=torch.float32, device=device)

    return decay


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: _Decay | HeadDecay,
    scale: float | None,
    states: _States,
    *,
    others: dict[str, Any],
) -> Output | NotServed:
    """(o, final state or None), or why tfla does not serve the call."""
    if why := _why_not(q, k, v, scale, others):
        return NotServed(why)
    G, H = q.shape[2], v.shape[2]
    if isinstance(decay, _Decay):
        if decay.g is not None and decay.g_gamma is not None:
            return NotServed("both g and g_gamma")
        log_f = decay.g_gamma if decay.g is None else decay.g
        if log_f is not None and log_f.shape not in (v.shape[:3], v.shape[2:3]):
            return NotServed(f"a decay of shape {tuple(log_f.shape)}")
    elif G != H:
        return NotServed("a decay that depends on the head, and fewer heads of q and k than of v")
    else:
        log_f = decay(H, q.device)
    start = states.initial_state
    if start is not None and not isinstance(start, Tensor):
        return NotServed(f"an initial state that is a {type(start).__name__}")
    if start is not None:
        start = start.transpose(-1, -2) if states.v_first else start
    o, C = _scan(q, k, v, log_f, scale, start, states)
    if C is not None and states.v_first:
        C = C.transpose(-1, -2).contiguous()
    return o, C


def _linear_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    states: _States,
    normalize: bool,
    others: dict[str, Any],
) -> Output | NotServed:
    """Linear attention without decay; normalised, its denominator is one more column of v."""
    if not normalize:
        return _attend(q, k, v, _Decay(None, None), scale, states, others=others)
    if why := _why_not(q, k, v, scale, others):
        return NotServed(why)
    pair = states.initial_state if isinstance(states.initial_state, tuple) else None
    C, z = pair or (states.initial_state, None)
    # Eight columns, of which one is used: rows of 16 bytes stay rows of 16 bytes.
    ones = v.new_zeros(*v.shape[:-1], 8)
    ones[..., 0] = 1
    if C is not None:
        column = C.new_zeros(*C.shape[:-1], 8)
        if z is not None:  # (N, 1, H, K), the sum of the keys so far
            column = torch.cat([z.transpose(1, 2).transpose(2, 3).to(C.dtype), column[..., 1:]], -1)
        C = torch.cat([C, column], -1)
    o, C = _scan(q, k, torch.cat([v, ones], -1), None, scale, C, states, output=True)
    V = v.shape[-1]
    o = o[..., :V] / (o[..., V : V + 1] + 1e-10)
    assert C is not None
    z = C[..., V][:, None].contiguous()
    return o, (C[..., :V].contiguous() if states.output_final_state else None, z)


def _why_not(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, others: dict[str, Any]
) -> str | None:
    """Why tfla serves no such call, or None."""
    if others:
        return f"the argument {sorted(others)[0]}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        return "tensors that are not (B, T, H, K or V)"
    if not (q.dtype == k.dtype == v.dtype):
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype}"
    if scale is not None and type(scale) not in (int, float):
        return f"a scale that is a {type(scale).__name__}"
    if q.shape[2] == 0 or v.shape[2] % q.shape[2]:
        return f"{q.shape[2]} heads of q and k for {v.shape[2]} of v"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"a {q.device.type} device"
    if dispatch.pick_backend(None, q) != "triton":
        return f"tfla has no kernels for {q.dtype} on this GPU (tfla.supports says why)"
    return None


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor | None,
    scale: float | None,
    start: Tensor | None,
    states: _States,
    *,
    output: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``tfla.linear_attention`` on their tensors. They multiply in the dtype of q, k and v also
    under autocast."""
    full = torch.promote_types(q.dtype, torch.float32)
    kind = q.device.type
    on = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if on else nullcontext():
        o, after = tfla.linear_attention(
            q,
            k,
            v,
            log_f,
            scale=scale,
            initial_state=None if start is None else tfla.State(start.to(full), None, None),
            output_final_state=states.output_final_state or output,
            cu_seqlens=states.cu_seqlens,
            reverse=states.reverse,
        )
    return o, None if after is None else after.C
