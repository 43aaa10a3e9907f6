"""``TFLA_LOG=1``: one line on the standard error for each new kind of call: what it is, which
backend serves it by which plan, and why not the other one.

Read once, when tfla is imported. A kind is all that a call is besides its numbers. Lines come from
where a call is carried out, so calls in compiled graphs have theirs too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from tfla.spec import Activations, CallSpec, StepInputs, StepOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ON = os.environ.get("TFLA_LOG", "") not in ("", "0")

# (backend, why) of what was chosen for tensors of a device and a dtype: written by tfla.dispatch.
reasons: dict[tuple[torch.device, torch.dtype], tuple[str, str]] = {}
_seen: set[str] = set()

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def _short(dtype: Any) -> str:
    """The name of a dtype of torch or NumPy."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(name, name)


def sequence(spec: CallSpec) -> None:
    """A call over sequences."""
    tokens = f"{spec.B}, {spec.T}, {spec.H}"
    words = [f"h({tokens}, {spec.V}) of q, k ({tokens}, {spec.K}) {_short(spec.dtype)}"]
    words.append(_gates(spec.activations, *spec.gate_dtypes))
    words.append("normalised" if spec.normalize else "not normalised")
    if spec.packed:
        words.append(f"{spec.N} packed sequences")
    if spec.initial_state:
        words.append("initial state")
    if spec.final_state:
        words.append("final state")
    words.append("gradients" if spec.needs_grad else "no gradients")
    plan = ""
    if spec.backend == "triton":
        kernels = importlib.import_module("tfla.kernels")
        plan = f" ({plan_words(kernels.plan_of(spec))})"
    _line(", ".join(words), spec.device, spec.dtype, spec.backend, plan)


def step(x: StepInputs, options: StepOptions) -> None:
    """A call of one token."""
    words = [f"one token, h{_shape(x.v)} of q, k {_shape(x.q)} {_short(x.q.dtype)}"]
    words.append(_gates(options.activations, x.i.dtype, x.f.dtype))
    words.append("normalised" if x.m is not None else "not normalised")
    rows = "" if x.slots is None else f", {len(x.slots)} rows of {x.C.shape[0]}"
    words.append(f"state {_short(x.C.dtype)}{rows}")
    _line(", ".join(words), x.q.device, x.q.dtype, options.backend, "")


def plan_words(plan: Any) -> str:
    """A ``tfla.plan.Plan`` in one line."""
    words = [f"chunks of {plan.L} tokens", f"checkpoints every {plan.checkpoint_every:,}"]
    if plan.split_len:
        words.append(f"sequences cut every {plan.split_len:,}")
    for names, tile in (("h and dv", plan.h), ("dq and dk", plan.dq)):
        kind = ", Hopper kernel" if tile.hopper else ", mma.sync kernel" if tile.mma else ""
        words.append(
            f"{names} by tiles of {tile.block_a} x {tile.block_x}, {tile.warps} warps{kind}"
        )
    return "; ".join(words)


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def _gates(a: Activations, i: torch.dtype, f: torch.dtype) -> str:
    """The gates: logarithms, or what passes through a sigmoid; an exponential gate i is log_i."""
    named = [("f" if a.sigmoid_f else "log_f", f)]
    named.append(("log_i" if a.input_gate == "exp" else "i", i))
    words = " and ".join(f"{name} {_short(dtype)}" for name, dtype in named)
    return words if a.input_gate in ("exp", "sigmoid") else f"{words} ({a.input_gate} gate)"


def _line(what: str, device: Any, dtype: torch.dtype, backend: str, plan: str) -> None:
    chosen, why = reasons.get((device, dtype), ("", ""))
    if not chosen and getattr(device, "type", None) == "cpu":
        chosen, why = "reference", "CPU tensors"
    why = why if chosen == backend else "named by the caller"
    note(f'{what}, on {device}: backend "{backend}"{plan}: {why}')


def note(what: str) -> None:
    """A line of its own, once."""
    line = f"tfla: {what}"
    if line not in _seen:
        _seen.add(line)
        with contextlib.suppress(OSError, ValueError):  # a closed stderr costs the line, no call
            print(line, file=sys.stderr, flush=True)
