"""How much of v an mLSTM passes on at constant gates: the task "transfer" of `runs`.

    gain = mean_t max_d |h_td| / mean_t max_d |v_td|        q, k, v ~ N(0, 1), independent

before the norm behind the cell and after it, (h - mean_d h) / sqrt(var_d h + eps) without weights,
for each pair of pre-activations i and f, which are the same at every token. Beck et al., arXiv
2503.14376, measure it so. What can be derived of it, with log_i and log_f the logarithms of the
activated gates, s = K^(-1/2) the scale of q, and w_j = exp(2 j log_f):

* Given q and k, h_t is a sum of v with fixed coefficients, so its V channels are independent
  N(0, r_t^2), with or without the normaliser. The gain is therefore mean_t E[r_t], for any T, K
  and V, where the means are over infinitely many draws. This is exact.
* Without the normaliser r_t^2 = exp(2 log_i) sum_{j<t} w_j (s q_t . k_{t-j})^2, whose mean is the
  geometric sum exp(2 log_i) (1 + w_1 + ... + w_{t-1}); the variance of each h_td. Exact.
* r_t is exp(log_i) |s q_t| times the root of a sum of chi-squared numbers with weights w_j; its
  mean is a product and one integral, `expected_gain`. Exact. It lies between sqrt(2 / pi) E|s q|
  and 1 times the root of the geometric sum, and tends to the upper end as K and the number of
  tokens that a forget gate keeps grow.
* After the norm the gain tends to mean_t r_t / sqrt(r_t^2 + eps) as V grows, r_t^2 to its mean as K
  and the tokens kept do, `expected_gain_after`: 1 / sqrt(2) where r_t is sqrt(eps) at all tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tfla
from tfla.bench import check, measure
from tfla.bench.cases import DTYPES
from tfla.bench.runs import Row, Task, Tell, reason_of


class Variant(NamedTuple):
    """input_gate, normalize: as `tfla.mlstm` takes them."""

    input_gate: str
    normalize: bool


VARIANTS = {
    "tfla exp, normalised": Variant("exp", True),
    "tfla exp, not normalised": Variant("exp", False),
    "tfla sigmoid, normalised": Variant("sigmoid", True),
    "tfla sigmoid, not normalised": Variant("sigmoid", False),
}
BORDER = 0.5**0.5  # of the gain after the norm: what passes and what is suppressed
COARSE = 2.0  # between two gates the gain grows by exp(2) or less
SHOWN_FORGET_GATE = 5.0  # a model's forget gates start between 3 and 6


def expected_square(log_i: float, log_f: float, T: int) -> Tensor:
    """(T,) fp64: E[h_td^2] without the normaliser, for any K and V, at tokens 1 to T."""
    return math.exp(2 * log_i) * _weights(log_f, T).cumsum(0)


def expected_gain(log_i: float, log_f: float, T: int, K: int) -> float:
    """The gain without the normaliser, before the norm: exact, by quadrature to 10 digits.

    With X_t = sum_{j<t} w_j chi_j^2 and E[exp(-u X_t)] = prod_{j<t} (1 + 2 u w_j)^(-1/2),

        gain = exp(log_i) E|s q| mean_t E[sqrt(X_t)]
        E[sqrt(X)] = 1 / (2 sqrt(pi)) integral over u > 0 of (1 - E[exp(-u X)]) u^(-3/2)
    """
    step, far = 0.1, 60.0  # in y = log u; what lies outside of 60 from both bends is below 1e-12
    y = torch.arange(-math.log(T) - far, far, step, dtype=torch.float64)
    exponents = torch.log1p(2 * y.exp()[:, None] * _weights(log_f, T)).cumsum(-1)
    integrand = -torch.expm1(-exponents / 2) * (-y / 2).exp()[:, None]
    root = integrand.sum(0) * step / (2 * math.sqrt(math.pi))
    return math.exp(log_i) * mean_norm(K) * root.mean().item()


def expected_gain_after(log_i: float, log_f: float, T: int, eps: float) -> float:
    """The gain without the normaliser, after the norm: its limit for large K and V, and for forget
    gates that keep many tokens."""
    square = expected_square(log_i, log_f, T)
    return (square / (square + eps)).sqrt().mean().item()


def mean_norm(K: int) -> float:
    """E|s q| with s = K^(-1/2): sqrt(2 / pi) for K = 1, tends to 1 as 1 - 1 / (4 K)."""
    return math.exp(math.lgamma((K + 1) / 2) - math.lgamma(K / 2)) * math.sqrt(2 / K)


def _weights(log_f: float, T: int) -> Tensor:
    """(T,) w_j; w_0 is 1 for log_f = -inf too."""
    j = torch.arange(T, dtype=torch.float64)
    return torch.where(j == 0, 1.0, (2 * log_f * j.clamp_min(1)).exp())


def log_gates(variant: Variant, i: float, f: float) -> tuple[float, float]:
    """Logarithms of the activated gates."""
    log_f, log_sigmoid_i = F.logsigmoid(torch.tensor([f, i], dtype=torch.float64)).tolist()
    return (i if variant.input_gate == "exp" else log_sigmoid_i), log_f


def largest(h: Tensor) -> Tensor:
    """(B, T, H, V) -> (H,) mean over sequences and tokens of the largest channel."""
    return h.abs().amax(-1).double().mean((0, 1))


def gains(h: Tensor, v: Tensor, epsilons: Sequence[float]) -> list[Tensor]:
    """The gain before the norm, then after one with each eps: (H,) each, of h and v (B, T, H, V).
    The norm is that of `tfla.xlstm`, in fp64: h may be as small or as large as a gate makes it."""
    below, h = largest(v), h.double()
    normed = (F.layer_norm(h, (h.shape[-1],), eps=eps) for eps in epsilons)
    return [largest(x) / below for x in (h, *normed)]


def border(gates: Sequence[float], gain: Sequence[float], level: float = BORDER) -> float | None:
    """The pre-activation at which `gain` first rises through `level`, between two gates by a
    straight line; None where it never does, or where the two are too far apart for a line."""
    for left, right, low, high in zip(gates, gates[1:], gain, gain[1:], strict=False):
        if low < level <= high:
            if right - left > COARSE:
                return None
            return left + (right - left) * (level - low) / (high - low)
    return None


@torch.no_grad()
def transfer(task: Task, device: torch.device, tell: Tell) -> None:
    """A row a variant: the gain at each pair of gates, the mean of `repeats` draws of q, k and v.
    All gates and variants see the same draws."""
    assert task.shape is not None
    shape, dtype = task.shape, DTYPES[task.dtype]
    for name in task.names:
        variant = VARIANTS[name]
        row = task.row(name, ours=True)
        try:
            tell("begin", name, "checking")
            inputs = _draw(task, 0, dtype, device)
            row["errors"] = {"h": _error(task, variant, inputs)}
            if not row["errors"]["h"] <= check.bound("h", dtype):
                reason = f"off by h {row['errors']['h']:.1e} from fp64"
                tell("row", {**row, "status": "WRONG", "reason": reason})
                continue
            draws, row["samples_ms"] = [], []
            for turn in range(task.repeats):
                if turn and time.time() > task.until:
                    break
                tell("begin", name, f"draw {turn + 1}")
                inputs = _draw(task, turn, dtype, device)
                measure.synchronize(device)
                began = time.perf_counter()
                draws.append(_grid(task, variant, inputs))
                measure.synchronize(device)
                row["samples_ms"].append((time.perf_counter() - began) * 1e3)
            row |= _summary(torch.stack(draws))
            if not variant.normalize:
                row |= _expected(task, variant, row["before"], shape.T, shape.K)
        except Exception as error:
            row |= {"status": "failed", "reason": reason_of(error)}
        tell("row", row)


def _draw(task: Task, turn: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v (1, T, 1, .)."""
    assert task.shape is not None
    _, T, _, K, V = (getattr(task.shape, name) for name in "BTHKV")
    g = torch.Generator(device).manual_seed(100 + turn)
    return tuple(
        torch.randn(1, T, 1, width, generator=g, device=device).to(dtype) for width in (K, K, V)
    )


