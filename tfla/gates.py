"""Gates become two exponents, and their gradients come back: the file that says which input gates
there are (``register``), and the one that keeps gates within their limits (``tfla.limits``), for
both backends, sequences and steps.

With ``log_i``, ``log_f`` the log-gates of a chunk of L tokens, token s reaches a later token t with
weight exp(log_i_s + log_f_{s+1} + ... + log_f_t). With a normaliser the recurrence is written
in a gauge m (m_in is that of the state which enters the chunk), and its gates are *stabilised*:

    m_t = max(log_f_t + m_{t-1}, log_i_t)
    a_t = log_f_t + m_{t-1} - m_t            the log-decay of the state       a, u <= 0, and one of
    u_t = log_i_t - m_t                      the log-weight of the token      the two is 0

Without one m = 0, a = log_f and u = log_i. From here on there is one recurrence, of (a, u):

    b_t = sum_{r<=t} a_r       p_s = u_s - b_s                           source exponent
    D_ts = exp(p_s + b_t)      weight of token s at token t >= s         target exponent: -b_t

The incoming state weighs exp(b_t), and at the end of the chunk token s weighs exp(p_s + b_L).
Source: arXiv 2503.14376, section 3, in another gauge.

m_t is a maximum of sums that start at a token and never a difference of sums from the start of the
chunk, so no gate, however large, takes digits from another: a reset with f = -1e5, or -1e30, leaves
what follows as exact as if the sequence began there. What is compared with something 2^2048 times
as large weighs nothing, so a and u are bounded, and their sums over a chunk are small enough that
whole powers of two are exact in fp32. A *pair* is a tensor (2, ...) of whole powers of two and of
rests in [-1/2, 1/2], whose sum is meant.

A gauge may be any number near the maximum, if all weights are made with the same one: within a call
it is fp64, and the rounding of the final one to the dtype of states is taken up by the weights of
the last chunk, unless it is so large (beyond 1e9 in fp32) that only the gauge is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tfla.limits import (
    EMPTY,
    FOLLOWED,
    LIMIT,
    LOG2E,
    LOG_F_NOTHING,
    LOG_I_NOTHING,
    NOTHING,
    RESET,
    STEP,
    WRITE,
)
from tfla.spec import Activations, TritonForm

# Log-gates below this in size leave their sums over a chunk exact enough in fp64 for fp32.
PLAIN = 16.0


# ---------------------------------------------------------------- the registry of input gates


@dataclass(frozen=True)
class Gate:
    """An input gate: log_i as a function of the pre-activation i, element by element.

    The limits of log-gates are applied to what the functions return, so they need none of their
    own; they should map +-inf to a limit and not to NaN.
    """

    name: str  # what ``input_gate`` says
    about: str  # in a few words, for help texts
    normalize: bool  # is h divided by the normaliser where the caller does not say?
    log_i: Callable[[Tensor], Tensor]  # (i) -> log_i, in the dtype of i: fp32 or fp64
    gradient: Callable[[Tensor, Tensor], Tensor]  # (dlog_i, i) -> di
    # Gives the Triton form once a kernel wants it: a file that registers a gate need not import
    # Triton, and this one must not. Those of the gates below stand in tfla/kernels/gates.py.
    triton: Callable[[], TritonForm] | None = None


INPUT_GATES: dict[str, Gate] = {}
InputGate = Literal["exp", "sigmoid"]  # those below, in the signatures of public functions


def register(gate: Gate) -> Gate:
    """Make ``input_gate=gate.name`` known: to the functions on both backends, the layers, the
    models and the command. ValueError if another gate has this name."""
    if INPUT_GATES.setdefault(gate.name, gate) is not gate:
        raise ValueError(f"there is another input gate named {gate.name!r}; choose another name.")
    return gate


def input_gate(name: Any) -> Gate:
    """The input gate of this name, or a ValueError that lists all names."""
    found = INPUT_GATES.get(name) if isinstance(name, str) else None
    if found is None:
        known = " or ".join(map(repr, INPUT_GATES))
        raise ValueError(f"input_gate must be {known}; got {name!r}.")
    return found


def described() -> str:
    """All input gates in one line, for help texts."""
    return " or ".join(f"{gate.name} ({gate.about})" for gate in INPUT_GATES.values())


register(
    Gate(
        name="exp",
        about="the paper's mLSTMexp",
        normalize=True,
        log_i=lambda i: i,
        gradient=lambda dlog_i, i: dlog_i,
    )
)
register(
    Gate(
        name="sigmoid",
        about="its mLSTMsig",
        normalize=False,
        log_i=logsigmoid,
        gradient=lambda dlog_i, i: dlog_i * torch.sigmoid(-i),
    )
)


# ---------------------------------------------------------------- log-gates and their gradients


def log_gates(i: Tensor, f: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """(log_i, log_f) from pre-activations, in the dtype that comes in and within the limits: finite
    unless NaN, which stays NaN."""
    log_i = input_gate(activations.input_gate).log_i(i)
    log_f = logsigmoid(f) if activations.sigmoid_f else f
    return limited(log_i, log_f)


def limited(log_i: Tensor, log_f: Tensor) -> tuple[Tensor, Tensor]:
    """The same log-gates within the limits."""
    pairs = ((log_i, LOG_I_NOTHING), (log_f, LOG_F_NOTHING))
    log_i, log_f = (x.clamp(max=LIMIT).masked_fill(x < -LIMIT, nothing) for x, nothing in pairs)
    return log_i, log_f


def difference(log_f: Tensor, m: Tensor, m_next: Tensor) -> Tensor:
    """log_f + m - m_next, the log-decay of a state; below fp64 with what rounding takes from
    log_f + m: a gauge of 1e5 has steps of 0.008 in fp32."""
    carried = log_f + m
    if carried.dtype == torch.float64:
        return carried - m_next
    kept = carried - log_f
    lost = (log_f - (carried - kept)) + (m - kept)
    return carried - m_next + torch.where(lost.abs() > FOLLOWED, 0.0, lost)


def rounded(m: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A gauge (fp64) in ``dtype``, and the number in fp64 that weights are made with: the same,
    unless rounding it took more than weights can follow."""
    low = m.to(dtype)
    lost = m - low
    return low, torch.where(lost.abs() > FOLLOWED, m, m - lost)


