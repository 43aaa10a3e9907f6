"""Gates of any size, what is not finite, and the smallest of scales, on the backend "reference"
and in the specification; kernels/test_extreme_kernels.py runs the same on "triton"."""

import extreme
import pytest
import torch
from checks import assert_close, one_thread
from extreme import EXTREMES, GATES, check, operands
from hypothesis import given, settings
from hypothesis import strategies as st

from tfla import reference

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


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
