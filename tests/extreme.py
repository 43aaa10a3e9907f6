"""Problems whose gates, operands or scale leave the ordinary, and what is true of them.

The truth is computed in Python's own numbers, token by token and in sums that lose nothing
(`math.fsum`), and shares no line with the package: exponents are taken as differences of sums from
one token to another, never from the start of the sequence.
"""

import math
from typing import NamedTuple

import torch
from checks import assert_close
from torch import Tensor

import tfla

INF = math.inf
LIMIT = 2.0**100  # finite gates count up to it; what is below -LIMIT counts as -inf
# Gates that one set of limits must serve, each beside each.
EXTREMES = (-INF, -1e30, -1e6, -1e5, -104.0, -30.0, 0.0, 30.0, 90.0, 1e5, 1e30, INF)
MINIMUM = torch.finfo(torch.float32).min

# (i, f) of the tokens of one sequence.
GATES = {
    "a sum beyond any clamp": ((150000.0, 0.0), (0.0, -240000.0)),
    "an erased giant": ((2e5, 0.0, 1.0), (0.0, -1e6, 3.0)),
    "a giant that survives": ((2e5, 0.0, 1.0), (0.0, -199999.0, 3.0)),
    "equal giants": ((1e6, 0.0, -3.0, 1.0), (0.0, -1e6, 2.0, 1.0)),
    "+90, reset, -30": ((90.0, -INF, -30.0), (3.0, -1e5, 3.0)),
    "resets by 1e30": ((5.0, 1.0, 0.0, 2.0), (1.0, -1e30, 2.0, -1e30)),
    "exact resets": ((5.0, 1.0, 0.0, 2.0), (1.0, -INF, 2.0, -INF)),
    "a reset and nothing after it": ((5.0, -INF, -INF, 1.0), (1.0, -INF, 2.0, 3.0)),
    "nothing at first": ((-INF, -INF, 0.0, 1.0), (0.0, 3.0, 3.0, 3.0)),
    "the least of fp32": ((MINIMUM,) * 4, (3.0,) * 4),
    "the least of fp32, then a token": ((MINIMUM, MINIMUM, 1.0), (3.0, MINIMUM, 3.0)),
    "nothing but -1e30": ((-1e30,) * 4, (3.0,) * 4),
    "i = 1e30": ((0.0, 1e30, 2.0, 1.0), (3.0,) * 4),
    "i = inf counts as 2^100": ((0.0, INF, 2.0, 2.0**100, 3e38), (3.0, 3.0, INF, INF, 1e3)),
    "i = inf is more than 1e30": ((0.0, INF, 2.0, 1e30), (3.0, 3.0, INF, INF)),
    "1e30 there and back": ((1e30, 0.0, 1.0), (0.0, -1e30, 3.0)),
    "1e30 erased": ((1e30, 0.0, 1.0), (0.0, -INF, 3.0)),
    "a long way down": ((-7.0, *(-1e6,) * 6, -5e6), (-1e6,) * 8),
    "up and down": ((1e5, -1e5, 1e6, 0.0, 30.0), (0.0, -1e5, INF, -1e6, -30.0)),
}


class Answer(NamedTuple):
    """h (T, V) and the true size of the state, C e^m (K, V) and n e^m (K)."""

    h: Tensor
    C: Tensor
    n: Tensor


def limited(x: float) -> float:
    return -INF if x < -LIMIT else min(x, LIMIT)


def log_sigmoid(x: float) -> float:
    return x if x < -700.0 else min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _sum(terms: list[float]) -> float:
    return -INF if -INF in terms else math.fsum(terms)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else INF


def truth(
    q: Tensor, k: Tensor, v: Tensor, log_i: list[float], log_f: list[float], normalize: bool
) -> Answer:
    """q (scaled), k (T, K), v (T, V), fp64; log-gates of one sequence and head."""
    log_i, log_f = [limited(x) for x in log_i], [limited(x) for x in log_f]
    rows = []
    q, k, v = q.double(), k.double(), v.double()
    for t in range(len(log_i)):
        powers = [_sum([log_i[s], *log_f[s + 1 : t + 1]]) for s in range(t + 1)]
        m = max(powers) if normalize else 0.0
        if m == -INF:
            rows.append(torch.zeros_like(v[0]))
            continue
        w = torch.tensor([_exp(p - m) for p in powers], dtype=torch.float64)
        scores = (k[: t + 1] @ q[t]) * w
        den = max(abs(scores.sum().item()), _exp(-m)) if normalize else 1.0
        rows.append(scores @ v[: t + 1] / den)
    w = torch.tensor([_exp(p) for p in powers], dtype=torch.float64)
    return Answer(torch.stack(rows), (k * w[:, None]).mT @ v, (k * w[:, None]).sum(0))


def operands(T: int, dtype: torch.dtype, K: int = 5, V: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(T)
    return [
        torch.randn(1, T, 1, size, generator=g, dtype=torch.float64).to(dtype) for size in (K, K, V)
    ]


def run(
    i: list[float], f: list[float], dtype: torch.dtype, how: str, backend: str
) -> tuple[Tensor, tfla.State, list[Tensor]]:
    """(h, state, gradients) of a sequence in one call, in two, or by steps."""
    T = len(i)
    q, k, v = operands(T, dtype)
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    i_, f_ = (torch.tensor(x, dtype=gate).view(1, T, 1) for x in (i, f))
    x = [t.requires_grad_() for t in (q, k, v, i_, f_)]
    options = {"backend": backend, "scale": 1.0}
    if how == "whole":
        h, state = tfla.mlstm(*x, output_final_state=True, **options)
    elif how == "split":
        cut, state, parts = (T + 1) // 2, None, []
        for piece in (slice(0, cut), slice(cut, T)):
            part, state = tfla.mlstm(
                *(t[:, piece] for t in x), initial_state=state, output_final_state=True, **options
            )
            parts.append(part)
        h = torch.cat(parts, 1)
    else:
        with torch.no_grad():
            state = tfla.State(*(torch.zeros(1, 1, *s, dtype=gate) for s in ((5, 3), (5,), ())))
            parts = []
            for t in range(T):
                part, state = tfla.mlstm_step(*(y[:, t] for y in x), state, **options)
                parts.append(part)
            return torch.stack(parts, 1), state, []
    h.double().sum().backward()
    return h.detach(), tfla.State(*(s.detach() for s in state)), [t.grad for t in x]


def check(
    i: list[float], f: list[float], dtype: torch.dtype, how: str, backend: str, relative: float
) -> None:
    q, k, v = (x[0, :, 0] for x in operands(len(i), dtype))
    answer = truth(q, k, v, i, [log_sigmoid(x) for x in f], True)
    h, (C, n, m), grads = run(i, f, dtype, how, backend)
    assert all(torch.isfinite(x).all() for x in (h, C, n, m, *grads)), (h, C, n, m, grads)
    # The largest den is the largest number there is, so what is divided by exp(1e30) is not 0.
    near = torch.finfo(m.dtype).tiny * 10.0
    worst = (h[0, :, 0].double() - answer.h).abs().max()
    assert worst <= relative * answer.h.abs().max() + near, (h[0, :, 0], answer.h)
    if m.abs().max() < 80.0:
        size = m.double().exp()[0, 0]
        assert_close(C[0, 0].double() * size, answer.C, relative, "C")
        assert_close(n[0, 0].double() * size, answer.n, relative, "n")
    if not any(x >= -LIMIT for x in i):
        assert (C == 0).all() and (n == 0).all() and (how != "whole" or (m == 0).all())