def gate_gradients(
    dlog_i: Tensor, dlog_f: Tensor, i: Tensor, f: Tensor, activations: Activations
) -> tuple[Tensor, Tensor]:
    """(di, df) from the gradients of the log-gates: d logsigmoid(x) / dx = sigmoid(-x)."""
    di = input_gate(activations.input_gate).gradient(dlog_i, i)
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
    """(...) binary logarithms, fp64 -> (2, ...) whole ones and rests."""
    return _carry(torch.stack([torch.zeros_like(x), x]))


def _carry(x: Tensor) -> Tensor:
    """The same pair with the rests in [-1/2, 1/2]."""
    carry = x[1].round()
    return torch.stack([x[0] + carry, x[1] - carry])


def exp(x: Tensor) -> Tensor:
    """The number whose logarithm is a pair."""
    return x.sum(0).exp2()


class Exponents(NamedTuple):
    """The exponents of C chunks; pairs are (2, C, H, L), or (2, C, H) for a whole chunk."""

    source: Tensor  # p, a pair
    target: Tensor  # -b, a pair
    m: Tensor  # (C, H, L) m_t, the gauge after each token; 0 without a normaliser
    end: Tensor  # b_L, a pair: what the end of the chunk is for a source, exp(p + b_L)
    m_final: Tensor  # (N, H) gauge after the last chunk of each sequence, in ``dtype``


def exponents(
    log_i: Tensor,
    log_f: Tensor,
    m: Tensor | None,
    steps: list[slice],
    n: int,
    normalize: bool,
    dtype: torch.dtype,
) -> Exponents:
    """The exponents of every chunk.

    log_i, log_f: (C, H, L) fp64, within the limits. m: (N, H) initial gauge or None. steps: which
    sequences the first chunks continue, which the next ones do, and so on. n: N, the number of
    sequences. dtype: the dtype of gauges.
    """
    H = log_i.shape[1]
    empty, resets = log_i <= LOG_I_NOTHING, log_f <= LOG_F_NOTHING
    if normalize:
        log_i, log_f, m_t, rounding, m_final = _stabilized(log_i, log_f, m, steps, n, dtype)
    else:
        m_t, rounding = torch.zeros_like(log_i), torch.zeros_like(log_i[..., 0])
        m_final = log_i.new_zeros(n, H, dtype=dtype)
    a = (log_f * LOG2E).clamp(-STEP, STEP).masked_fill(resets, -RESET)
    b = _carry(pair(a).cumsum(-1))
    p = _carry(pair((log_i * LOG2E).clamp(-WRITE, STEP)) - b)
    p[0].masked_fill_(empty, NOTHING)
    end = _carry(b[..., -1] + pair(rounding * LOG2E))
    return Exponents(p, -b, m_t, end, m_final)


