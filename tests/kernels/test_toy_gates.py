"""An input gate that is registered in a file of its own works everywhere a built-in one does: over
sequences, packed ones, by steps, in gradients, in graphs, layers and models, on both backends (on
"triton": interpreter/test_toy_gates_kernels.py)."""

import dataclasses
from collections.abc import Iterator

import checks
import pytest
import torch

pytest.importorskip("triton")

import toy_gates  # noqa: E402

import tfla  # noqa: E402
import tfla.nn  # noqa: E402
from tfla import gates  # noqa: E402
from tfla.xlstm import XLSTM, XLSTMConfig  # noqa: E402

toys = pytest.mark.parametrize("gate", toy_gates.LOG_I)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with toy_gates.registered():
        yield


@toys
def test_a_toy_gate_forward_and_backward(gate: str) -> None:
    toy_gates.check_forward_and_backward(gate, "reference")


@toys
def test_a_toy_gate_over_packed_sequences(gate: str) -> None:
    toy_gates.check_packed_sequences(gate, "reference")


@toys
@pytest.mark.parametrize("inplace", [False, True])
def test_a_toy_gate_by_steps(gate: str, inplace: bool) -> None:
    toy_gates.check_steps(gate, "reference", inplace)


@toys
def test_a_call_that_comes_again_keeps_its_gate(gate: str) -> None:
    toy_gates.check_calls_that_come_again(gate, "reference")


@toys
def test_limits_hold_for_toy_gates(gate: str) -> None:
    toy_gates.check_limits(gate, "reference")


@toys
def test_layers_models_and_choices_know_a_registered_gate(gate: str) -> None:
    from tfla.bench import cases

    layer = tfla.nn.MLSTM(6, 8, num_heads=2, input_gate=gate)
    y, state = layer(torch.randn(2, 5, 6))
    assert y.shape == (2, 5, 8) and (state[0].n is not None) == (gate == "bell")
    config = XLSTMConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=1, input_gate=gate)
    model = XLSTM(config)
    tokens = torch.randint(20, (2, 5))
    assert model(tokens)[0].isfinite().all()
    assert model.generate(tokens, 3).tokens.shape[1] >= 3
    assert f"{gate} (a toy of the tests)" in gates.described()
    # What is listed when a module is imported may have been before this gate.
    assert {x.function for x in cases.IMPLEMENTATIONS} >= {"exp", "sigmoid"}


@toys
def test_a_toy_gate_in_a_compiled_graph(gate: str) -> None:
    p = toy_gates.problem(gate, T=9)
    call = torch.compile(
        lambda *x: tfla.mlstm(*x, input_gate=gate)[0], fullgraph=True, backend="aot_eager"
    )
    checks.assert_close(call(*p.inputs), tfla.mlstm(*p.inputs, input_gate=gate)[0], 1e-12)


def test_a_name_stands_for_one_gate() -> None:
    assert gates.register(toy_gates.BELL) is toy_gates.BELL
    with pytest.raises(ValueError, match="another input gate named 'exp'"):
        gates.register(dataclasses.replace(toy_gates.BELL, name="exp"))
    with pytest.raises(ValueError, match="input_gate must be 'exp' or 'sigmoid' or .*got 'tanh'"):
        gates.input_gate("tanh")


@toys
def test_machine_code_of_a_toy_gate(gate: str) -> None:
    """Ahead-of-time builds tell gates apart by their functions, the cache of builds too."""
    from builds import DEVICES, build, launches

    built = {}
    for name in (gate, "exp", "sigmoid"):
        for launch in launches(DEVICES["cuda", 90], 1, 64, 1, 16, 16, gate=name):
            if launch.kernel.__name__ in ("_weights_kernel", "_sums_kernel", "_gradients_kernel"):
                built[name, launch.kernel.__name__] = build(launch, "cuda", 90).asm["ptx"]
    for (name, kernel), ptx in built.items():
        others = [b for (n, k), b in built.items() if k == kernel and n != name]
        assert ptx not in others
