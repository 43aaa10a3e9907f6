"""Gates become two exponents, and their gradients come back: the only file that knows which gate it serves.

With ``log_i``, ``log_f`` the log-gates of a chunk of L tokens and ``m_in`` the gauge of the state that enters it,

    b_t = sum_{r<=t} log_f_r                p_s = log_i_s - b_s             source exponent
    M_t = max(m_in, max_{s<=t} p_s)         normalised                      target exponent
    M_t = -b_t                              not normalised (the gauge is 0 throughout)
    m_t = b_t + M_t                         m_out = round(m_L),  M_out = m_out - b_L

so that token s reaches token t with weight exp(p_s - M_t), the incoming state with exp(m_in - M_t), and both reach
the end of the chunk with exp(p_s - M_out) and exp(m_in - M_out). Everything is summed in fp64, chunk by chunk, and handed
on as pairs (hi, lo) of the working dtype: a whole-row fp32 sum is off by 1e-2 in dq at 65,536 tokens. M_out takes up the
rounding of m_out, so no error passes from chunk to chunk. Source: arXiv 2503.14376, section 3, in another gauge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Stand-ins for -inf that survive subtraction. A log forget gate of -1e8 erases any state; a gauge of -1e30 loses to any token.
LOG_F_MIN = -1e8
GAUGE_MIN = -1e30


class Gate(NamedTuple):
    """What the name of an input gate stands for: is log_i = logsigmoid(i), and is h divided by the normaliser?"""

    sigmoid: bool
    normalize: bool


INPUT_GATES = {"exp": Gate(sigmoid=False, normalize=True), "sigmoid": Gate(sigmoid=True, normalize=False)}


class Activations(NamedTuple):
    """Which pre-activations pass through logsigmoid on their way to log-gates (the others are log-gates already)."""

    sigmoid_i: bool
    sigmoid_f: bool


def log_gates(i: Tensor, f: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """(log_i, log_f) from pre-activations, in the dtype that comes in; -inf becomes its finite stand-in."""
    log_i = logsigmoid(i) if activations.sigmoid_i else i
    log_f = logsigmoid(f) if activations.sigmoid_f else f
    return log_i.clamp(min=GAUGE_MIN), log_f.clamp(min=LOG_F_MIN)


def gate_gradients(
    dlog_i: Tensor, dlog_f: Tensor, i: Tensor, f: Tensor, activations: Activations
) -> tuple[Tensor, Tensor]:
    """(di, df) from the gradients of the log-gates: d logsigmoid(x) / dx = sigmoid(-x)."""
    di = dlog_i * torch.sigmoid(-i) if activations.sigmoid_i else dlog_i
    df = dlog_f * torch.sigmoid(-f) if activations.sigmoid_f else dlog_f
    return di, df


class Exponents(NamedTuple):
    """The exponents of C chunks (fp64), all (C, H, L) but the gauges, which are (C, H)."""

    source: Tensor  # p
    target: Tensor  # M
    m: Tensor  # m_t, the gauge after each token
    m_in: Tensor  # gauge of the state that enters the chunk
    M_out: Tensor  # what the end of the chunk is for a source: exp(p - M_out)
    m_final: Tensor  # (N, H) gauge after the last chunk of each sequence, as it is returned


def exponents(
    log_i: Tensor, log_f: Tensor, m: Tensor | None, steps: list[slice], n: int, normalize: bool, dtype: torch.dtype
) -> Exponents:
    """The exponents of every chunk.

    log_i, log_f: (C, H, L) fp64, chunks in the order of ``steps``. m: (N, H) initial gauge or None.
    steps: step j is the slice of the chunks that are the j-th of their sequence; its r-th chunk belongs to sequence r.
    n: N, the number of sequences. dtype: the dtype of the gauge that is handed from chunk to chunk.
    """
    H = log_i.shape[1]
    b = log_f.cumsum(-1)
    p = log_i - b
    b_last = b[..., -1]
    m_in = torch.zeros_like(b_last)
    m_out = torch.zeros_like(b_last)
    if not normalize:
        final = b.new_zeros(n, H)
        return Exponents(p, -b, torch.zeros_like(b), m_in, m_out - b_last, final)
    gauge = b.new_full((n, H), GAUGE_MIN) if m is None else m.to(b.dtype).clamp(min=GAUGE_MIN)
    p_max = p.cummax(-1).values
    for step in steps:
        rows = gauge[: step.stop - step.start]
        m_in[step] = rows
        rows = (torch.maximum(rows, p_max[step, :, -1]) + b_last[step]).to(dtype).to(b.dtype)
        m_out[step] = rows
        gauge = torch.cat([rows, gauge[len(rows) :]])
    M = torch.maximum(m_in[..., None], p_max)
    # A gauge that is still the stand-in belongs to a state of zeros, whose gauge may as well be 0.
    final = torch.where(gauge <= GAUGE_MIN, 0.0, gauge)
    return Exponents(p, M, b + M, m_in, m_out - b_last, final)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (fp64) as a pair of ``dtype`` whose sum is x to twice the precision."""
    hi = x.to(dtype)
    return hi, (x - hi.to(x.dtype)).to(dtype)


def log_forget_gradient(db: Tensor, after: Tensor, reset: Tensor) -> Tensor:
    """dlog_f_t = sum_{r>=t} db_r within a chunk plus ``after``, the sum of all later ones; it restarts where ``reset`` holds.

    db: (C, H, L) fp64. after: (C, H), which is <C, dC> + <n, dn> at the end of the chunk. reset: (C, H, L) bool, tokens whose
    decay exp(log_f_t + m_{t-1} - m_t) underflows: nothing before them is seen after them, so their own gradient is zero.
    """
    total = db.flip(-1).cumsum(-1).flip(-1) + after[..., None]
    L = db.shape[-1]
    # The first reset at or after each token; L where there is none.
    position = torch.where(reset, torch.arange(L, device=db.device), L)
    first = position.flip(-1).cummin(-1).values.flip(-1)
    beyond = torch.nn.functional.pad(total, (0, 1)).gather(-1, first)
    return total - beyond
