"""tfla behind the names of mlstm_kernels: whatever calls its kernels computes with tfla.

    chunkwise--   native_autograd, native_custbw, triton_xl_chunk, triton_limit_chunk       exp
                  triton_xl_chunk_siging                                                    sigmoid
    parallel--    native_autograd, native_custbw, native_stablef_autograd,
                  native_stablef_custbw, triton_limit_headdim                               exp
                  native_siging_autograd, native_siging_custbw                              sigmoid
    sequence      native_sequence__native, native_sequence__triton                          exp
    step          native, triton                                                            exp

Written for mlstm_kernels 2.0.6. None of its functions is called, so all names work on a CPU and on
a GPU, without Triton and with Triton 3.9. What they compute in Triton multiplies fp32 numbers in
TF32 whatever torch is set to, so behind those names ("triton", but for sequences by steps) products
of fp32 have its 11 bits or more; the native ones follow torch, and so do ours. Gradients are those
of the function; ``eps``, ``chunk_size`` and all that tunes kernels are accepted without effect;
states are fp32, m also where
``dtype_state`` asks for less. docs/migrate/mlstm_kernels.md says what that changes. Without
mlstm_kernels, ``tfla.integrations.mlstm_backend`` has its ``mLSTMBackend``.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfla.integrations import head_first

Output = Tensor | tuple[Tensor, tuple[Tensor, ...]]


def install() -> None:
    """Put tfla's functions into the registries of mlstm_kernels.

    The registries are read when a model is built, so build it after this call. A second call
    changes nothing. ``xlstm``, TiRex-2 and Bolmo compute with this module; their models run on tfla
    unchanged.

    Raises:
        ImportError: mlstm_kernels is not installed.

    Example:
        >>> import tfla.integrations.mlstm_kernels
        >>> tfla.integrations.mlstm_kernels.install()            # doctest: +SKIP
        >>> model = xLSTMLarge(xLSTMLargeConfig(...))            # doctest: +SKIP
        >>> tfla.integrations.mlstm_kernels.uninstall()          # doctest: +SKIP
    """
    with _lock:
        if _replaced:
            return
        package = "mlstm_kernels.torch"
        recurrent = importlib.import_module(f"{package}.recurrent")
        registries = {
            "chunkwise": importlib.import_module(f"{package}.chunkwise").registry,
            "parallel": importlib.import_module(f"{package}.parallel").registry,
            "sequence": recurrent.registry_sequence,
            "step": recurrent.registry_step,
        }
        backend = vars(importlib.import_module(f"{package}.backend_module"))
        for kind, registry in registries.items():
            for name, function in KERNELS[kind].items():
                _replace(registry, name, function)
        # Theirs cut, pad and copy around a kernel; ours need none of it.
        for name in ("arbitrary_sequence_length_with_padding", "pad_zeros"):
            name = f"wrap_chunkwise__{name}"
            wrapper = _Inference if "arbitrary" in name else _Training
            _replace(backend, name, wrapper(backend[name]))


def uninstall() -> None:
    """Put back what was there before ``install``.

    A name that somebody has replaced since stays replaced. Models that were built in between keep
    tfla's functions. Without ``install`` before, nothing happens.
    """
    with _lock:
        while _replaced:
            registry, name, function, before = _replaced.pop()
            if registry.get(name) is not function:
                continue
            if before is None:
                del registry[name]
            else:
                registry[name] = before


_lock = threading.Lock()
_replaced: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []


def _replace(registry: MutableMapping[str, Any], name: str, function: Any) -> None:
    _replaced.append((registry, name, function, registry.get(name)))
    registry[name] = function


# ------------------------------------------------------------------------------- their signatures


def chunkwise_exp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    allow_tf32: bool = False,
    **tuning: Any,
) -> Output:
    """h (B, H, T, V), or h and (c, n, m), of the mLSTM with exponential input gate."""
    h, states = _run(
        (q, k, v, i, f, c_initial, n_initial, m_initial),
        autocast_kernel_dtype,
        states=return_last_states,
        allow_tf32=allow_tf32,
    )
    return h if states is None else (h, states)


def chunkwise_siging(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalize: bool = True,
    chunk_size: int = 64,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    allow_tf32: bool = False,
    **tuning: Any,
) -> Output:
    """h (B, H, T, V), or h and (c, n), of the mLSTM with sigmoid input gate.

    There is no m: c and n are in the gauge m = 0.
    """
    if c_initial is not None:
        m_initial = torch.zeros_like(c_initial[..., 0, :1], dtype=torch.float32)
    h, states = _run(
        (q, k, v, i, f, c_initial, n_initial, m_initial),
        autocast_kernel_dtype,
        states=return_last_states,
        input_gate="sigmoid",
        normalize=normalize,
        allow_tf32=allow_tf32,
    )
    if states is None:
        return h
    c, n, m = states
    return (h, (c * m[..., None].exp(), n * m.exp())) if normalize else (h, (c, n))


def parallel_exp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    allow_tf32: bool = False,
    **tuning: Any,
) -> Output:
    """As ``chunkwise_exp``, states included: the function has no parallel form of its own here."""
    h, states = _run(
        (q, k, v, i, f, c_initial, n_initial, m_initial),
        autocast_kernel_dtype,
        states=return_last_states,
        allow_tf32=allow_tf32,
    )
    return h if states is None else (h, states)


def parallel_siging(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    stable_fgate: bool = True,
    normalize: bool = True,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    allow_tf32: bool = False,
    **tuning: Any,
) -> Output:
    """As ``chunkwise_siging``."""
    return chunkwise_siging(
        q,
        k,
        v,
        i,
        f,
        c_initial,
        n_initial,
        m_initial,
        return_last_states=return_last_states,
        normalize=normalize,
        autocast_kernel_dtype=autocast_kernel_dtype,
        allow_tf32=allow_tf32,
    )


def sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    **tuning: Any,
) -> Output:
    """As ``chunkwise_exp``; c and n come back in dtype_state."""
    h, states = head_first.sequence(
        q, k, v, i, f, c_initial, n_initial, m_initial, states=return_last_states
    )
    return h if states is None else (h, _in(dtype_state, states))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    **tuning: Any,
) -> tuple[Tensor, head_first.States]:
    """One token: q, k (B, H, K), v (B, H, V), i, f (B, H, 1). c, n come back in dtype_state."""
    h, states = head_first.step(q, k, v, i, f, c, n, m)
    return h, _in(dtype_state, states)


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "chunkwise": {
        "native_autograd": chunkwise_exp,
        "native_custbw": chunkwise_exp,
        "triton_limit_chunk": partial(chunkwise_exp, allow_tf32=True),
        "triton_xl_chunk": partial(chunkwise_exp, allow_tf32=True),
        "triton_xl_chunk_siging": partial(chunkwise_siging, allow_tf32=True),
    },
    "parallel": {
        "native_autograd": parallel_exp,
        "native_custbw": parallel_exp,
        "native_stablef_autograd": parallel_exp,
        "native_stablef_custbw": parallel_exp,
        "triton_limit_headdim": partial(parallel_exp, allow_tf32=True),
        "native_siging_autograd": parallel_siging,
        "native_siging_custbw": parallel_siging,
    },
    "sequence": {"native_sequence__native": sequence, "native_sequence__triton": sequence},
    "step": {"native": step, "triton": step},
}


def _unbound(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, where arguments are bound to it."""
    return kernel.func if isinstance(kernel, partial) else kernel


