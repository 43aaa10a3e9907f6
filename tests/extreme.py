"""Problems whose gates, operands or scale leave the ordinary, and what is true of them.

The truth is computed in Python's own numbers, token by token and in sums that lose nothing
(`math.fsum`), and shares no line with the package: exponents are taken as differences of sums from
one token to another, never from the start of the sequence.
"""

import functools
import math
from typing import NamedTuple

import torch
from checks import assert_close
from torch import Tensor

import tfla

INF = math.inf
LIMIT = 2.0**100  # finite gates count up to it; what is below -LIMIT counts as -inf
# Gates that one set of limits must serve, each beside each. Beside +1e30, which a sum with -1e30
# takes back, fp64 knows nothing of a third gate (and beside 2^53 of any): not among them.
EXTREMES = (-INF, -1e30, -1e6, -1e5, -104.0, -30.0, 0.0, 30.0, 90.0, 1e5, 1e6, INF)
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
    """q (scaled), k (T, K), v (T, V), fp64; log-gates of one sequence and head. Differentiable in
    q, k and v."""
    log_i, log_f = [limited(x) for x in log_i], [limited(x) for x in log_f]
    rows = []
    q, k, v = q.double(), k.double(), v.double()
    for t in range(len(log_i)):
        powers = [_sum([log_i[s], *log_f[s + 1 : t + 1]]) for s in range(t + 1)]
        m = max(powers) if normalize else 0.0
        if m == -INF:
            rows.append(q[t].sum() * k[t].sum() * v[0] * 0.0)
            continue
        w = torch.tensor([_exp(p - m) for p in powers], dtype=torch.float64)
        scores = (k[: t + 1] @ q[t]) * w
        num = scores @ v[: t + 1]
        nu, floor = scores.sum().abs(), _exp(-m)
        rows.append((num / nu if nu > floor else num / floor) if normalize else num)
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
    q, k, v = (x[0, :, 0].double().requires_grad_() for x in operands(len(i), dtype))
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
    if grads:
        answer.h.sum().backward()
        for name, x, y in zip("qkv", grads, (q, k, v), strict=False):
            worst = (x[0, :, 0].double() - y.grad).abs().max()
            size = max(y.grad.abs().max().item(), 0.1)  # 0 may be a difference of terms of 1
            assert worst <= relative * size + near, (f"d{name}", x, y.grad)
    if not any(x >= -LIMIT for x in i):
        assert (C == 0).all() and (n == 0).all() and (how != "whole" or (m == 0).all())


# ---------------------------------------------------------------- what is not finite


