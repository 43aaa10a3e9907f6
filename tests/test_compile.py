"""torch.compile: one graph, forward and backward, for every public function."""

import pytest
import torch
from checks import (
    assert_close,
    results,
    sequence,
)
from problems import Case, make_inputs, packed
from torch import Tensor

import tfla


def compiled_equals_eager(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    x = make_inputs(case)
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    fn = sequence(case)
    eager = results(fn, leaves, x)
    compiled = results(torch.compile(fn, fullgraph=True, backend=backend), leaves, x)
    relative = 1e-12 if case.dtype == torch.float64 else 1e-5
    for a, b in zip(compiled, eager, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, relative)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=70),
        Case(T=70, state=False, final=False),
        Case(T=70, state=False, final=False, input_gate="sigmoid"),
        Case(T=70, state=False, input_gate="sigmoid"),
        Case(T=70, input_gate="sigmoid", normalize=True, dtype=torch.float32),
        packed(0, 40, 30),
        Case(T=1),
    ],
    ids=str,
)
def test_compiles_into_one_graph(case: Case) -> None:
    compiled_equals_eager(case, "aot_eager")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # inductor's own, not ours
def test_compiles_with_inductor() -> None:
    compiled_equals_eager(Case(T=70, dtype=torch.float32), "inductor")


def test_compiled_code_serves_other_lengths_without_a_break() -> None:
    torch._dynamo.reset()
    fn = torch.compile(
        lambda q, k, v, i, f: tfla.mlstm(q, k, v, i, f)[0].sin(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for T in (5, 64, 70, 129):
        x = make_inputs(Case(T=T, state=False))
        args = (x.q, x.k, x.v, x.i, x.f)
        assert_close(fn(*args), tfla.mlstm(*args)[0].sin(), 1e-12)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_the_step_compiles_into_one_graph(input_gate: str, inplace: bool) -> None:
    torch._dynamo.reset()
    x = make_inputs(Case(T=1, B=3, input_gate=input_gate))
    args = [t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f)]
    states = [tfla.State(*(None if s is None else s.clone() for s in x.memory)) for _ in range(2)]

    def fn(*args: object) -> tuple[Tensor, tfla.State]:
        h, state = tfla.mlstm_step(*args, input_gate=input_gate, inplace=inplace)
        return h * 2, state

    h, end = fn(*args, states[0])
    h1, end1 = torch.compile(fn, fullgraph=True, backend="aot_eager")(*args, states[1])
    assert_close(h1, h, 1e-13)
    for a, b, c, d in zip(end, end1, *states, strict=True):
        if a is not None:
            assert_close(b, a, 1e-13)
            assert_close(d, c, 1e-13)  # the states passed in: updated in place, or both left alone


def test_linear_attention_compiles_with_gates_per_head() -> None:
    torch._dynamo.reset()
    x = make_inputs(Case(T=70))
    log_f = torch.tensor([-0.1, -0.5], dtype=torch.float64, requires_grad=True)

    def fn(log_f: Tensor) -> Tensor:
        return tfla.linear_attention(x.q, x.k, x.v, log_f)[0]

    h, h1 = fn(log_f), torch.compile(fn, fullgraph=True, backend="aot_eager")(log_f)
    assert_close(h1, h, 1e-13)
    grads = [torch.autograd.grad((y * x.dh).sum(), log_f)[0] for y in (h, h1)]
    assert_close(grads[1], grads[0], 1e-12)


def test_meta_tensors_give_shapes_without_arithmetic() -> None:
    x = make_inputs(Case(T=70, dtype=torch.bfloat16))
    q, k, v, i, f = (t.to("meta") for t in (x.q, x.k, x.v, x.i, x.f))
    torch._dynamo.reset()
    fake = torch.compile(
        lambda *a: tfla.mlstm(*a, output_final_state=True), fullgraph=True, backend="aot_eager"
    )(q, k, v, i, f)
    real = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, output_final_state=True)
    for a, b in zip((fake[0], *fake[1]), (real[0], *real[1]), strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype
