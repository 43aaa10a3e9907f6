"""States in and out: joined calls, gauges, gradients through time."""

import pytest
import torch
from checks import (
    assert_close,
    true_size,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import EXTREME, RESETS, Case, Inputs, make_inputs, variants
from torch import Tensor

import tfla


def joined(
    leaves: dict[str, Tensor], cuts: list[int], state: tfla.State | None, **options: object
) -> tuple[Tensor, tfla.State]:
    """One call per segment, the state handed on."""
    T, hs = leaves["q"].shape[1], []
    for start, end in zip([0, *cuts], [*cuts, T], strict=True):
        h, state = tfla.mlstm(
            *(leaves[n][:, start:end] for n in "qkvif"),
            initial_state=state,
            output_final_state=True,
            **options,
        )
        hs.append(h)
    return torch.cat(hs, 1), state


def everything(
    x: Inputs, cuts: list[int], input_gate: str, normalize: bool | None
) -> dict[str, Tensor]:
    """h, final state and all gradients of the joined calls, free of the gauge."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.leaves().items()}
    state = x.memory and tfla.State(*(leaves.get(f"{n}0") for n in "Cnm"))
    h, end = joined(leaves, cuts, state, input_gate=input_gate, normalize=normalize)
    c = 40.0 if end.m is not None and end.m.max() > 40 else 0.0
    sizes = true_size(end, c)
    loss = (h.double() * x.dh.double()).sum()
    for size, G in zip(sizes, (x.G_C, x.G_n), strict=False):
        loss = loss + (size * G).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"h": h, **dict(zip("Cn", sizes, strict=False)), **named}


@variants
@pytest.mark.parametrize("cuts", [[0], [1], [64], [65], [130], [10, 10, 64, 129]])
def test_calls_joined_by_a_state_equal_one_call(
    cuts: list[int], input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=130, input_gate=input_gate, normalize=normalize))
    whole, parts = (everything(x, c, input_gate, normalize) for c in ([], cuts))
    for name, t in whole.items():
        assert_close(parts[name], t, 1e-11, name)


@pytest.mark.parametrize("gates", [g for g in [*EXTREME, *RESETS] if g not in ("f=+30", "i=-95")])
@pytest.mark.parametrize("variant", [("exp", None), ("sigmoid", None)])
def test_joined_calls_under_extreme_gates(gates: str, variant: tuple[str, bool | None]) -> None:
    x = make_inputs(Case(T=100, gates=gates, input_gate=variant[0], state=False))
    whole, parts = (everything(x, c, *variant) for c in ([], [30, 77]))
    for name, t in whole.items():
        if name == "df":  # the difference of terms far larger than itself: see checks.cancellation
            terms = (x.q * whole["dq"]).abs().sum().item()
            assert (parts[name] - t).abs().max() <= 1e-9 * t.abs().max() + 1e-15 * terms
        else:
            assert_close(parts[name], t, 1e-11, name)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 90), max_size=4).map(sorted), st.integers(0, 2**31))
def test_cuts_anywhere_change_nothing(cuts: list[int], seed: int) -> None:
    x = make_inputs(Case(T=90, B=1, K=5, V=6, seed=seed))
    whole, parts = (everything(x, c, "exp", None) for c in ([], cuts))
    for name, t in whole.items():
        assert_close(parts[name], t, 1e-10, name)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("shift", [-300.0, -5.0, 0.7, 60.0, 300.0])
def test_a_shift_of_the_gauge_changes_nothing(shift: float, input_gate: str) -> None:
    """(C, n, m) and (e^-c C, e^-c n, m + c) are one state: h, the end and its gradients agree."""
    x = make_inputs(Case(T=70, input_gate=input_gate, normalize=True))
    C, n, m = x.memory

    def run(c: float) -> list[Tensor]:
        scale = torch.tensor(-c, dtype=torch.float64).exp()
        state = [t.clone().requires_grad_() for t in (C * scale, n * scale, m + c)]
        args = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
        h, end = tfla.mlstm(
            *args,
            input_gate=input_gate,
            normalize=True,
            initial_state=tfla.State(*state),
            output_final_state=True,
        )
        big_C, big_n = true_size(end)
        loss = (h * x.dh).sum() + (big_C * x.G_C).sum() + (big_n * x.G_n).sum()
        dC, dn, dm, *rest = torch.autograd.grad(loss, state + args)
        return [h, big_C, big_n, dC * scale, dn * scale, dm, *rest]

    for a, b in zip(run(0.0), run(shift), strict=True):
        assert_close(b, a, 1e-11)


@variants
def test_no_state_is_the_empty_state(input_gate: str, normalize: bool | None) -> None:
    case = Case(T=70, input_gate=input_gate, normalize=normalize)
    x = make_inputs(case)
    args = (x.q, x.k, x.v, x.i, x.f)
    zeros = tfla.State(*(t if t is None else torch.zeros_like(t) for t in x.memory))
    options = {"input_gate": input_gate, "normalize": normalize, "output_final_state": True}
    h, end = tfla.mlstm(*args, **options)
    h0, end0 = tfla.mlstm(*args, initial_state=zeros, **options)
    assert_close(h, h0, 1e-13)
    for a, b in zip(true_size(end), true_size(end0), strict=True):
        assert_close(a, b, 1e-13)


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_tokens_hand_the_state_through(
    dtype: torch.dtype, input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=0, dtype=dtype, input_gate=input_gate, normalize=normalize))
    parts = [t.clone().requires_grad_() for t in x.memory if t is not None]
    state = tfla.State(*parts, *[None] * (3 - len(parts)))
    options = {"input_gate": input_gate, "normalize": normalize, "output_final_state": True}
    h, end = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, initial_state=state, **options)
    assert h.shape == x.v.shape and h.dtype == dtype
    for a, b in zip(true_size(end), true_size(state), strict=True):
        assert_close(a, b, 1e-13 if dtype == torch.float64 else 1e-6)
    (dC,) = torch.autograd.grad((true_size(end)[0] * x.G_C).sum(), parts[0])
    (wanted,) = torch.autograd.grad((true_size(state)[0] * x.G_C).sum(), parts[0])
    assert_close(dC, wanted, 1e-13 if dtype == torch.float64 else 1e-6)
    _, nothing = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, **options)
    assert all((t == 0).all() for t in true_size(nothing))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gates", ["ordinary", "initial", "i=+95", "i=-95", "resets 1%"])
def test_final_states_are_of_order_one_in_their_gauge(gates: str, dtype: torch.dtype) -> None:
    x = make_inputs(Case(T=200, gates=gates, dtype=dtype, gate_dtype=torch.float32, state=False))
    _, end = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, output_final_state=True)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in end] == [wanted] * 3
    for part in end:
        assert torch.isfinite(part).all()
    assert end.C.abs().max() < 1e4 and end.n.abs().max() < 1e4
    assert end.C.abs().amax((2, 3)).min() > 1e-3  # nor has the state been lost to an outsized m


def test_states_may_come_in_any_strides() -> None:
    x = make_inputs(Case(T=40, H=3))
    C, n, m = x.memory
    views = tfla.State(
        C.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([n, n + 1], -1)[..., 0],
        m.t().contiguous().t(),
    )
    args = (x.q, x.k, x.v, x.i, x.f)
    h, end = tfla.mlstm(*args, initial_state=tfla.State(C, n, m), output_final_state=True)
    h1, end1 = tfla.mlstm(*args, initial_state=views, output_final_state=True)
    for a, b in zip((h, *end), (h1, *end1), strict=True):
        assert_close(b, a, 1e-13)
    one = tfla.State(*(t[:1].expand_as(t) for t in x.memory))
    copied = tfla.State(*(t.contiguous() for t in one))
    assert_close(
        tfla.mlstm(*args, initial_state=one)[0], tfla.mlstm(*args, initial_state=copied)[0], 1e-13
    )


def test_the_state_going_in_is_not_the_state_coming_out() -> None:
    """A caller may update the final state in place without touching what it came from."""
    for T in (0, 5):
        x = make_inputs(Case(T=T, dtype=torch.float32))
        state = tfla.State(*(t.clone() for t in x.memory))
        _, end = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, initial_state=state, output_final_state=True)
        for part in end:
            part.add_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(state, x.memory, strict=True))


def test_detach_cuts_the_graph_and_keeps_the_values() -> None:
    x = make_inputs(Case(T=9))
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
    _, end = tfla.mlstm(*leaves, output_final_state=True)
    cut = end.detach()
    assert isinstance(cut, tfla.State) and end.C.requires_grad
    assert not any(t.requires_grad for t in cut)
    assert all(torch.equal(a, b) for a, b in zip(cut, end, strict=True))
    bare = tfla.State(end.C, None, None).detach()
    assert not bare.C.requires_grad and bare.n is None and bare.m is None


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_truncated_backpropagation_stops_at_detach(input_gate: str) -> None:
    x = make_inputs(Case(T=60, input_gate=input_gate, state=False))
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    first = {n: t[:, :30] for n, t in leaves.items()}
    second = {n: t[:, 30:] for n, t in leaves.items()}
    _, state = tfla.mlstm(*first.values(), input_gate=input_gate, output_final_state=True)
    h, _ = tfla.mlstm(*second.values(), input_gate=input_gate, initial_state=state.detach())
    grads = torch.autograd.grad((h * x.dh[:, 30:]).sum(), list(leaves.values()))
    for g in grads:
        assert (g[:, :30] == 0).all() and (g[:, 30:] != 0).any()