def call(
    x: dict[str, Tensor], backend: str, **options: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(results over tokens, final state) with gradients of a sum of h that no two terms share."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    h, state = tfla.mlstm(*leaves.values(), backend=backend, **options)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(7)
    dh = torch.randn(h.shape, generator=g, dtype=torch.float64).to(h.dtype)
    grads = torch.autograd.grad(h, list(leaves.values()), dh)
    out = {"h": h.detach()} | {f"d{n}": t for n, t in zip(leaves, grads, strict=True)}
    parts = () if state is None else zip("Cnm", state, strict=True)
    return out, {n: s for n, s in parts if s is not None}


def problem(B: int, T: int, H: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = {"q": (8,), "k": (8,), "v": (8,), "i": (), "f": ()}
    x = {n: torch.randn(B, T, H, *s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    x["f"] += 2.0
    return {n: t.to(dtype if n in "qkv" else torch.float32) for n, t in x.items()}


def same(x: Tensor, y: Tensor, relative: float, what: str) -> None:
    assert torch.isfinite(x).all(), f"{what}: not finite"
    worst, size = (x.double() - y.double()).abs().max(), y.double().abs().max()
    assert worst <= relative * size, f"{what}: {worst} apart at a size of {size}"


def check_finite_stays_away(backend: str, dtype: torch.dtype, input_gate: str) -> None:
    """q_5 k_12 overflows where it weighs nothing; so does dh_5 v_12, and q_13 k_12 where token 12
    has a weight of 0. Nothing else changes by it."""
    big = 1e25 if dtype == torch.float32 else 6e4
    small = torch.finfo(dtype).max / big * 1e4 if dtype == torch.float32 else 6e4
    x = problem(1, 20, 2, dtype)
    x["q"][0, 5, 0], x["k"][0, 12, 0], x["q"][0, 13, 0] = 0.0, 0.0, 0.0
    x["q"][0, 5, 0, 0] = x["q"][0, 13, 0, 0] = small
    x["i"][0, 12, 0] = -1e5
    without, _ = call(x, backend, input_gate=input_gate)
    x["k"][0, 12, 0, 0] = big
    x["v"][0, 12, 0, 0] = big
    out, _ = call(x, backend, input_gate=input_gate)
    others = torch.arange(20) != 12
    for name in out:  # gradients of token 12 itself are products with what is large
        same(out[name][:, others], without[name][:, others], 1e-2 if big < 1e5 else 1e-5, name)


@functools.cache
def clean_results(backend: str, input_gate: str) -> dict[str, Tensor]:
    return call(problem(2, 20, 2), backend, input_gate=input_gate)[0]


def check_not_finite_stays(backend: str, name: str, value: float, input_gate: str) -> None:
    """NaN and inf at token 12 of one row and head reach no other row and head, and of earlier
    tokens nothing if it is a gate's."""
    clean = clean_results(backend, input_gate)
    x = problem(2, 20, 2)
    x[name][0, 12, 0] = value
    out, _ = call(x, backend, input_gate=input_gate)
    for result in out:
        same(out[result][1], clean[result][1], 1e-5, result)
        same(out[result][0, :, 1], clean[result][0, :, 1], 1e-5, result)
    if backend == "reference" or name in "if":
        for result in ("h", "dq"):
            same(out[result][0, :12, 0], clean[result][0, :12, 0], 1e-5, result)
    if math.isnan(value) and name != "q":
        assert out["h"][0, 12:, 0].isnan().all()


def check_packed(backend: str, name: str, value: float, final: bool) -> None:
    """Sequences that begin where a chunk does see nothing of what is not finite elsewhere."""
    lengths = (64, 64, 9)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    options = {"cu_seqlens": cu, "output_final_state": final}
    clean, clean_end = call(problem(1, sum(lengths), 1), backend, **options)
    x = problem(1, sum(lengths), 1)
    x[name][0, 70] = value
    out, end = call(x, backend, **options)
    others = (torch.arange(sum(lengths)) < 64) | (torch.arange(sum(lengths)) >= 128)
    for result in out:
        same(out[result][:, others], clean[result][:, others], 1e-5, result)
    for result in end:
        same(end[result][[0, 2]], clean_end[result][[0, 2]], 1e-5, result)


def check_small_scale(backend: str, input_gate: str, scale: float) -> None:
    """With values that make up for it, a scale may be beyond the normal numbers of fp32."""
    x = problem(1, 20, 2)
    x["v"] *= 1e30 if scale < 1.0 else 1.0
    out, _ = call(x, backend, scale=scale, input_gate=input_gate)
    wide = {n: t.double() for n, t in x.items()}
    true, _ = call(wide, "reference", scale=scale, input_gate=input_gate)
    for name in out:
        # The scale itself, 1e-40, has 17 bits in fp32.
        same(out[name], true[name], 1e-4, name)


def check_fp16_overflow(backend: str, seed: int) -> None:
    """nu next to 0 at one token: 1 / den is beyond fp16, and so may gradients be (h is not). They
    are inf, and no gate gradient is NaN."""
    g = torch.Generator().manual_seed(seed)
    T, at = 40, seed
    q, k, v = (torch.randn(1, T, 1, 16, generator=g).half() for _ in range(3))
    i = 20.0 + 3.0 * torch.randn(1, T, 1, generator=g)
    f = torch.randn(1, T, 1, generator=g) + 2.0
    before = [t[:, : at + 1].float() for t in (q, k, v, i, f)]
    n = tfla.mlstm(*before, output_final_state=True, backend="reference")[1].n[0, 0]
    row = q[0, at, 0].float()
    q[0, at, 0] = (row - n * (row @ n) / (n @ n)).half()
    x = dict(zip("qkvif", (q, k, v, i, f), strict=True))
    out, _ = call(x, backend)
    true, _ = call({n: t.double() for n, t in x.items()}, "reference")
    for name in out:
        low, full = out[name].double(), true[name].to(out[name].dtype).double()
        assert not low.isnan().any(), name
        if name in ("di", "df"):
            assert torch.isfinite(low).all(), name
        known = torch.isfinite(low) & torch.isfinite(full)
        assert known[:, at + 1 :].all(), name
