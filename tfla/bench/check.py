"""The gate before every speed: h and all gradients against the closed form in fp64.

    h_t = sum_{s<=t} w_ts v_s / den_t    w_ts = exp(log_i_s + sum_{s<r<=t} log_f_r) scale q_t . k_s

with den_t = max(|sum_s w_ts|, 1) for mLSTMexp, else 1; attention has w = exp(scale q . k) and
den = sum_s w. It is quadratic, takes a block of rows at a time, leaves every gradient to autograd
and shares no code with what it judges.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfla.bench.cases import Implementation, Leaves, Shape
from tfla.bench.measure import synchronize
from tfla.gates import INPUT_GATES

# Relative error (Frobenius norm) that a right result stays below. One rounding of each operand is
# 0.3 of a machine epsilon in 16 bits; plain PyTorch in fp32 comes to 1.1e-5 where n . q is near 0.
# The gradient of the forget gate is a sum over all later tokens.
BOUNDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-16}
TF32 = 2**-9
SUMS = {"df": 4.0, "dlog_f": 4.0, "ddt": 4.0}  # times the bound
NOT_THE_FUNCTION = 0.1  # a peer whose h is further away computes something else: no speed
CPU_TOKENS, VECTOR_TOKENS = 512, 256


@dataclass
class Verdict:
    """What ``judge`` has found.

    Attributes:
        errors: relative error in the Frobenius norm by result: "h", "dq", ...
        against: the same against the function whose backward pass takes the normaliser for a
            constant, where that is what an implementation computes.
        exceeded: the results whose error is beyond the bound.
        tokens: T of the problem that was judged.
        first_s: seconds of the first forward and backward, compiling and tuning included.
    """

    errors: dict[str, float]
    against: dict[str, float]
    exceeded: list[str]
    tokens: int
    first_s: float


def bound(name: str, dtype: torch.dtype) -> float:
    """The largest relative error that a result of ours may have: that of BOUNDS for `dtype` (TF32
    for fp32 where torch allows it), times that of SUMS for a gradient that is a sum over tokens."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return (BOUNDS[dtype] if exact else TF32) * SUMS.get(name, 1.0)


def judge(
    x: Implementation, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 7
) -> Verdict:
    """Run x forward and backward and hold its first and last (batch, head) against fp64: on a GPU
    on the very shape that is timed, with the plan that it has; on a CPU, and where only the
    recurrence judges ("vector"), on one sequence of fewer tokens."""
    if device.type == "cpu" or x.function == "vector":
        T = max(min(shape.T, VECTOR_TOKENS if x.function == "vector" else CPU_TOKENS), x.multiple)
        shape = Shape(1, T, shape.H, shape.K, shape.V)
    leaves = x.leaves(shape, dtype, device, seed)
    dh = torch.randn_like(leaves["v"])
    began = time.perf_counter()
    h = x.run(leaves)
    with x.pinned():
        grads = torch.autograd.grad(h, list(leaves.values()), dh.to(h.dtype))
    synchronize(device)
    first_s = time.perf_counter() - began
    results = {"h": h.detach()} | {f"d{n}": t for n, t in zip(leaves, grads, strict=True)}
    results = {name: x.canonical(t) for name, t in results.items()}
    inputs = {name: x.canonical(t.detach()) for name, t in leaves.items()}
    dh = x.canonical(dh)
    B, _, H, _ = dh.shape

    def errors(detach: bool) -> dict[str, float]:
        squares: dict[str, list[float]] = {}
        for batch, head in {(0, 0), (B - 1, H - 1)}:
            rows = {name: _row(t, batch, head) for name, t in inputs.items()}
            truth = closed_form(x.function, rows, _row(dh, batch, head), detach, head, H)
            for name, value in truth.items():
                if results[name].dim() < 3 or results[name].shape[2] != H:
                    continue  # shared by all heads: one of them does not know its gradient
                pair = squares.setdefault(name, [0.0, 0.0])
                pair[0] += (_row(results[name], batch, head) - value).square().sum().item()
                pair[1] += value.square().sum().item()
        return {name: (a / b) ** 0.5 for name, (a, b) in squares.items()}

    found = errors(False)
    exceeded = [name for name, error in found.items() if not error <= bound(name, dtype)]
    return Verdict(found, errors(True) if x.detached else {}, exceeded, shape.T, first_s)


