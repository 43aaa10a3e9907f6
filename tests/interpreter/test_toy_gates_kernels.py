"""Input gates of a file of their own on the backend "triton"; see kernels/test_toy_gates.py."""

from collections.abc import Iterator

import pytest
import toy_gates

toys = pytest.mark.parametrize("gate", toy_gates.LOG_I)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with toy_gates.registered():
        yield


@toys
def test_a_toy_gate_forward_and_backward(gate: str) -> None:
    toy_gates.check_forward_and_backward(gate, "triton")


@toys
def test_a_toy_gate_over_packed_sequences(gate: str) -> None:
    toy_gates.check_packed_sequences(gate, "triton")


@toys
@pytest.mark.parametrize("inplace", [False, True])
def test_a_toy_gate_by_steps(gate: str, inplace: bool) -> None:
    toy_gates.check_steps(gate, "triton", inplace)


@toys
def test_a_call_that_comes_again_keeps_its_gate(gate: str) -> None:
    toy_gates.check_calls_that_come_again(gate, "triton")


@toys
def test_limits_hold_for_toy_gates(gate: str) -> None:
    toy_gates.check_limits(gate, "triton")
