"""The plain recurrence of the mLSTM, one token after the other, as the oracle of the test-suite.

    m_t = max(log_f_t + m_{t-1}, log_i_t)
    C_t = exp(log_f_t + m_{t-1} - m_t) C_{t-1} + exp(log_i_t - m_t) k_t v_t^T       (K,V)
    n_t = exp(log_f_t + m_{t-1} - m_t) n_{t-1} + exp(log_i_t - m_t) k_t             (K)
    h_t = C_t^T (s q_t) / max(|n_t . s q_t|, exp(-m_t))

and, not normalised, the same with m = 0, no n and no division (arXiv 2405.04517 and 2503.14376). It
is written from these lines alone, shares no code with the package, and leaves every gradient to
autograd. In fp64 it is the truth; in a narrower dtype its own distance from the truth is the
yardstick that the package is held to.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Memory(NamedTuple):
    """C (N,H,K,V); n (N,H,K) and m (N,H), or None where nothing is normalised."""

    C: Tensor
    n: Tensor | None
    m: Tensor | None


def empty_memory(N: int, H: int, K: int, V: int, normalize: bool, dtype: torch.dtype) -> Memory:
    C = torch.zeros(N, H, K, V, dtype=dtype)
    if not normalize:
        return Memory(C, None, None)
    return Memory(C, torch.zeros(N, H, K, dtype=dtype), torch.zeros(N, H, dtype=dtype))


def one_token(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, log_i: Tensor, memory: Memory
) -> tuple[Tensor, Memory]:
    """q (scaled), k (N,H,K), v (N,H,V), log-gates (N,H); returns h (N,H,V) and the next memory."""
    C, n, m = memory
    if n is None or m is None:
        keep, write = log_f.exp(), log_i.exp()
        C = keep[..., None, None] * C + write[..., None, None] * (k[..., :, None] * v[..., None, :])
        return (C * q[..., :, None]).sum(-2), Memory(C, None, None)
    carried = log_f + m
    m = torch.maximum(carried, log_i)
    keep, write = (carried - m).exp(), (log_i - m).exp()
    C = keep[..., None, None] * C + write[..., None, None] * (k[..., :, None] * v[..., None, :])
    n = keep[..., None] * n + write[..., None] * k
    den = torch.maximum((n * q).sum(-1).abs(), (-m).exp())
    return (C * q[..., :, None]).sum(-2) / den[..., None], Memory(C, n, m)


def one_document(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, log_i: Tensor, memory: Memory
) -> tuple[Tensor, Memory]:
    """q already scaled; (N,T,H,.) tensors of one batch of equally long documents."""
    rows = []
    for t in range(q.shape[1]):
        h, memory = one_token(q[:, t], k[:, t], v[:, t], log_f[:, t], log_i[:, t], memory)
        rows.append(h)
    return (torch.stack(rows, 1) if rows else torch.zeros_like(v)), memory


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor | None = None,
    log_i: Tensor | None = None,
    *,
    normalize: bool = False,
    scale: float | None = None,
    memory: Memory | None = None,
    lengths: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Memory]:
    """The whole family in `dtype`; h comes back in v's dtype. `lengths` packs documents along T."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    out_dtype = v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    log_f, log_i = (
        torch.zeros(B, T, H, dtype=dtype) if g is None else g.to(dtype).expand(B, T, H)
        for g in (log_f, log_i)
    )
    q = q * (K**-0.5 if scale is None else scale)
    N = B if lengths is None else len(lengths)
    if memory is None:
        memory = empty_memory(N, H, K, V, normalize, dtype)
    memory = Memory(*(x if x is None else x.to(dtype) for x in memory))
    if lengths is None:
        h, memory = one_document(q, k, v, log_f, log_i, memory)
        return h.to(out_dtype), memory
    hs, ends, start = [v[:, :0]], [], 0
    for row, length in enumerate(lengths):
        part = slice(start, start + length)
        start += length
        own = Memory(*(x if x is None else x[row : row + 1] for x in memory))
        h, end = one_document(
            q[:, part], k[:, part], v[:, part], log_f[:, part], log_i[:, part], own
        )
        hs.append(h)
        ends.append(end)
    joined = Memory(
        *(None if parts[0] is None else torch.cat(parts) for parts in zip(*ends, strict=True))
    )
    return torch.cat(hs, 1).to(out_dtype), joined


def log_gates(i: Tensor, f: Tensor, input_gate: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log_f, log_i) from the pre-activations."""
    i, f = i.to(dtype), f.to(dtype)
    return F.logsigmoid(f), i if input_gate == "exp" else F.logsigmoid(i)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: str = "exp",
    normalize: bool | None = None,
    scale: float | None = None,
    memory: Memory | None = None,
    lengths: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Memory]:
    """The mLSTM in `dtype`: gates first, then the family."""
    log_f, log_i = log_gates(i, f, input_gate, dtype)
    return linear_attention(
        q,
        k,
        v,
        log_f,
        log_i,
        normalize=is_normalized(input_gate, normalize),
        scale=scale,
        memory=memory,
        lengths=lengths,
        dtype=dtype,
    )


def is_normalized(input_gate: str, normalize: bool | None) -> bool:
    return input_gate == "exp" if normalize is None else normalize


def closed_form(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, log_i: Tensor, *, normalize: bool, scale: float
) -> Tensor:
    """h from the T x T matrix of weights, which knows neither a loop nor a stabiliser:
    h_t = sum_s w_ts v_s / max(|sum_s w_ts|, 1),
    w_ts = exp(log_i_s + sum_{s<r<=t} log_f_r) (scale q_t . k_s).
    """
    b = log_f.cumsum(1)
    exponent = log_i[:, None] + b[:, :, None] - b[:, None]  # (B,T,S,H)
    past = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    w = (
        torch.where(past, exponent, -torch.inf).exp()
        * scale
        * torch.einsum("bthk,bshk->btsh", q, k)
    )
    h = torch.einsum("btsh,bshv->bthv", w, v)
    return h / w.sum(2).abs().clamp_min(1.0)[..., None] if normalize else h