_OURS = {_unbound(kernel) for registry in KERNELS.values() for kernel in registry.values()}


def _is_ours(kernel: Callable[..., Any]) -> bool:
    """Also where they have bound arguments to it."""
    return _unbound(kernel) in _OURS


class _Training:
    """Stands for the function through which a backend of theirs pads what it trains on."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = before

    def __call__(self, mlstm_chunkwise_kernel: Callable[..., Any], **arguments: Any) -> Output:
        if not _is_ours(mlstm_chunkwise_kernel):
            return self.before(mlstm_chunkwise_kernel=mlstm_chunkwise_kernel, **arguments)
        return mlstm_chunkwise_kernel(**arguments)


class _Inference:
    """Stands for the function through which a backend of theirs computes in inference mode."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = before

    def __call__(
        self,
        mlstm_chunkwise_kernel: Callable[..., Any],
        mlstm_sequence_kernel: Callable[..., Any],
        mlstm_step_kernel: Callable[..., Any],
        return_last_states: bool = True,
        dtype_state: torch.dtype = torch.float32,
        **arguments: Any,
    ) -> Output:
        if not _is_ours(mlstm_chunkwise_kernel):
            return self.before(
                mlstm_chunkwise_kernel=mlstm_chunkwise_kernel,
                mlstm_sequence_kernel=mlstm_sequence_kernel,
                mlstm_step_kernel=mlstm_step_kernel,
                return_last_states=return_last_states,
                dtype_state=dtype_state,
                **arguments,
            )
        h, states = infer(mlstm_chunkwise_kernel, dtype_state, **arguments)
        return (h, states) if return_last_states else h


def infer(
    kernel: Callable[..., Any], dtype_state: torch.dtype, **arguments: Any
) -> tuple[Tensor, head_first.States]:
    """A function of ours on a part of a sequence, and the states behind it, always three."""
    h, states = kernel(**arguments, return_last_states=True)
    if len(states) == 2:  # the sigmoid gate
        states = (*states, torch.zeros_like(states[0][..., 0, :1]))
    return h, _in(dtype_state, states)


def _run(
    tensors: tuple[Tensor | None, ...], autocast_dtype: torch.dtype, **options: Any
) -> tuple[Tensor, head_first.States | None]:
    """``head_first.sequence``; under autocast in the dtype that they are told to use then."""
    q, k, v, *rest = tensors
    assert q is not None and k is not None and v is not None
    if not torch.is_autocast_enabled(q.device.type):
        return head_first.sequence(q, k, v, *rest, **options)  # type: ignore[arg-type]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(autocast_dtype) for x in (q, k, v))
        return head_first.sequence(q, k, v, *rest, **options)  # type: ignore[arg-type]


def _in(dtype: torch.dtype, states: tuple[Tensor, ...]) -> head_first.States:
    c, n, m = states
    return (c, n, m) if c.dtype == torch.float64 else (c.to(dtype), n.to(dtype), m)