def _max_plus(log_i: Tensor, log_f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(total, top), (C, H, L): what the tokens of a chunk make of a gauge, max(m + total, top)."""
    few_digits = dtype == torch.float32 and log_i.device.type == "cpu" and log_i.numel() > 0
    if few_digits and log_f.amin() > -PLAIN and log_f.amax() < PLAIN:
        ordinary = log_i.masked_fill(log_i <= LOG_I_NOTHING, 0.0)
        if ordinary.amin() > -PLAIN and ordinary.amax() < PLAIN:
            total = log_f.cumsum(-1)  # up to 64 * 16: fp64 keeps 1e-13 of a difference of these
            most, which = (log_i - total).cummax(-1)
            # Of a token that is its own maximum log_i itself, to the bit: who has won, the token or
            # the state, is told by their being equal.
            own = which == torch.arange(log_i.shape[-1], device=log_i.device)
            return total, torch.where(own, log_i, most + total)
    # By doubling: no difference of sums.
    total, top, reach = log_f, log_i, 1
    while reach < log_i.shape[-1]:
        near, far = slice(reach, None), slice(None, -reach)
        raised = torch.maximum(top[..., near], top[..., far] + total[..., near])
        summed = total[..., near] + total[..., far]
        top = torch.cat([top[..., :reach], raised], -1)
        total = torch.cat([total[..., :reach], summed], -1)
        reach *= 2
    return total, top


def _stabilized(
    log_i: Tensor, log_f: Tensor, m: Tensor | None, steps: list[slice], n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(u, a, m_t, rounding, m_final): stabilised gates and gauges, (C, H, L), how much smaller the
    gauge at the end of each chunk (C, H) is than m_L, and that after the last one, (N, H)."""
    total, top = _max_plus(log_i, log_f, dtype)
    gauge = log_i.new_full((n, log_i.shape[1]), EMPTY)
    if m is not None:
        gauge = m.to(log_i.dtype).clamp(EMPTY, -EMPTY)
    m_in = torch.empty_like(total[..., -1])
    last = torch.full((n,), -1, device="cpu")  # the last chunk of each sequence
    counts = [step.stop - step.start for step in steps]
    parts = (x.split(counts) for x in (m_in, total[..., -1], top[..., -1]))
    done = 0
    for step, enters, sum_f, most in zip(steps, *parts, strict=True):
        rows = gauge[step]
        enters.copy_(rows)
        rows.copy_(torch.maximum(rows + sum_f, most).clamp_(min=EMPTY))
        last[step] = torch.arange(done, done + len(rows), device="cpu")
        done += len(rows)
    # A gauge that is still the stand-in belongs to a state of zeros: its gauge may as well be 0.
    gauge = torch.where(gauge <= EMPTY, 0.0, gauge)
    final, followed = rounded(gauge, dtype)
    rounding = torch.zeros_like(m_in)
    used = (last >= 0).nonzero()[:, 0]  # on the CPU: a device is not asked for values
    rounding[last[used].to(m_in.device)] = (gauge - followed)[used.to(m_in.device)]

    m_t = torch.maximum(m_in[..., None] + total, top).clamp_(min=EMPTY)
    carried = log_f + torch.cat([m_in[..., None], m_t[..., :-1]], -1)
    # Where the state has won, it keeps its weight: the difference would be one of roundings.
    won = (log_i < m_t) & (m_t > EMPTY)
    a = (carried - m_t).clamp_(max=0.0).masked_fill_(won, 0.0)
    return log_i - m_t, a, m_t, rounding, final
