"""tfla.jax against the recurrence in fp64, by the rule that tfla itself is held to.

The truth is the recurrence of the suite, in torch. JAX may be in another environment, for its
Python may be another one: TFLA_JAX_PYTHON names that interpreter. Without it this one must have
both.
"""

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recurrence as oracle
import torch
from checks import (
    CANCELLING,
    assert_close,
    failures,
    one_thread,  # noqa: F401
    run_one_digit_off,
    run_recurrence,
)
from problems import EXTREME, RESETS, VARIANTS, Case, Inputs, make_inputs, offsets, packed
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@functools.cache
def python_with_jax() -> str:
    """The interpreter that has JAX, or a skip that says why there is none."""
    python = os.environ.get("TFLA_JAX_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", "import tfla.jax"], capture_output=True, text=True, env=environment()
    )
    if done.returncode:
        pytest.skip(f"{done.stderr.strip().splitlines()[-1]} TFLA_JAX_PYTHON may name a Python.")
    return python


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def answers(calls: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """What tfla.jax says to all of them, in one process."""
    done = subprocess.run(
        [python_with_jax(), "-W", "error", str(HERE / "worker.py")],
        input=pickle.dumps(calls),
        capture_output=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return [
        {name: torch.from_numpy(x).clone() for name, x in answer.items()}
        for answer in pickle.loads(done.stdout)
    ]


# ---------------------------------------------------------------- a case, on both sides


def call_of(case: Case, inputs: Inputs, c: Tensor | None, **options: object) -> dict[str, Any]:
    leaves = inputs.leaves()
    fixed = {"dh": inputs.dh.double(), "G_C": inputs.G_C, "G_n": inputs.G_n, "c": c}
    if case.lengths is not None:
        fixed["cu_seqlens"] = offsets(case.lengths)
    return {
        "function": "sequence",
        "leaves": {name: x.double().numpy() for name, x in leaves.items()},
        "dtypes": {name: str(x.dtype).removeprefix("torch.") for name, x in leaves.items()},
        "fixed": {name: x.numpy() for name, x in fixed.items() if x is not None},
        "options": {
            "input_gate": case.input_gate,
            "normalize": case.normalize,
            "scale": case.scale,
            "output_final_state": case.final,
            **options,
        },
    }


VARIED = [dict(input_gate=gate, normalize=normalize) for gate, normalize in VARIANTS]
LOW = (torch.float32, torch.bfloat16, torch.float16)
# Cases of one shape and variant share a compilation, which takes seconds: so there are many of few.
CASES = [
    *(Case(T=130, **variant) for variant in VARIED),
    *(
        Case(T=130, gates=gates, **variant)
        for variant in VARIED
        for gates in (*EXTREME, *RESETS, "initial", "infinite")
    ),
    *(Case(T=T) for T in (0, 1, 64)),
    Case(B=0, T=20),
    Case(T=70, K=1, V=33, B=1, state=False, final=False),
    Case(T=70, scale=-0.7, state=False, input_gate="sigmoid"),
    Case(T=130, state=False, gates="infinite"),
    packed(0, 70, 0, 3, 0),
    packed(0, 70, 0, 3, 0, gates="resets 50%"),
    packed(64, 1, 130, state=False, final=False, input_gate="sigmoid"),
    packed(0, 0),
    *(Case(T=130, dtype=dtype, gate_dtype=torch.float32, **VARIED[0]) for dtype in LOW),
    *(
        Case(T=130, dtype=torch.float32, gates=gates, **variant)
        for variant in (VARIED[0], VARIED[2])
        for gates in ("ordinary", *EXTREME, *RESETS, "initial")
    ),
    packed(0, 70, 0, 3, dtype=torch.float32),
]


@functools.cache
def solved() -> dict[Case, tuple[Inputs, Any, Tensor | None, dict[str, Tensor]]]:
    """Of each case its inputs, the truth, its gauge and what tfla.jax says."""
    python_with_jax()
    truths = []
    for case in CASES:
        inputs = make_inputs(case)
        truths.append((inputs, *run_recurrence(case, inputs, torch.float64)))
    calls = [call_of(case, inputs, c) for case, (inputs, _, c) in zip(CASES, truths, strict=True)]
    pairs = zip(truths, answers(calls), strict=True)
    return {case: (*truth, ours) for case, (truth, ours) in zip(CASES, pairs, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_states_and_gradients(case: Case) -> None:
    """1e-9 in fp64; below it twice the error of the plain recurrence in the same dtype."""
    inputs, truth, c, ours = solved()[case]
    assert all(torch.isfinite(t).all() for t in ours.values()), f"{case}: not finite"
    exact = case.dtype == torch.float64
    plain = None if exact else run_recurrence(case, inputs, case.dtype, c)[0]
    needed = exact or case.gates in CANCELLING
    floor_eps = torch.finfo(case.state_dtype).eps if needed else 0.0
    broken = failures(ours, truth, plain, case, inputs, floor_eps)
    if broken and exact:  # a truth that one digit of the inputs moves by more
        near = run_one_digit_off(case, inputs, c)
        beyond = failures(ours, truth, near, case, inputs, floor_eps)
        beyond = {line.split(":")[0] for line in beyond}
        broken = [line for line in broken if line.split(":")[0] in beyond]
    assert not broken, f"{case}\n" + "\n".join(broken)
