"""The JAX functions of mlstm_kernels by their names, computed by tfla. Heads come before tokens.

    from tfla.jax.mlstm_kernels import get_mlstm_kernel        # mlstm_kernels.jax's own
    mlstm = get_mlstm_kernel("chunkwise--triton_xl_chunk")
    h, (c, n, m) = mlstm(q, k, v, i, f, return_last_states=True)

    chunkwise--triton_xl_chunk, chunkwise--triton_limit_chunk      exponential input gate
    chunkwise--triton_xl_chunk_siging                              sigmoid input gate
    triton                                                         the step, exponential input gate

Signatures are those of mlstm_kernels 2.0.6, which need not be installed. Gradients are those of the
function; ``eps``, ``chunk_size`` and all that tunes kernels have no effect; i and f are not rounded
to ``autocast_kernel_dtype``, and states are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from tfla.jax.api import mlstm, mlstm_step
from tfla.jax.checks import State
from tfla.jax.spec import InputGate


def get_mlstm_kernel(name: str) -> Callable[..., Any]:
    """The function over sequences of a name: ``chunkwise_exp`` or ``chunkwise_siging``.

    Raises:
        ValueError: for another name, with those that there are.

    Example:
        >>> import jax
        >>> from tfla.jax.mlstm_kernels import get_mlstm_kernel
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 100, 32))
        >>> h = get_mlstm_kernel("chunkwise--triton_xl_chunk")(q, k, v, q[..., 0], k[..., 0])
        >>> h.shape
        (2, 4, 100, 32)
    """
    return _of_name(name, SEQUENCE_KERNELS)


def get_mlstm_step_kernel(name: str) -> Callable[..., Any]:
    """The function of one token of a name: ``step``. ValueError as ``get_mlstm_kernel``."""
    return _of_name(name, STEP_KERNELS)


def chunkwise_exp(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    c_initial: Array | None = None,
    n_initial: Array | None = None,
    m_initial: Array | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 128,
    autocast_kernel_dtype: Any = jnp.float32,
    **tuning: Any,
) -> Any:
    """The mLSTM with exponential input gate.

    q, k: (B, H, T, K), v: (B, H, T, V), i, f: (B, H, T) pre-activations, c_initial: (B, H, K, V),
    n_initial: (B, H, K), m_initial: (B, H). q, k and v are computed with in autocast_kernel_dtype.
    Returns h (B, H, T, V) in that dtype, and with return_last_states (h, (c, n, m)).
    """
    given = (c_initial, n_initial, m_initial)
    state = None
    if any(x is not None for x in given):
        if any(x is None for x in given):
            raise ValueError(
                "c_initial, n_initial and m_initial must be given together, or none of them."
            )
        state = _state(*given)
    h, after = _sequence(q, k, v, i, f, autocast_kernel_dtype, "exp", True, state)
    return (h, tuple(after)) if return_last_states else h


def chunkwise_siging(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    c_initial: Array | None = None,
    n_initial: Array | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalize: bool = True,
    chunk_size: int = 128,
    autocast_kernel_dtype: Any = jnp.float32,
    **tuning: Any,
) -> Any:
    """The mLSTM with sigmoid input gate, as ``chunkwise_exp``; the states are (c, n), in the gauge
    m = 0. Without ``normalize`` n does nothing, and what came in goes back, or zeros."""
    state = None
    if c_initial is not None:
        if normalize and n_initial is None:
            raise ValueError("c_initial and n_initial must be given together, or none of them.")
        m = jnp.zeros(c_initial.shape[:2], jnp.float32)
        state = _state(c_initial, n_initial, m) if normalize else _state(c_initial, None, None)
    h, (c, n, m) = _sequence(q, k, v, i, f, autocast_kernel_dtype, "sigmoid", normalize, state)
    if not return_last_states:
        return h
    if m is None:
        return h, (c, jnp.zeros(c.shape[:-1], c.dtype) if n_initial is None else n_initial)
    size = jnp.exp(m)[..., None]
    return h, (c * size[..., None], n * size)


def step(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    c: Array,
    n: Array,
    m: Array,
    eps: float = 1e-6,
    dtype_state: Any = jnp.float32,
    **tuning: Any,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """One token: q, k (B, H, K), v (B, H, V), i, f, m (B, H, 1). Returns (h, (c, n, m)); c and n
    come back in dtype_state, m in fp32."""
    h, after = mlstm_step(q, k, v, i[..., 0], f[..., 0], _state(c, n, m[..., 0]))
    assert after.n is not None and after.m is not None
    return h, (after.C.astype(dtype_state), after.n.astype(dtype_state), after.m[..., None])


def _sequence(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    dtype: Any,
    input_gate: InputGate,
    normalize: bool,
    state: State | None,
) -> tuple[Array, Any]:
    """(h, State), heads before tokens."""
    h, after = mlstm(
        *(jnp.swapaxes(x, 1, 2).astype(dtype) for x in (q, k, v)),
        *(jnp.swapaxes(x, 1, 2) for x in (i, f)),
        input_gate=input_gate,
        normalize=normalize,
        initial_state=state,
        output_final_state=True,
    )
    return jnp.swapaxes(h, 1, 2), after


def _state(c: Any, n: Any, m: Any) -> State:
    """Their arrays as a State in fp32."""
    return State(*(None if x is None else jnp.asarray(x, jnp.float32) for x in (c, n, m)))


def _of_name(name: str, kernels: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if name not in kernels:
        raise ValueError(f"name must be {' or '.join(map(repr, kernels))}; got {name!r}.")
    return kernels[name]


SEQUENCE_KERNELS: dict[str, Callable[..., Any]] = {
    "chunkwise--triton_xl_chunk": chunkwise_exp,
    "chunkwise--triton_limit_chunk": chunkwise_exp,
    "chunkwise--triton_xl_chunk_siging": chunkwise_siging,
}
STEP_KERNELS: dict[str, Callable[..., Any]] = {"triton": step}
