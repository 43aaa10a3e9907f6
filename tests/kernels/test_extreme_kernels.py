"""Gates of any size, what is not finite, and the smallest of scales, on the backend "triton" in
Triton's interpreter; see tests/test_extreme.py."""

import os
from collections.abc import Callable

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_extremes_in_the_interpreter(interpret: Callable[[str], None]) -> None:
        interpret(__file__)

else:
    import checks
    import torch
    from extreme import GATES, check

    pytestmark = [
        pytest.mark.usefixtures("one_thread"),
        # What is not selected overflows on its way, as it may.
        pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
        pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
        pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
        pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION.*"),
    ]
    one_thread = checks.one_thread

    @pytest.mark.parametrize("how", ["whole", "split", "steps"])
    @pytest.mark.parametrize("name", GATES)
    def test_gates_of_any_size(name: str, how: str) -> None:
        i, f = map(list, GATES[name])
        check(i, f, torch.float32, how, "triton", 3e-5)
