"""The specification: the mLSTM token by token, which everything else is held against.

Run it in fp64 for the truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tfla import gates


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    scale: float,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One token of the recurrence, in the dtype of the operands; n, m are None when not normalised.
    ``inplace``: C' lies where C lay.

        m' = max(log_f + m, log_i)
        C' = exp(log_f + m - m') C + exp(log_i - m') k v^T        n' likewise with k
        h  = C'^T (scale q) / max(|n' . scale q|, exp(-m'))

    q, k: (N, H, K). v: (N, H, V). log_i, log_f, m: (N, H). C: (N, H, K, V). n: (N, H, K). Without
    the normaliser m = 0, h = C'^T (scale q). Source: arXiv 2503.14376, equations 3 to 9.

    Log-gates may be infinite (``tfla.gates.limited``). What is decayed to 0 is 0, whatever it was;
    where nothing is left of a state, log_i = log_f = -inf, its gauge is 0."""
    q, log_i, log_f = q * scale, *gates.limited(log_i, log_f)
    m_next = None
    if m is not None:
        carried = log_f + m
        m_next = torch.maximum(carried, log_i)
        m_next = m_next.masked_fill(m_next < gates.EMPTY, 0.0)
        log_f, log_i = gates.difference(log_f, m, m_next), log_i - m_next
    decay, weight = log_f.exp(), log_i.exp()
    erased, k = (decay == 0.0)[..., None], weight[..., None] * k
    if inplace:
        C = C.mul_(decay[..., None, None])
        if C.device.type != "cpu" or erased.any():
            C.masked_fill_(erased[..., None], 0.0)
    else:
        C = (decay[..., None, None] * C).masked_fill(erased[..., None], 0.0)
    C = C.addcmul_(k[..., :, None], v[..., None, :])
    h = (q[..., None, :] @ C).squeeze(-2)
    if n is None or m_next is None:
        return h, C, None, None
    n = (decay[..., None] * n).masked_fill(erased, 0.0) + k
    most = -math.log(torch.finfo(q.dtype).tiny)
    floor = (-m_next).clamp(-most, most).exp()
    return h / torch.maximum((q * n).sum(-1).abs(), floor)[..., None], C, n, m_next


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``step`` over the T axis of (B, T, H, ...): the specification that all is held against."""
    h = torch.empty_like(v)
    for t in range(q.shape[1]):
        i, f = log_i[:, t], log_f[:, t]
        h[:, t], C, n, m = step(q[:, t], k[:, t], v[:, t], i, f, C, n, m, scale)
    return h, C, n, m
