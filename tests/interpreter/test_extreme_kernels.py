"""Gates of any size, what is not finite, and the smallest of scales, on the backend "triton" in
Triton's interpreter; see tests/test_extreme.py."""

import math

import extreme
import pytest
import torch
from extreme import EXTREMES, GATES, check
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("how", ["whole", "split", "steps"])
@pytest.mark.parametrize("name", GATES)
def test_gates_of_any_size(name: str, how: str) -> None:
    i, f = map(list, GATES[name])
    check(i, f, torch.float32, how, "triton", 3e-5)


@settings(max_examples=8)
@given(
    gates=st.lists(
        st.tuples(st.sampled_from(EXTREMES), st.sampled_from(EXTREMES)),
        min_size=1,
        max_size=40,
    ),
    how=st.sampled_from(["whole", "split", "steps"]),
)
def test_any_gates_beside_any(gates: list[tuple[float, float]], how: str) -> None:
    i, f = map(list, zip(*gates, strict=True))
    check(i, f, torch.float32, how, "triton", 3e-3)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finite_inputs_spoil_no_other_token(dtype: torch.dtype, input_gate: str) -> None:
    extreme.check_finite_stays_away("triton", dtype, input_gate)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize(
    ("name", "value"), [*((n, math.nan) for n in "qkvif"), ("k", math.inf), ("v", -math.inf)]
)
def test_what_is_not_finite_stays_in_its_row(name: str, value: float, input_gate: str) -> None:
    extreme.check_not_finite_stays("triton", name, value, input_gate)


# Without states they run as one row, where NaN in q or f may reach gradients of a neighbour, as
# the docstring of ``mlstm`` says.
@pytest.mark.parametrize(
    ("name", "final"), [*((n, True) for n in "qvf"), *((n, False) for n in "kvi")]
)
def test_what_is_not_finite_stays_in_its_sequence(name: str, final: bool) -> None:
    extreme.check_packed("triton", name, math.nan, final)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("scale", [1e-40, 1e30])
def test_any_scale(scale: float, input_gate: str) -> None:
    extreme.check_small_scale("triton", input_gate, scale)


@pytest.mark.parametrize("seed", range(3, 7))
def test_fp16_gradients_that_overflow_leave_those_of_gates_alone(seed: int) -> None:
    extreme.check_fp16_overflow("triton", seed)
