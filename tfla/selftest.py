"""Small calls of every kernel family, forward and backward, held against "reference" in fp64.

``run`` finds what is wrong with a device and a dtype; ``main`` is the process that
``tfla.verdicts`` starts. A kernel that a compiler got wrong is wrong by its own size, not by a few
roundings: bounds here are wide, and the tests of the package are the ones that judge precision.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tfla
from tfla import gates, verdicts
from tfla.spec import BackendName

# Of the norm of a result, and four times as much of its largest number: products of rounded 16-bit
# operands, of TF32's 10 bits, of fp32. In the interpreter fp16 is off by at most 1e-3 (df: 2e-3,
# sums that cancel), fp32 by 3e-6. dm is a sum over dC and dn, made by torch, and not looked at.
BOUNDS = {"bfloat16": 6e-2, "float16": 1e-2, "tf32": 1e-2, "float32": 1e-4}
WIDER = {"df": 3.0}


@dataclass(frozen=True)
class Case:
    """One call of ``tfla.mlstm`` and its gradients."""

    name: str
    gate: gates.InputGate = "exp"
    B: int = 2
    T: int = 200
    H: int = 2
    K: int = 64
    V: int = 128
    offsets: tuple[int, ...] = ()  # of packed sequences
    states: bool = False  # do states come in and go out?
    tf32: bool = False

    def smaller(self) -> Case:
        """For Triton's interpreter, which takes a program at a time."""
        fifth = tuple(offset // 5 for offset in self.offsets)
        T = 40 if self.T <= 200 else 80
        return dataclasses.replace(self, B=1, T=T, H=1, K=self.K // 4, V=self.V // 4, offsets=fifth)


GATES_AND_WIDTHS: tuple[tuple[gates.InputGate, int, int], ...] = (
    ("exp", 64, 128),
    ("sigmoid", 200, 36),
)
PACKED = (0, 70, 70, 75, 200)  # one is empty, one is shorter than a chunk
CASES = (
    Case("exp"),
    Case("sigmoid", "sigmoid"),
    Case("exp, states", states=True),
    Case("sigmoid, states, packed", "sigmoid", B=1, offsets=PACKED, states=True),
    Case("exp, states, packed", B=1, offsets=PACKED, states=True),
    Case("exp, packed", B=1, offsets=PACKED),
    # Rows that no copy engine reads, contractions in pieces.
    Case("exp, K 200 and V 36", K=200, V=36),
    Case("sigmoid, K 36 and V 272", "sigmoid", K=36, V=272),
    # One long sequence is cut to fill the machine.
    Case("exp, long", B=1, T=4200, H=1, K=64, V=64, states=True),
    Case("sigmoid, long", "sigmoid", B=1, T=4200, H=1, K=64, V=64),
    Case("exp, one chunk", T=9),
)
TF32 = tuple(
    Case(f"{gate}, TF32 allowed", gate, K=K, V=V, tf32=True) for gate, K, V in GATES_AND_WIDTHS
)


@dataclass(frozen=True)
class Step:
    """One call of ``tfla.mlstm_step``."""

    name: str
    gate: gates.InputGate = "exp"
    state: torch.dtype = torch.float32
    slots: bool = False  # rows of a larger state, updated in place
    K: int = 64
    V: int = 128


STEPS = (
    Step("step, exp"),
    Step("step, sigmoid", "sigmoid"),
    Step("step, exp, bf16 states in place", state=torch.bfloat16, slots=True),
    Step("step, sigmoid, rows of a state", "sigmoid", slots=True, K=200, V=36),
)


def run(device: torch.device, dtype: str, names: tuple[str, ...] | None = None) -> list[str]:
    """What is wrong with "triton" in this dtype on this device, one line each; none: nothing is.
    names: of the cases to try, None for all. torch.OutOfMemoryError says nothing about kernels and
    is raised."""
    failed: list[str] = []
    for name, check in _checks(device, dtype):
        if names is not None and name not in names:
            continue
        try:
            wrong = list(check())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            return [*failed, f"{dtype}, {name}: {type(error).__name__}: {line}"]
        failed += [f"{dtype}, {name}: {line}" for line in wrong]
    return failed


def _checks(device: torch.device, dtype: str) -> Iterator[tuple[str, Callable[[], Iterator[str]]]]:
    kind: torch.dtype = getattr(torch, dtype)
    tf32 = dtype == "float32" and device.type == "cuda" and not torch.version.hip
    for number, case in enumerate(CASES + (TF32 if tf32 else ())):
        case = case if device.type == "cuda" else case.smaller()
        yield case.name, functools.partial(_sequence, case, device, kind, number)
    for number, step in enumerate(STEPS):
        yield step.name, functools.partial(_step, step, device, kind, number)
    yield "between the layers of a model", functools.partial(_pointwise, device, kind)


def _numbers(seed: int, device: torch.device) -> Callable[..., Tensor]:
    """Random numbers that are the same on every device, and leave the user's generator alone."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    return new


def _sequence(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[str]:
    new, c = _numbers(seed, device), case
    N = len(c.offsets) - 1 if c.offsets else c.B
    q, k = (new(c.B, c.T, c.H, c.K, of=dtype) for _ in "qk")
    v, dh = (new(c.B, c.T, c.H, c.V, of=dtype) for _ in "vh")
    i, f = new(c.B, c.T, c.H), new(c.B, c.T, c.H) + 3
    offsets = torch.tensor(c.offsets, device=device) if c.offsets else None
    normalized = gates.input_gate(c.gate).normalize
    state, dC, dn = [], None, None
    if c.states:
        state, dC = [new(N, c.H, c.K, c.V)], new(N, c.H, c.K, c.V)
        if normalized:
            state += [new(N, c.H, c.K), new(N, c.H)]
            dn = new(N, c.H, c.K)
    names = ["q", "k", "v", "i", "f", "C", "n"]

    def call(backend: BackendName, full: torch.dtype | None) -> dict[str, Tensor]:
        def to(x: Tensor) -> Tensor:
            return x if full is None else x.to(full)

        leaves = [to(x).detach().requires_grad_() for x in (q, k, v, i, f, *state)]
        start = leaves[5:]
        given = None if not start else tfla.State(start[0], *(start[1:] or (None, None)))
        h, end = tfla.mlstm(
            *leaves[:5],
            input_gate=c.gate,
            initial_state=given,
            cu_seqlens=offsets,
            output_final_state=c.states,
            backend=backend,
        )
        found, cotangents = {"h": h}, [to(dh)]
        if end is not None and dC is not None:
            found["final C"] = end.C
            cotangents.append(to(dC))
            if end.n is not None and end.m is not None and dn is not None:
                # C and n are divided by exp(m), and m may be another one.
                weight = end.m.detach().exp()[..., None]
                found |= {"final C": end.C * weight[..., None], "final n": end.n * weight}
                cotangents.append(to(dn))
        grads = torch.autograd.grad(list(found.values()), leaves, cotangents)
        return found | {f"d{n}": x for n, x in zip(names, grads, strict=False)}

    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
        ours = call("triton", None)
    finally:
        matmul.fp32_precision = before
    bound = BOUNDS["tf32" if case.tf32 else str(dtype).removeprefix("torch.")]
    yield from _differences(ours, call("reference", torch.float64), bound)


def _step(case: Step, device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[str]:
    new, c, B, H = _numbers(100 + seed, device), case, 3, 2
    rows = B + 2 if c.slots else B
    q, k, v = (new(B, H, D, of=dtype) for D in (c.K, c.K, c.V))
    i, f = new(B, H), new(B, H) + 3
    slots = torch.tensor([4, 0, 3], device=device) if c.slots else None
    C = new(rows, H, c.K, c.V).to(c.state)
    n, m = None, None
    if gates.input_gate(c.gate).normalize:
        n, m = new(rows, H, c.K).to(c.state), new(rows, H)

    def call(backend: BackendName, full: bool) -> dict[str, Tensor]:
        def to(x: Tensor | None) -> Any:
            return None if x is None else x.double() if full else x.clone()

        h, end = tfla.mlstm_step(
            to(q),
            to(k),
            to(v),
            to(i),
            to(f),
            tfla.State(to(C), to(n), to(m)),
            input_gate=c.gate,
            inplace=c.slots,
            slots=slots,
            backend=backend,
        )
        if end.n is None or end.m is None:
            return {"h": h, "C": end.C}
        weight = end.m.double().exp()[..., None]
        return {"h": h, "C": end.C * weight[..., None], "n": end.n * weight}

    with torch.no_grad():
        kind = "bfloat16" if c.state == torch.bfloat16 else str(dtype).removeprefix("torch.")
        yield from _differences(call("triton", False), call("reference", True), BOUNDS[kind])


def _pointwise(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """The small kernels of tfla.xlstm, against torch."""
    from tfla.kernels import pointwise

    new, D, V = _numbers(200, device), 96, 48
    x, y, o = (new(5, D, of=dtype) for _ in "xyo")
    weight, wide = new(D, of=dtype), new(5, 2 * D, of=dtype)
    bias, matrix = new(4), new(4, D, of=dtype)
    with torch.no_grad():
        total, norm = pointwise.add_norm(x, y, weight, 1e-6)
        ours = {
            "the sum of a residual": total,
            "RMS norm": norm,
            "SwiGLU": pointwise.swiglu(*wide.chunk(2, -1)),
            "norm of heads": pointwise.head_norm(x.view(5, 2, V), o, weight, 1e-6),
            "gates": pointwise.gates(x, matrix, bias, 15.0, None, 1.0),
        }
        X, O, W = x.double(), o.double(), weight.double()
        added, (a, b) = X + y.double(), wide.double().chunk(2, -1)
        heads = torch.nn.functional.layer_norm(X.view(5, 2, V), (V,), eps=1e-6).reshape(5, D)
        product = X @ matrix.double().mT + bias.double()
        truth = {
            "the sum of a residual": added,
            "RMS norm": torch.nn.functional.rms_norm(added, (D,), W, 1e-6),
            "SwiGLU": torch.nn.functional.silu(a) * b,
            "norm of heads": heads * W * O.sigmoid(),
            "gates": 15.0 * (product / 15.0).tanh(),
        }
    yield from _differences(ours, truth, BOUNDS[str(dtype).removeprefix("torch.")])


def _differences(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> Iterator[str]:
    for name, exact in truth.items():
        found, exact = ours[name].double(), exact.double()
        if not found.isfinite().all():
            yield f"{name} is not finite"
            continue
        allowed = bound * WIDER.get(name, 1.0)
        norm, largest = exact.norm().item(), exact.abs().max().item()
        difference = found - exact
        off, most = difference.norm().item(), difference.abs().max().item()
        if off > allowed * norm or most > 4 * allowed * largest:
            yield (
                f"{name} differs by {off / max(norm, 1e-300):.2g} of its norm, and somewhere by "
                f"{most / max(largest, 1e-300):.2g} of its largest number; at most {allowed:g} "
                f"and {4 * allowed:g} are allowed"
            )


def main() -> None:
    """``python -c ... SYS_PATH DEVICE DTYPE``: one line of JSON on the standard output."""
    device, dtype = torch.device(sys.argv[2]), sys.argv[3]
    cannot, failed = "", []
    # Memory that nobody wrote holds NaN here, and shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
    except Exception as error:
        cannot = f"its process cannot use {device}: {error}"
    if not cannot:
        try:
            failed = run(device, dtype)
        except torch.OutOfMemoryError:
            cannot = f"its process found too little free memory on {device}"
    pair = verdicts.pair_of(device)._asdict()
    print("\n" + json.dumps({"failed": failed, "cannot": cannot, "pair": pair}))
    sys.stdout.flush()
    os._exit(0)  # a context that a kernel has broken may not let go
