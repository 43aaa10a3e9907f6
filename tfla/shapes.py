"""Calls of other shapes as those that backends take: groups of heads, for what takes none, and
mirrored sequences, for backends run them from their first token to their last."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tfla.spec import Inputs


def each_head(x: Tensor, H: int) -> Tensor:
    """q or k (..., G, K) as H heads have it: head h has group h // (H // G). With G = 1 it is a
    view, else a copy."""
    G = x.shape[-2]
    return x.unsqueeze(-2).expand(*x.shape[:-1], H // G, -1).flatten(-3, -2) if G != H else x


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