def _row(x: Tensor, batch: int, head: int) -> Tensor:
    """(T, ...) of one sequence and head in fp64."""
    if x.dim() == 1:
        return x[head].double()
    return x[batch, :, min(head, x.shape[2] - 1)].double()


def closed_form(
    function: str, rows: Leaves, dh: Tensor, detach: bool = False, head: int = 0, H: int = 1
) -> dict[str, Tensor]:
    """{"h": (T, V), "d<leaf>": ...} of one sequence and head in fp64. `detach`: the normaliser is
    a constant of the backward pass."""
    x = {name: t.detach().clone().requires_grad_() for name, t in rows.items()}
    blocks = []
    T = dh.shape[0]
    step = T if function == "vector" else max(64, min(T, 2**24 // T))
    for start in range(0, T, step):
        block = slice(start, min(start + step, T))
        h = _block(function, x, block, detach, head, H)
        (h * dh[block]).sum().backward()
        blocks.append(h.detach())
    grads = {f"d{n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in x.items()}
    return {"h": torch.cat(blocks)} | grads


def _block(function: str, x: Leaves, block: slice, detach: bool, head: int, H: int) -> Tensor:
    q, k, v = x["q"], x["k"], x["v"]
    T, K = q.shape
    scale = 1.0 if function == "ssd" else K**-0.5
    if function == "vector":
        return _recurrence(q * scale, k, v, x["log_f"])
    past = slice(0, block.stop)
    t, s = torch.arange(T, device=q.device)[block], torch.arange(T, device=q.device)[past]
    scores = scale * q[block] @ k[past].T
    later = s > t[:, None]
    if function == "attention":
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v[past]
    log_f, log_i = _log_gates(function, x, T, head, H)
    b = log_f.cumsum(0)
    exponents = b[block, None] - b[past] + log_i[past]
    w = exponents.masked_fill(later, -torch.inf).exp() * scores
    h = w @ v[past]
    if function not in INPUT_GATES or not INPUT_GATES[function].normalize:
        return h
    den = w.sum(-1, keepdim=True).abs().clamp_min(1.0)
    return h / (den.detach() if detach else den)


def _log_gates(function: str, x: Leaves, T: int, head: int, H: int) -> tuple[Tensor, Tensor]:
    zero = x["q"].new_zeros(T)
    if function in INPUT_GATES:
        return F.logsigmoid(x["f"]), INPUT_GATES[function].log_i(x["i"])
    if function == "simple":
        return x["log_f"], zero
    if function == "ssd":
        return x["A"] * x["dt"], x["dt"].log()
    # "decay": as in Lightning attention at layer 3 of 32, 8 / H slower from head to head.
    return zero - 8 / H * (1 - 3 / 32) * head, zero


def _recurrence(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
    """C_t = diag(exp(log_f_t)) C_{t-1} + k_t v_t^T, h_t = C_t^T q_t."""
    C, h = q.new_zeros(q.shape[1], v.shape[1]), []
    for q_t, k_t, v_t, decay in zip(q, k, v, log_f.exp(), strict=True):
        C = decay[:, None] * C + k_t[:, None] * v_t
        h.append(q_t @ C)
    return torch.stack(h)


def step_truth(function: str, x: Leaves, state: Any) -> tuple[Tensor, Tensor]:
    """(h, C e^m) after one token in fp64. x: (B, H, .); state: (C, n, m), n and m None without."""
    x = {name: t.double() for name, t in x.items()}
    C, n, m = (state[0].double(), *(None if t is None else t.double() for t in state[1:]))
    log_f = F.logsigmoid(x["f"])
    log_i = INPUT_GATES[function].log_i(x["i"])
    q, gauge = x["q"] * x["q"].shape[-1] ** -0.5, 0.0 if m is None else m
    keep, write = (log_f + gauge).exp()[..., None], log_i.exp()[..., None]
    C = keep[..., None] * C + (write * x["k"])[..., None] * x["v"][..., None, :]
    h = (q[..., None, :] @ C)[..., 0, :]
    if n is None:
        return h, C
    n = keep * n + write * x["k"]
    return h / (n * q).sum(-1, keepdim=True).abs().clamp_min(1.0), C
