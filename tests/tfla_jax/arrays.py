"""Problems from a seed, and what the files of this folder compare by."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import tfla.jax

VARIANTS = [("exp", None), ("exp", False), ("sigmoid", None), ("sigmoid", True)]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs of a call, by name, in the dtype given: q, k (B, T, G, K), v (B, T, H, V), ..."""

    B: int = 2
    T: int = 70
    G: int = 2
    H: int = 4
    K: int = 6
    V: int = 5
    N: int | None = None  # of packed sequences
    normalized: bool = True
    dtype: Any = jnp.float64
    seed: int = 0

    def operands(self) -> tuple[Array, ...]:
        """(q, k, v, i, f)"""
        B, T, G, H, K, V = self.B, self.T, self.G, self.H, self.K, self.V
        shapes = (B, T, G, K), (B, T, G, K), (B, T, H, V), (B, T, H), (B, T, H)
        q, k, v, i, f = self._normal(0, *shapes)
        return q, k, v, i, f + 3

    def state(self) -> tfla.jax.State:
        N, H, K, V = self.B if self.N is None else self.N, self.H, self.K, self.V
        C, n, m = self._normal(1, (N, H, K, V), (N, H, K), (N, H))
        return tfla.jax.State(C, n, m) if self.normalized else tfla.jax.State(C, None, None)

    def _normal(self, stream: int, *shapes: tuple[int, ...]) -> list[Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), stream), len(shapes))
        pairs = zip(keys, shapes, strict=True)
        return [jax.random.normal(key, shape, self.dtype) for key, shape in pairs]


def is_normalized(input_gate: str, normalize: bool | None) -> bool:
    return input_gate == "exp" if normalize is None else normalize


def true_size(state: tfla.jax.State) -> list[Array]:
    """[C e^m, n e^m], or [C]: what a state means, whatever its gauge."""
    if state.m is None:
        return [state.C]
    size = jnp.exp(state.m)
    return [state.C * size[..., None, None], state.n * size[..., None]]


def parts(h: Array, state: tfla.jax.State | None) -> list[Array]:
    """h, and what the state means: nothing that depends on a gauge."""
    return [h] if state is None else [h, *true_size(state)]


def loss(results: list[Array]) -> Array:
    """A number to which no two entries contribute alike."""
    total = jnp.zeros((), results[0].dtype)
    for at, x in enumerate(results):
        weights = jnp.cos(jnp.arange(x.size, dtype=x.dtype) + at).reshape(x.shape)
        total += (weights * x).sum()
    return total


def assert_close(x: Any, y: Any, relative: float = 1e-11) -> None:
    """Two trees of arrays agree, leaf by leaf, at the worst place, relative to the largest."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert jnp.isfinite(a).all() and jnp.isfinite(b).all()
        if a.size:
            worst, largest = jnp.abs(a - b).max(), jnp.abs(b).max()
            assert worst <= relative * largest, f"{worst:.2e} apart at a size of {largest:.2e}"
