"""An input gate that is registered in a file of its own works everywhere a built-in one does: over
sequences, packed ones, by steps, in gradients, in graphs, layers and models, on both backends.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a run without it starts a second
pytest on this file.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import checks
import pytest
import recurrence as oracle
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import toy_gates  # noqa: E402

import tfla  # noqa: E402
import tfla.nn  # noqa: E402
from tfla import gates  # noqa: E402
from tfla.xlstm import XLSTM, XLSTMConfig  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "reference"
DTYPE = torch.float32 if INTERPRETED else torch.float64
BOUND = 2e-5 if INTERPRETED else 1e-10
LOG_I: dict[str, Callable[[Tensor], Tensor]] = {  # what the toys are, written down once more
    "bell": lambda i: -(i**2) / 2,
    "steep": lambda i: F.logsigmoid(2 * i),
}
toys = pytest.mark.parametrize("gate", LOG_I)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION.*"),
]
one_thread = checks.one_thread


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with toy_gates.registered():
        yield


if not INTERPRETED:

    def test_toys_in_the_interpreter(interpret: Callable[[str], None]) -> None:
        interpret(__file__)


@dataclasses.dataclass
class Problem:
    """q, k, v, i, f and the cotangents of h, C and n, in fp64."""

    inputs: list[Tensor]
    memory: list[Tensor | None]
    dh: Tensor
    dC: Tensor
    dn: Tensor | None


def problem(gate: str, lengths: tuple[int, ...] = (), B: int = 2, T: int = 40) -> Problem:
    g = torch.Generator().manual_seed(T)
    B, T, N = (1, sum(lengths), len(lengths)) if lengths else (B, T, B)
    H, K, V = 2, 12, 20

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs = [new(B, T, H, D) for D in (K, K, V)] + [2 * new(B, T, H), 2 + new(B, T, H)]
    memory: list[Tensor | None] = [new(N, H, K, V), new(N, H, K), new(N, H)]
    dn: Tensor | None = new(N, H, K)
    if not gates.INPUT_GATES[gate].normalize:
        memory[1:], dn = [None, None], None
    return Problem(inputs, memory, new(B, T, H, V), new(N, H, K, V), dn)


def true_size(state: tfla.State | oracle.Memory) -> list[Tensor]:
    """C e^m and n e^m, which do not depend on the gauge."""
    if state.n is None or state.m is None:
        return [state.C]
    weight = state.m.exp()
    return [state.C * weight[..., None, None], state.n * weight[..., None]]


def everything(
    p: Problem, dtype: torch.dtype, run: Callable[..., tuple[Tensor, tfla.State | oracle.Memory]]
) -> list[Tensor]:
    """h, the final state and all gradients of ``run``, computed in ``dtype``."""
    leaves = [x.to(dtype).requires_grad_() for x in p.inputs]
    memory = [None if x is None else x.to(dtype).requires_grad_() for x in p.memory]
    h, end = run(*leaves, memory)
    outputs = [h, *true_size(end)]
    cotangents = [x.to(dtype) for x in (p.dh, p.dC, p.dn) if x is not None]
    of = [*leaves, *[x for x in memory[:2] if x is not None]]
    grads = torch.autograd.grad(outputs, of, cotangents)
    return [x.detach().double() for x in (*outputs, *grads)]


def truth(gate: str, lengths: tuple[int, ...] | None = None) -> Callable[..., object]:
    def run(q, k, v, i, f, memory):  # type: ignore[no-untyped-def]
        return oracle.linear_attention(
            q,
            k,
            v,
            F.logsigmoid(f),
            LOG_I[gate](i),
            memory=oracle.Memory(*memory),
            normalize=gates.INPUT_GATES[gate].normalize,
            lengths=lengths,
        )

    return run


def assert_same(found: list[Tensor], right: list[Tensor], bound: float = BOUND) -> None:
    assert len(found) == len(right)
    for n, (x, y) in enumerate(zip(found, right, strict=True)):
        assert torch.isfinite(x).all(), n
        assert (x - y).norm() <= bound * y.norm(), (n, float((x - y).norm() / y.norm()))


@toys
def test_a_toy_gate_forward_and_backward(gate: str) -> None:
    p = problem(gate)

    def run(q, k, v, i, f, memory):  # type: ignore[no-untyped-def]
        return tfla.mlstm(
            q,
            k,
            v,
            i,
            f,
            input_gate=gate,
            initial_state=tfla.State(*memory),
            output_final_state=True,
            backend=BACKEND,
        )

    assert_same(everything(p, DTYPE, run), everything(p, torch.float64, truth(gate)))


@toys
def test_a_toy_gate_over_packed_sequences(gate: str) -> None:
    lengths = (17, 0, 5, 20)
    p = problem(gate, lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)

    def run(q, k, v, i, f, memory):  # type: ignore[no-untyped-def]
        return tfla.mlstm(
            q,
            k,
            v,
            i,
            f,
            input_gate=gate,
            initial_state=tfla.State(*memory),
            output_final_state=True,
            cu_seqlens=offsets,
            backend=BACKEND,
        )

    assert_same(everything(p, DTYPE, run), everything(p, torch.float64, truth(gate, lengths)))
    # Without states sequences may be computed as one.
    leaves = [x.to(DTYPE).requires_grad_() for x in p.inputs]
    h, _ = tfla.mlstm(*leaves, input_gate=gate, cu_seqlens=offsets, backend=BACKEND)
    grads = torch.autograd.grad(h, leaves, p.dh.to(DTYPE))
    plain = [x.clone().requires_grad_() for x in p.inputs]
    right, _ = oracle.linear_attention(
        *plain[:3],
        F.logsigmoid(plain[4]),
        LOG_I[gate](plain[3]),
        lengths=lengths,
        normalize=gates.INPUT_GATES[gate].normalize,
    )
    found = [x.detach().double() for x in (h, *grads)]
    assert_same(found, [right.detach(), *torch.autograd.grad(right, plain, p.dh)])


@toys
@pytest.mark.parametrize("inplace", [False, True])
def test_a_toy_gate_by_steps(gate: str, inplace: bool) -> None:
    p = problem(gate, T=6)
    x = [t.to(DTYPE) for t in p.inputs]
    state = tfla.State(*(None if s is None else s.to(DTYPE).clone() for s in p.memory))  # type: ignore[arg-type]
    rows = []
    for t in range(6):
        token = [y[:, t] for y in x]
        h, state = tfla.mlstm_step(*token, state, input_gate=gate, inplace=inplace, backend=BACKEND)
        rows.append(h)
    h, end = truth(gate)(*p.inputs, p.memory)  # type: ignore[misc]
    found = [torch.stack(rows, 1), *true_size(state)]
    assert_same([y.double() for y in found], [h, *true_size(end)])


@toys
def test_a_call_that_comes_again_keeps_its_gate(gate: str) -> None:
    """Calls that are alike but for the gate share nothing that is kept from call to call."""
    p = problem(gate)
    x = [t.to(DTYPE) for t in p.inputs]
    normalize = gates.INPUT_GATES[gate].normalize
    for _ in range(3 if BACKEND == "reference" else 2):
        seen = [
            tfla.mlstm(*x, input_gate=name, normalize=normalize, backend=BACKEND)[0]
            for name in (gate, "exp", "sigmoid")
        ]
        for h, log_i in zip(seen, (LOG_I[gate], lambda i: i, F.logsigmoid), strict=True):
            right, _ = oracle.linear_attention(
                *p.inputs[:3], F.logsigmoid(p.inputs[4]), log_i(p.inputs[3]), normalize=normalize
            )
            assert_same([h.double()], [right])


@toys
def test_limits_hold_for_toy_gates(gate: str) -> None:
    """A closed input gate writes nothing, whatever the gate."""
    p = problem(gate, T=9)
    x = [t.to(DTYPE) for t in p.inputs]
    x[3][:, 4] = -float("inf")
    v = x[2].clone()
    v[:, 4] = 7.0
    a, _ = tfla.mlstm(*x, input_gate=gate, backend=BACKEND)
    b, _ = tfla.mlstm(*x[:2], v, *x[3:], input_gate=gate, backend=BACKEND)
    assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.skipif(INTERPRETED, reason="of the backend reference")
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


@pytest.mark.skipif(INTERPRETED, reason="of the backend reference")
@toys
def test_a_toy_gate_in_a_compiled_graph(gate: str) -> None:
    p = problem(gate, T=9)
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


@pytest.mark.skipif(INTERPRETED, reason="builds machine code")
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
