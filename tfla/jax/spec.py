"""A call as a value: all that it is besides its arrays.

Dimensions: B batch, T tokens, H heads, G groups of q and k, K q/k head dim, V v head dim, N
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from jax import Array

InputGate = Literal["exp", "sigmoid"]
BackendName = Literal["reference", "triton"]


class Inputs(NamedTuple):
    """The arrays of a call over sequences."""

    q: Array  # (B, T, G, K)
    k: Array  # (B, T, G, K)
    v: Array  # (B, T, H, V)
    i: Array  # (B, T, H)
    f: Array  # (B, T, H)
    C: Array | None  # (N, H, K, V)
    n: Array | None  # (N, H, K)
    m: Array | None  # (N, H)
    cu_seqlens: Array | None  # (N + 1,)


@dataclass(frozen=True)
class Options:
    """What a call is that its arrays do not say; equal ones share a compilation."""

    scale: float  # of q
    input_gate: InputGate
    sigmoid_f: bool  # log_f = logsigmoid(f), else f is log_f
    normalize: bool  # is h divided by the normaliser?
    final_state: bool = False  # does the state after the last token go out?
    reverse: bool = False  # does token t see t, t + 1, ...?

    def but(self, **fields: Any) -> Options:
        """The same with some fields changed."""
        return replace(self, **fields)
