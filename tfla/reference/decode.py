"""One token at a time on the backend "reference"."""

from __future__ import annotations

import math
from array import array
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tfla import gates
from tfla.dtypes import state_dtype
from tfla.reference.recurrence import step
from tfla.shapes import each_head
from tfla.spec import StepInputs, StepOptions

# For so many heads of all rows Python's own numbers are faster than tensors of gates, each of whose
# operations takes 1 us.
FEW_HEADS = 64
# A pass over a head's memory of so many numbers takes longer than its call: heads go one by one,
# each in two passes, of which the second one finds it in a cache.
LARGE = 2**15
# Log-gates and gauges that need none of the limits of ``tfla.gates``, and scales.
ORDINARY, LEAST_SCALE, MOST_SCALE = 1e4, 2.0**-60, 2.0**60


class Token(NamedTuple):
    """A token in the dtype that it is computed in; log-gates have no limits yet."""

    q: Tensor  # (B, H, K)
    k: Tensor
    v: Tensor  # (B, H, V)
    log_i: Tensor  # (B, H)
    log_f: Tensor


def update(x: StepInputs, options: StepOptions) -> Tensor:
    """One token: writes the new state over the old (in rows ``slots``, or all); h (B, H, V)."""
    dtype = state_dtype(x.q.dtype)
    q, k, v, i, f = (t if t.dtype == dtype else t.to(dtype) for t in x[:5])
    q, k = each_head(q, v.shape[1]), each_head(k, v.shape[1])
    log_i = gates.input_gate(options.input_gate).log_i(i)
    token = Token(q, k, v, log_i, logsigmoid(f) if options.sigmoid_f else f)
    h = None
    if x.slots is None and x.C.dtype == dtype and x.C.device.type == "cpu":
        h = _few(token, x.C, x.n, x.m, options.scale)
    if h is None:
        h = _any(token, x.C, x.n, x.m, x.slots, options.scale)
    return h if h.dtype == x.v.dtype else h.to(x.v.dtype)


def _few(
    token: Token, C: Tensor, n: Tensor | None, m: Tensor | None, scale: float
) -> Tensor | None:
    """``recurrence.step`` in place for few heads and ordinary gates, which are computed in fp64;
    else None, and nothing is done."""
    (q, k, v, log_i, log_f), (B, H, K, V) = token, C.shape
    R = B * H
    if not (0 < R <= FEW_HEADS and LEAST_SCALE < scale < MOST_SCALE and C.is_contiguous()):
        return None
    if n is not None and not n.is_contiguous():
        return None
    writes, keeps = (list(chain.from_iterable(x.tolist())) for x in (log_i, log_f))
    gauges = [0.0] * R if m is None else list(chain.from_iterable(m.tolist()))
    for x in (*writes, *keeps, *gauges):
        if not -ORDINARY < x < ORDINARY:  # nor where it is NaN
            return None
    after = gauges
    if m is not None:
        after = [max(b + g, a) for a, b, g in zip(writes, keeps, gauges, strict=True)]
        if m.dtype == torch.float32:
            after = array("f", after).tolist()  # as they will be read
    decay = [_exp(b + g - g_next) for b, g, g_next in zip(keeps, gauges, after, strict=True)]
    weight = [_exp(a - g_next) for a, g_next in zip(writes, after, strict=True)]
    numbers = torch.tensor([*decay, *weight, *after], dtype=C.dtype, device=C.device)
    decays, weights, gauge = numbers.view(3, R, 1, 1).unbind()
    q, k, v = q.reshape(R, 1, K), k.reshape(R, K, 1), v.reshape(R, 1, V)
    C, k = C.view(R, K, V), k * weights
    if 0.0 in decay:  # what is erased is 0, whatever it was
        C.masked_fill_(decays == 0.0, 0.0)
    if K * V < LARGE:
        y = torch.bmm(q, C.mul_(decays).addcmul_(k, v))
    else:
        y = C.new_empty(R, 1, V)
        columns, rows = k.squeeze(-1).unbind(), v.squeeze(1).unbind()
        heads = zip(C.unbind(), columns, rows, decay, q.unbind(), y.unbind(), strict=True)
        for memory, column, row, kept, query, out in heads:
            torch.mm(query, memory.addr_(column, row, beta=kept), out=out)
    y.mul_(scale)
    if n is None or m is None:
        return y.view(B, H, V)
    m.copy_(gauge.view(B, H))
    n = n.view(R, K, 1)
    if 0.0 in decay:
        n.masked_fill_(decays == 0.0, 0.0)
    nu = torch.bmm(q, n.mul_(decays).add_(k)).flatten().tolist()
    most = -math.log(torch.finfo(C.dtype).tiny)
    floors = [math.exp(min(max(-g, -most), most)) for g in after]
    den = [max(abs(x) * scale, floor) for x, floor in zip(nu, floors, strict=True)]
    return y.div_(torch.tensor(den, dtype=C.dtype, device=C.device).view(R, 1, 1)).view(B, H, V)


def _exp(x: float) -> float:
    """exp(x), where it is beyond fp64 a number that is inf in fp32."""
    return math.exp(min(x, 709.0))


def _any(
    token: Token,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    """The step of any rows, gates, scale and device."""
    rows: Any = slice(None) if slots is None else slots.long().clamp(0, max(len(C) - 1, 0))
    dtype = token.q.dtype
    states = [None if s is None else s[rows].to(dtype) for s in (C, n, m)]
    inplace = slots is None and C.dtype == dtype  # fresh memory takes five times the arithmetic
    h, *new = step(*token, *states, scale, inplace)  # type: ignore
    if slots is not None and len(slots) > 0:
        known = (slots >= 0) & (slots < len(C))
        # Without waiting for a device: who has no row writes what the first who has one does, to
        # the same place, and nobody writes anything where there is none.
        source = torch.where(known, torch.arange(len(known), device=h.device), known.int().argmax())
        rows = rows[source]
        for at, old in enumerate(states):
            if old is not None:
                new[at] = torch.where(known.any(), new[at][source], old)  # type: ignore[index]
        h = h.masked_fill(~known[:, None, None], torch.nan)
    for state, value in zip((C, n, m), new, strict=True):
        if state is not None and value is not None and not (inplace and state is C):
            state[rows] = value.to(state.dtype)
    return h
