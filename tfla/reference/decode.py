"""One token at a time on the backend "reference"."""

from __future__ import annotations

import math
from array import array
from typing import Any

import torch
from torch import Tensor

from tfla import gates
from tfla.gates import Activations
from tfla.reference.recurrence import step

# For so many heads of all rows Python's own numbers are faster than tensors of gates, each of whose
# operations takes 1 us; and a pass over a state of so many numbers takes longer than its call, so
# heads go one by one, each through a cache.
FEW_HEADS, LARGE = 64, 2**15
# Log-gates and gauges that need none of the limits of ``tfla.gates``, and scales.
ORDINARY, LEAST_SCALE, MOST_SCALE = 1e4, 2.0**-60, 2.0**60


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
    log_i = activations.gate.log_i(i.to(dtype))
    f = f.to(dtype)
    log_f = torch.nn.functional.logsigmoid(f) if activations.sigmoid_f else f
    if slots is None and C.dtype == dtype and C.device.type == "cpu":
        h = _few(*(x.to(dtype) for x in (q, k, v)), log_i, log_f, C, n, m, scale)
        if h is not None:
            return h.to(v.dtype)
    return _any(q, k, v, log_i, log_f, C, n, m, slots, scale, dtype)


def _few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    scale: float,
) -> Tensor | None:
    """``recurrence.step`` in place for few heads and ordinary gates; else None, and nothing is
    done. Gates in fp64, and one pass over a large state."""
    B, H, K, V = C.shape
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    slots: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The step of any rows, gates, scale and device."""
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
