"""One token at a time on the backend "reference"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfla import gates
from tfla.gates import Activations
from tfla.reference.recurrence import step


def update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    slots: Tensor | None,
    scale: float,
    activations: Activations,
) -> Tensor:
    """One token: writes the new state over the old (in rows ``slots``, or all); h (B, H, V)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    log_i, log_f = gates.log_gates(i.to(dtype), f.to(dtype), activations)
    rows: Any = slice(None) if slots is None else slots.long().clamp(0, max(len(C) - 1, 0))
    states = [None if s is None else s[rows].to(dtype) for s in (C, n, m)]
    inplace = slots is None and C.dtype == dtype  # fresh memory takes five times the arithmetic
    tokens = (x.to(dtype) for x in (q, k, v))
    h, *new = step(*tokens, log_i, log_f, *states, scale, inplace)  # type: ignore
    if slots is not None and len(slots) > 0:
        known = (slots >= 0) & (slots < len(C))
        # Without waiting for a device: who has no row writes what the first who has one does, to
        # the same place, and nobody writes anything where there is none.
        source = torch.where(known, torch.arange(len(known), device=q.device), known.int().argmax())
        rows = rows[source]
        for at, old in enumerate(states):
            if old is not None:
                new[at] = torch.where(known.any(), new[at][source], old)  # type: ignore[index]
        h = h.masked_fill(~known[:, None, None], torch.nan)
    for state, value in zip((C, n, m), new, strict=True):
        if state is not None and value is not None and not (inplace and state is C):
            state[rows] = value.to(state.dtype)
    return h.to(v.dtype)
