"""Calls of other shapes as the one that backends take: groups of heads, and mirrored sequences.

A backend takes q and k with as many heads as v, and sequences from their first token to their last.
Both functions are made of torch's own, so gradients, graphs and process groups know them: dq and dk
are summed over a group in fp32 by the backward pass of ``expand``, whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from tfla.spec import Inputs, StepInputs

X = TypeVar("X", Inputs, StepInputs)


def each_head(x: X) -> X:
    """x with q and k of all H heads of v: head h reads group h // (H // G) of the G that q and k
    have. With G = 1 these are views, else copies."""
    G, H = x.q.shape[-2], x.v.shape[-2]
    if G == H:
        return x

    def spread(t: Tensor) -> Tensor:
        return t.unsqueeze(-2).expand(*t.shape[:-1], H // G, -1).flatten(-3, -2)

    return x._replace(q=spread(x.q), k=spread(x.k))


def mirrored(x: Inputs, T: int) -> Inputs:
    """The inputs from the last token to the first, where T is the length of all ranks together.
    Packed sequences then lie in the opposite order, each mirrored by itself."""
    q, k, v, i, f = (t.flip(1) for t in (x.q, x.k, x.v, x.i, x.f))
    if x.cu_seqlens is None:
        return x._replace(q=q, k=k, v=v, i=i, f=f)
    C, n, m = mirrored_states((x.C, x.n, x.m), packed=True)
    return Inputs(q, k, v, i, f, C, n, m, (T - x.cu_seqlens).flip(0))


def mirrored_states(states: Sequence[Tensor | None], packed: bool) -> list[Tensor | None]:
    """States (N, H, ...) in the order of the sequences of the other direction."""
    return [t if t is None or not packed else t.flip(0) for t in states]