def _cell(variant: Variant, inputs: Sequence[Tensor], i: Sequence[float], f: float) -> Tensor:
    """h (1, T, H, V): each input gate is a head, the forget gate is that of all."""
    q, k, v = (x.expand(-1, -1, len(i), -1) for x in inputs)
    gates = torch.tensor(i, dtype=torch.float32, device=q.device).expand(q.shape[:3])
    gate, normalize = variant
    return tfla.mlstm(
        q,
        k,
        v,
        gates,
        torch.full_like(gates, f),
        input_gate=gate,  # type: ignore[arg-type]
        normalize=normalize,
    )[0]


def _grid(task: Task, variant: Variant, inputs: Sequence[Tensor]) -> Tensor:
    """(1 + epsilons, forget gates, input gates) gains of one draw."""
    lines = [
        torch.stack(gains(_cell(variant, inputs, task.input_gates, f), inputs[2], task.epsilons))
        for f in task.forget_gates
    ]
    return torch.stack(lines, 1).cpu()


def _error(task: Task, variant: Variant, inputs: Sequence[Tensor]) -> float:
    """Of h against the closed form in fp64, at the corners and in the middle of the grid: the mean
    over tokens, as the gain is one, of the relative error; the worst of these pairs.

    A constant input gate is a factor of v without a normaliser; with one it is a gate of mLSTMexp.
    """
    ends = [[x[0], x[len(x) // 2], x[-1]] for x in (task.input_gates, task.forget_gates)]
    q, k, v = (x[0, :, 0].double().cpu() for x in inputs)
    errors = []
    for f in ends[1]:
        h = _cell(variant, inputs, ends[0], f)[0].double().cpu()
        for number, i in enumerate(ends[0]):
            log_i, _ = log_gates(variant, i, f)
            rows = {"q": q, "k": k, "v": v, "f": torch.full_like(q[:, 0], f)}
            if variant.normalize:
                rows["i"] = torch.full_like(q[:, 0], log_i)
            else:
                rows |= {"v": v * math.exp(log_i), "i": torch.full_like(q[:, 0], 1e4)}
            function = "exp" if variant.normalize else "sigmoid"
            with torch.enable_grad():
                truth = check.closed_form(function, rows, torch.zeros_like(v))["h"]
            relative = (h[:, number] - truth).norm(dim=-1) / truth.norm(dim=-1)
            errors.append(relative.mean())
    return torch.stack(errors).max().item()  # NaN if one is


def _summary(draws: Tensor) -> Row:
    """Of (draws, 1 + epsilons, forget gates, input gates), as lists of five digits."""
    mean = draws.mean(0)
    found: Row = {"draws": len(draws), "before": _digits(mean[0])}
    found["after"] = [_digits(x) for x in mean[1:]]
    if len(draws) > 1:
        error = draws.std(0) / len(draws) ** 0.5 / mean
        found["standard_error"] = error.max().item()
    return found


def _expected(task: Task, variant: Variant, before: list[list[float]], T: int, K: int) -> Row:
    lines = []
    for f in task.forget_gates:
        _, log_f = log_gates(variant, 0.0, f)
        unit = expected_gain(0.0, log_f, T, K)
        lines.append([math.exp(log_gates(variant, i, f)[0]) * unit for i in task.input_gates])
    exact = torch.tensor(lines, dtype=torch.float64)
    off = (torch.tensor(before, dtype=torch.float64) / exact - 1).abs().max().item()
    return {"expected": _digits(exact), "expected_off": off}


def _digits(x: Tensor) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in line] for line in x.tolist()]
