"""Gates become two exponents, and their gradients come back: the only file that knows which gate
it serves.

With ``log_i``, ``log_f`` the log-gates of a chunk of L tokens and ``m_in`` the gauge of the state
that enters it,

    b_t = sum_{r<=t} log_f_r            p_s = log_i_s - b_s                 source exponent
    M_t = max(m_in, max_{s<=t} p_s)     normalised                          target exponent
    M_t = -b_t                          not normalised (the gauge is 0 throughout)
    m_t = b_t + M_t                     m_out = round(m_L),  M_out = m_out - b_L

so that token s reaches token t with weight exp(p_s - M_t), the incoming state with
exp(m_in - M_t), and both reach the end of the chunk with exp(p_s - M_out) and exp(m_in - M_out).
Source: arXiv 2503.14376, section 3, in another gauge.

Only differences of exponents matter, and they must stay exact while the exponents drift by
thousands, or by millions where users reset with f = -1e5: a whole-row fp32 sum is off by 1e-2 in
dq at 65,536 tokens. So exponents count in powers of two, whole ones and a rest apart: a *pair* is
an fp64 tensor (2, ...) of integers and of numbers in [-1/2, 1/2], whose sum is meant. The rounding
of m_out is taken up by M_out, so no error passes from chunk to chunk: a gauge may be any number
near the maximum, if all weights are made with the same one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOG2E = 1.4426950408889634

# Stand-ins for -inf that survive subtraction. A forget gate of e^-1e5 erases any state, and what 64
# of them sum up to is a whole power of two that fp32 still holds exactly. A state of gauge -1e30
# loses to any token but those of log_i = -inf, which lose to it.
LOG_F_MIN = -1e5
GAUGE_MIN = -1e30
LOG_I_MIN = -1e31


class Gate(NamedTuple):
    """What an input gate's name says: is log_i = logsigmoid(i), is h divided by the normaliser?"""

    sigmoid: bool
    normalize: bool


INPUT_GATES = {
    "exp": Gate(sigmoid=False, normalize=True),
    "sigmoid": Gate(sigmoid=True, normalize=False),
}


class Activations(NamedTuple):
    """Which pre-activations pass through logsigmoid on their way to log-gates (the others are
    log-gates already)."""

    sigmoid_i: bool
    sigmoid_f: bool


def log_gates(i: Tensor, f: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """(log_i, log_f) from pre-activations, in the dtype that comes in; -inf becomes finite."""
    log_i = logsigmoid(i) if activations.sigmoid_i else i
    log_f = logsigmoid(f) if activations.sigmoid_f else f
    return log_i.clamp(min=LOG_I_MIN), log_f.clamp(min=LOG_F_MIN)


def gate_gradients(
    dlog_i: Tensor, dlog_f: Tensor, i: Tensor, f: Tensor, activations: Activations
) -> tuple[Tensor, Tensor]:
    """(di, df) from the gradients of the log-gates: d logsigmoid(x) / dx = sigmoid(-x)."""
    di = dlog_i * torch.sigmoid(-i) if activations.sigmoid_i else dlog_i
    df = dlog_f * torch.sigmoid(-f) if activations.sigmoid_f else dlog_f
    return di, df


def between(x: Tensor, dim: int = 0) -> Tensor:
    """The sum of those behind each along ``dim``."""
    size = x.shape[dim]
    if size == 1:
        return torch.zeros_like(x)
    ends = x.narrow(dim, 1, size - 1), torch.zeros_like(x.narrow(dim, 0, 1))
    return torch.cat(ends, dim).flip(dim).cumsum(dim).flip(dim)


def behind(x: Tensor) -> Tensor:
    """The same along the T of (..., T), in pieces: a GPU sums one long row slowly, and slower still
    along an axis that is not the last."""
    pieces = x.unflatten(-1, (math.gcd(x.shape[-1], 1024), -1))
    return (between(pieces, -1) + between(pieces.sum(-1), -1)[..., None]).flatten(-2)


def pair(x: Tensor) -> Tensor:
    """(...) natural logarithms, fp64 -> (2, ...) whole powers of two and rests."""
    return _carry(torch.stack([torch.zeros_like(x), x * LOG2E]))


def _carry(x: Tensor) -> Tensor:
    """The same pair with the rests in [-1/2, 1/2]."""
    carry = x[1].round()
    return torch.stack([x[0] + carry, x[1] - carry])


def exp(x: Tensor) -> Tensor:
    """The number whose logarithm is a pair."""
    return x.sum(0).exp2()


class Exponents(NamedTuple):
    """The exponents of C chunks as pairs: (2, C, H, L), or (2, C, H) for a whole chunk."""

    source: Tensor  # p
    target: Tensor  # M
    m: Tensor  # m_t, the gauge after each token
    m_in: Tensor  # gauge of the state that enters the chunk
    M_out: Tensor  # what the end of the chunk is for a source: exp(p - M_out)
    m_final: Tensor  # (N, H) gauge after the last chunk of each sequence, in ``dtype``


def exponents(
    log_i: Tensor, log_f: Tensor, m: Tensor | None, steps: list[slice], n: int, normalize: bool,
    dtype: torch.dtype,
) -> Exponents:  # fmt: skip
    """The exponents of every chunk.

    log_i, log_f: (C, H, L) fp64. m: (N, H) initial gauge or None. steps: which sequences the first
    chunks continue, which the next ones do, and so on. n: N, the number of sequences. dtype: the
    dtype of gauges.
    """
    H = log_i.shape[1]
    b = _carry(pair(log_f).cumsum(-1))
    p = _carry(pair(log_i) - b)
    b_L = b[..., -1]
    if not normalize:
        zero = torch.zeros_like(b_L)
        return Exponents(p, -b, torch.zeros_like(b), zero, -b_L, log_i.new_zeros(n, H, dtype=dtype))

    # From chunk to chunk, m_out = max(m_in, max p) + b_L.
    gauge = log_i.new_full((n, H), GAUGE_MIN) if m is None else m.to(log_i.dtype)
    gauge = gauge.clamp(min=GAUGE_MIN)
    p_max, total = p.sum(0).amax(-1) / LOG2E, b_L.sum(0) / LOG2E
    m_in, m_out = torch.empty_like(total), torch.empty_like(total)
    counts = [step.stop - step.start for step in steps]
    parts = (x.split(counts) for x in (m_in, m_out, p_max, total))
    for step, enters, leaves, top, b_last in zip(steps, *parts, strict=True):
        rows = gauge[step]
        enters.copy_(rows)
        leaves.copy_(torch.maximum(rows, top).add_(b_last).to(dtype))
        rows.copy_(leaves)
    # A gauge that is still the stand-in belongs to a state of zeros: its gauge may as well be 0.
    final = torch.where(gauge <= GAUGE_MIN, 0.0, gauge).to(dtype)

    # Within each chunk, the largest of m_in and p so far.
    m_in, m_out = pair(m_in), pair(m_out)
    candidates = torch.cat([m_in[..., None], p], -1)
    largest = candidates.sum(0).cummax(-1).indices[..., 1:]
    M = candidates.gather(-1, largest.expand(2, *largest.shape))
    return Exponents(p, M, b + M, m_in, m_out - b_L, final)
