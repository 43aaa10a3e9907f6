"""Gates of any size, what is not finite, and the smallest of scales, on the backend "reference"
and in the specification; interpreter/test_extreme_kernels.py runs the same on "triton"."""

import math

import extreme
import pytest
import torch
from checks import assert_close
from extreme import EXTREMES, GATES, INF, check, operands
from hypothesis import given, settings
from hypothesis import strategies as st

from tfla import reference


@pytest.mark.parametrize("how", ["whole", "split", "steps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GATES)
def test_gates_of_any_size(name: str, dtype: torch.dtype, how: str) -> None:
    relative = 1e-9 if dtype == torch.float64 else 3e-5
    i, f = map(list, GATES[name])
    check(i, f, dtype, how, "reference", relative)


@pytest.mark.parametrize("name", GATES)
def test_the_specification_is_right_for_gates_of_any_size(name: str) -> None:
    i, f = map(list, GATES[name])
    q, k, v = operands(len(i), torch.float64)
    log_f = [extreme.log_sigmoid(x) for x in f]
    gates = (torch.tensor(x, dtype=torch.float64).view(1, -1, 1) for x in (i, log_f))
    zeros = (torch.zeros(1, 1, *s, dtype=torch.float64) for s in ((5, 3), (5,), ()))
    h = reference.recurrence(q, k, v, *gates, *zeros, 1.0)[0]
    answer = extreme.truth(q[0, :, 0], k[0, :, 0], v[0, :, 0], i, log_f, True)
    assert_close(h[0, :, 0], answer.h, 1e-9)


@settings(max_examples=200)
@given(
    gates=st.lists(
        st.tuples(st.sampled_from(EXTREMES), st.sampled_from(EXTREMES)), min_size=1, max_size=70
    ),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    how=st.sampled_from(["whole", "split", "steps"]),
)
def test_any_gates_beside_any(
    gates: list[tuple[float, float]], dtype: torch.dtype, how: str
) -> None:
    i, f = map(list, zip(*gates, strict=True))
    check(i, f, dtype, how, "reference", 1e-8 if dtype == torch.float64 else 3e-3)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_inputs_spoil_no_other_token(dtype: torch.dtype, input_gate: str) -> None:
    extreme.check_finite_stays_away("reference", dtype, input_gate)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("name", "qkvif")
def test_what_is_not_finite_stays_in_its_row(name: str, value: float, input_gate: str) -> None:
    extreme.check_not_finite_stays("reference", name, value, input_gate)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("name", "qkvif")
def test_what_is_not_finite_stays_in_its_sequence(name: str, value: float, final: bool) -> None:
    extreme.check_packed("reference", name, value, final)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("scale", [1e-40, 1e-35, 0.0, 1e30])
def test_any_scale(scale: float, input_gate: str) -> None:
    extreme.check_small_scale("reference", input_gate, scale)


@pytest.mark.parametrize("seed", range(3, 15))
def test_fp16_gradients_that_overflow_leave_those_of_gates_alone(seed: int) -> None:
    extreme.check_fp16_overflow("reference", seed)
