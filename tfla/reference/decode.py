"""One token at a time on the backend "reference"."""

from __future__ import annotations

import math
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tfla.reference.recurrence import step
from tfla.spec import StepInputs, StepOptions

# For so many heads of all rows Python's own numbers are faster than tensors of gates, each of whose
# operations takes 1 us; and a pass over a state of so many numbers takes longer than its call, so
# heads go one by one, each through a cache.
FEW_HEADS, LARGE = 64, 2**15
# Log-gates and gauges that need none of the limits of ``tfla.gates``, and scales.
ORDINARY, LEAST_SCALE, MOST_SCALE = 1e4, 2.0**-60, 2.0**60


def update(x: StepInputs, options: StepOptions) -> Tensor:
    """One token: writes the new state over the old (in rows ``slots``, or all); h (B, H, V)."""
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    q, k, v, f = x.q.to(dtype), x.k.to(dtype), x.v.to(dtype), x.f.to(dtype)
    log_i = options.activations.gate.log_i(x.i.to(dtype))
    log_f = logsigmoid(f) if options.sigmoid_f else f
    token = Token(q, k, v, log_i, log_f)
    if x.slots is None and x.C.dtype == dtype and x.C.device.type == "cpu":
        h = _few(token, x.C, x.n, x.m, options.scale)
        if h is not None:
            return h.to(x.v.dtype)
    return _any(token, x.C, x.n, x.m, x.slots, options.scale).to(x.v.dtype)


class Token(NamedTuple):
    """A token in the dtype that it is computed in; log-gates have no limits yet."""

    q: Tensor  # (B, H, K)
    k: Tensor
    v: Tensor  # (B, H, V)
    log_i: Tensor  # (B, H)
    log_f: Tensor


def _few(
    token: Token, C: Tensor, n: Tensor | None, m: Tensor | None, scale: float
) -> Tensor | None:
    """``recurrence.step`` in place for few heads and ordinary gates; else None, and nothing is
    done. Gates in fp64, and one pass over a large state."""
    (q, k, v, log_i, log_f), (B, H, K, V) = token, C.shape
    R = B * H
    usual = 0 < R <= FEW_HEADS and LEAST_SCALE < scale < MOST_SCALE and C.is_contiguous()
    if not usual or (n is not None and not n.is_contiguous()):
        return None
    pairs = list(zip(log_i.flatten().tolist(), log_f.flatten().tolist(), strict=True))
    gauges = [0.0] * R if m is None else m.flatten().tolist()
    numbers = [x for pair in pairs for x in pair] + gauges
    if not (min(numbers) > -ORDINARY and max(numbers) < ORDINARY):  # nor with NaN
        return None
    if any(map(math.isnan, numbers)):
        return None
    if m is not None:
        after = [max(b + g, a) for (a, b), g in zip(pairs, gauges, strict=True)]
        if m.dtype == torch.float32:
            after = array("f", after).tolist()  # as they will be read
        m.copy_(torch.tensor(after, dtype=m.dtype).view(B, H))
    else:
        after = gauges
    each = list(zip(pairs, gauges, after, strict=True))
    decay = [_exp(b + g - g_next) for (_, b), g, g_next in each]
    weight = [_exp(a - g_next) for (a, _), _, g_next in each]
    C, q, k, v = C.view(R, K, V), q.reshape(R, K), k.reshape(R, K), v.reshape(R, V)
    if K * V < LARGE:
        factors = torch.tensor([decay, weight], dtype=C.dtype)[..., None]
        k = k * factors[1]
        if 0.0 in decay:  # what is erased is 0, whatever it was
            C.masked_fill_(factors[0][..., None] == 0.0, 0.0)
        C.mul_(factors[0][..., None]).addcmul_(k[..., None], v[:, None])
        y = torch.bmm(q[:, None], C).view(R, V)
    else:
        y = torch.empty(R, V, dtype=C.dtype)
        for r in range(R):
            memory = C[r].addr_(k[r], v[r], beta=decay[r], alpha=weight[r])
            torch.mv(memory.t(), q[r], out=y[r])
        k = k * torch.tensor(weight, dtype=C.dtype)[:, None]
        factors = torch.tensor([decay], dtype=C.dtype)[..., None] if n is not None else y
    if n is None:
        return y.mul_(scale).view(B, H, V)
    n = n.view(R, K)
    if 0.0 in decay:
        n.masked_fill_(factors[0] == 0.0, 0.0)
    n.mul_(factors[0]).add_(k)
    info = torch.finfo(C.dtype)
    most = -math.log(info.tiny)
    floors = [math.exp(min(max(-g, -most), most)) for g in after]
    nus = (n * q).sum(-1).tolist()
    den = [max(abs(x) * scale, floor) for x, floor in zip(nus, floors, strict=True)]
    return y.mul_(scale).div_(torch.tensor(den, dtype=C.dtype)[:, None]).view(B, H, V)


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
