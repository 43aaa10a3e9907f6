"""tfla behind the names of mlstm_kernels: whatever calls its Triton kernels computes with tfla.

    chunkwise--triton_xl_chunk, chunkwise--triton_limit_chunk      exponential input gate
    chunkwise--triton_xl_chunk_siging                              sigmoid input gate
    native_sequence__triton, step kernel triton                    exponential input gate

Written for mlstm_kernels 2.0.6. Its own Triton kernels are not called, so these names also work
where it cannot run them: without a GPU, without Triton, with Triton 3.9. Gradients are those of the
function; ``eps``, ``chunk_size`` and all that tunes kernels is accepted and left alone; m stays
fp32 where ``dtype_state`` asks for less. docs/migrate/mlstm_kernels.md says what that changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from tfla.integrations import head_first

Output = Tensor | tuple[Tensor, tuple[Tensor, ...]]


def install() -> None:
    """Put tfla's functions into the registries of mlstm_kernels.

    They are read when a model is built: build it afterwards, with ``chunkwise_kernel``,
    ``sequence_kernel`` and ``step_kernel`` named as above (an ``xLSTMLargeConfig`` names such ones
    unless told otherwise). A second call changes nothing. This is the module ``xlstm`` computes
    with, so its xLSTMLarge trains and generates on tfla unchanged.

    Raises:
        ImportError: mlstm_kernels is not installed.

    Example:
        >>> import tfla.integrations.mlstm_kernels
        >>> tfla.integrations.mlstm_kernels.install()            # doctest: +SKIP
        >>> model = xLSTMLarge(xLSTMLargeConfig(...))            # doctest: +SKIP
        >>> tfla.integrations.mlstm_kernels.uninstall()          # doctest: +SKIP
    """
    if _replaced:
        return
    chunkwise = importlib.import_module("mlstm_kernels.torch.chunkwise").registry
    recurrent = importlib.import_module("mlstm_kernels.torch.recurrent")
    backend = importlib.import_module("mlstm_kernels.torch.backend_module")
    wrapper = "wrap_chunkwise__arbitrary_sequence_length_with_padding"
    _replace(chunkwise, "triton_xl_chunk", chunkwise_exp)
    _replace(chunkwise, "triton_limit_chunk", chunkwise_exp)
    _replace(chunkwise, "triton_xl_chunk_siging", chunkwise_siging)
    _replace(recurrent.registry_sequence, "native_sequence__triton", sequence)
    _replace(recurrent.registry_step, "triton", step)
    # In inference this one cuts, pads and copies around the kernels; ours need none of it.
    _replace(vars(backend), wrapper, _Inference(getattr(backend, wrapper)))


def uninstall() -> None:
    """Put back what was there before ``install``. Models built in between keep tfla's functions."""
    while _replaced:
        registry, name, before = _replaced.pop()
        if before is None:
            del registry[name]
        else:
            registry[name] = before


_replaced: list[tuple[MutableMapping[str, Any], str, Any]] = []


def _replace(registry: MutableMapping[str, Any], name: str, function: Any) -> None:
    _replaced.append((registry, name, registry.get(name)))
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
    **tuning: Any,
) -> Output:
    """h (B, H, T, V), or h and (c, n, m), of the mLSTM with exponential input gate."""
    h, states = _run(
        (q, k, v, i, f, c_initial, n_initial, m_initial),
        autocast_kernel_dtype,
        states=return_last_states,
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
    )
    if states is None:
        return h
    c, n, m = states
    return (h, (c * m[..., None].exp(), n * m.exp())) if normalize else (h, (c, n))


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
        if mlstm_chunkwise_kernel not in (chunkwise_exp, chunkwise_siging):
            return self.before(
                mlstm_chunkwise_kernel=mlstm_chunkwise_kernel,
                mlstm_sequence_kernel=mlstm_sequence_kernel,
                mlstm_step_kernel=mlstm_step_kernel,
                return_last_states=return_last_states,
                dtype_state=dtype_state,
                **arguments,
            )
        h, states = mlstm_chunkwise_kernel(**arguments, return_last_states=True)
        if len(states) == 2:  # who calls this hands three on
            states = (*states, torch.zeros_like(states[0][..., 0, :1]))
        return (h, _in(dtype_state, states)) if return_last_states else h


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
