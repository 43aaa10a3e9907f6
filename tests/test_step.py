"""tfla.mlstm_step: one token, in place or not, with the state in rows of a larger one."""

import pytest
import recurrence as oracle
import torch
from checks import (
    assert_close,
    distance,
    true_size,
)
from problems import EXTREME, NORMALIZED, RESETS, Case, Inputs, make_inputs, variants
from torch import Tensor

import tfla


def token(x: Inputs, t: int) -> list[Tensor]:
    return [part[:, t] for part in (x.q, x.k, x.v, x.i, x.f)]


def copy(state: oracle.Memory | tfla.State) -> tfla.State:
    return tfla.State(*(s if s is None else s.clone() for s in state))


def steps(
    x: Inputs, state: tfla.State, input_gate: str, normalize: bool | None, **options: object
) -> tuple[Tensor, tfla.State]:
    hs = []
    for t in range(x.q.shape[1]):
        h, state = tfla.mlstm_step(
            *token(x, t), state, input_gate=input_gate, normalize=normalize, **options
        )
        hs.append(h)
    return torch.stack(hs, 1), state


@variants
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gates", ["ordinary", "initial", "swings"])
def test_steps_equal_the_sequence(
    gates: str, inplace: bool, input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=70, gates=gates, input_gate=input_gate, normalize=normalize))
    state = copy(x.memory)
    kind = {"input_gate": input_gate, "normalize": normalize}
    h, end = steps(x, state, **kind, inplace=inplace)
    whole, whole_end = tfla.mlstm(
        x.q,
        x.k,
        x.v,
        x.i,
        x.f,
        **kind,
        initial_state=tfla.State(*x.memory),
        output_final_state=True,
    )
    assert_close(h, whole, 1e-11)
    for a, b in zip(true_size(end, 30.0), true_size(whole_end, 30.0), strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize(("input_gate", "normalize"), [*NORMALIZED, ("sigmoid", None)])
@pytest.mark.parametrize("gates", [*EXTREME, *RESETS, "infinite"])
def test_steps_equal_the_recurrence_under_extreme_gates(
    gates: str, input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=40, gates=gates, input_gate=input_gate, normalize=normalize))
    h, end = steps(x, copy(x.memory), input_gate, normalize)
    truth, true_end = oracle.mlstm(
        x.q, x.k, x.v, x.i, x.f, input_gate=input_gate, normalize=normalize, memory=x.memory
    )
    assert_close(h, truth, 1e-12)
    assert_close(end.C, true_end.C, 1e-12)  # the same gauge, too: both are the plain formula


@variants
@pytest.mark.parametrize("scale", [None, -0.4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_scale(
    dtype: torch.dtype, scale: float | None, input_gate: str, normalize: bool | None
) -> None:
    """All arithmetic is in the state's dtype: what is lost is the rounding of h."""
    x = make_inputs(
        Case(T=1, B=5, H=3, K=13, V=7, dtype=dtype, input_gate=input_gate, normalize=normalize)
    )
    kind = {"input_gate": input_gate, "normalize": normalize, "scale": scale}
    h, end = tfla.mlstm_step(*token(x, 0), tfla.State(*x.memory), **kind)
    truth, true_end = oracle.mlstm(
        *(t.double() for t in (x.q, x.k, x.v, x.i, x.f)), **kind, memory=x.memory
    )
    assert h.dtype == dtype and h.shape == x.v[:, 0].shape
    assert end.C.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    work = torch.finfo(end.C.dtype).eps
    # n . q may cancel: its rounding is that of its terms, here within a hundred times its value.
    assert_close(h, truth[:, 0], torch.finfo(dtype).eps + 100 * work)
    assert_close(end.C, true_end.C, 4 * work)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_states_in_bf16_stay_in_bf16_and_m_in_fp32(input_gate: str, inplace: bool) -> None:
    x = make_inputs(Case(T=1, B=4, dtype=torch.bfloat16, input_gate=input_gate))
    C, n, m = x.memory
    state = tfla.State(C.bfloat16(), n if n is None else n.bfloat16(), m)
    before = copy(state)
    h, end = tfla.mlstm_step(*token(x, 0), state, input_gate=input_gate, inplace=inplace)
    memory = oracle.Memory(*(s if s is None else s.double() for s in before))
    truth, true_end = oracle.mlstm(
        *(t.double() for t in (x.q, x.k, x.v, x.i, x.f)), input_gate=input_gate, memory=memory
    )
    eps = torch.finfo(torch.bfloat16).eps
    assert_close(h, truth[:, 0], eps)  # from the unrounded new state
    assert end.C.dtype == torch.bfloat16
    assert_close(end.C, true_end.C, eps)
    if n is not None:
        assert end.n.dtype == torch.bfloat16 and end.m.dtype == torch.float32
        assert_close(end.n, true_end.n, eps)
        assert_close(end.m, true_end.m, 1e-6)


def test_m_in_fp32_keeps_a_long_generation_in_bf16_states_right() -> None:
    """With m rounded to bf16 the outputs drift by a quarter in a thousand steps."""
    x = make_inputs(Case(T=1000, B=1, H=2, K=8, V=8, gates="initial", dtype=torch.float32))
    C, n, m = x.memory
    h, _ = steps(x, tfla.State(C.bfloat16(), n.bfloat16(), m.clone()), "exp", None, inplace=True)
    truth, _ = oracle.mlstm(*(t.double() for t in (x.q, x.k, x.v, x.i, x.f)), memory=x.memory)
    late = slice(500, None)
    assert distance(h[:, late].double(), truth[:, late]) < 0.1 * truth[:, late].norm().item()


@variants
def test_inplace_updates_and_returns_the_same_tensors(
    input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=1, B=3, dtype=torch.float32, input_gate=input_gate, normalize=normalize))
    kind = {"input_gate": input_gate, "normalize": normalize}
    state = copy(x.memory)
    h, end = tfla.mlstm_step(*token(x, 0), state, **kind, inplace=True)
    assert all(a is b for a, b in zip(end, state, strict=True))
    h1, fresh = tfla.mlstm_step(*token(x, 0), tfla.State(*x.memory), **kind)
    assert torch.equal(h, h1)
    for old, updated, new in zip(x.memory, state, fresh, strict=True):
        if old is not None:
            assert torch.equal(updated, new) and not torch.equal(updated, old)
            assert new.data_ptr() != old.data_ptr()


def test_inplace_reaches_views_of_a_larger_buffer() -> None:
    """The states of all layers in one tensor, and the rows of one layer strided."""
    x = make_inputs(Case(T=1, B=3))
    C, n, m = x.memory
    C_all, n_all, m_all = (torch.stack([s, s + 1, s + 2], 1) for s in (C, n, m))
    before = [s.clone() for s in (C_all, n_all, m_all)]
    view = tfla.State(C_all[:, 1], n_all[:, 1], m_all[:, 1])
    h, _ = tfla.mlstm_step(*token(x, 0), view, inplace=True)
    wanted, end = tfla.mlstm_step(*token(x, 0), tfla.State(C + 1, n + 1, m + 1))
    assert_close(h, wanted, 1e-13)
    for whole, old, new in zip((C_all, n_all, m_all), before, end, strict=True):
        assert_close(whole[:, 1], new, 1e-13)
        assert torch.equal(whole[:, ::2], old[:, ::2])


@variants
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_touch_their_rows_and_no_other(
    dtype: torch.dtype, input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=1, B=7, input_gate=input_gate, normalize=normalize))
    kind = {"input_gate": input_gate, "normalize": normalize}
    slots = torch.tensor([5, 0, 3], dtype=dtype)
    others = torch.tensor([1, 2, 4, 6])
    batch = [t[:3] for t in token(x, 0)]
    state = copy(x.memory)
    h, end = tfla.mlstm_step(*batch, state, **kind, inplace=True, slots=slots)
    assert all(a is b for a, b in zip(end, state, strict=True))
    rows = tfla.State(*(s if s is None else s[slots.long()] for s in x.memory))
    wanted, wanted_end = tfla.mlstm_step(*batch, rows, **kind)
    assert_close(h, wanted, 1e-14)
    for got, old, new in zip(state, x.memory, wanted_end, strict=True):
        if got is not None:
            assert_close(got[slots.long()], new, 1e-14)
            assert torch.equal(got[others], old[others])


def test_every_second_slot_and_no_slots_at_all() -> None:
    x = make_inputs(Case(T=1, B=6))
    state, strided = copy(x.memory), torch.arange(6)[::2]
    h, _ = tfla.mlstm_step(*(t[:3] for t in token(x, 0)), state, inplace=True, slots=strided)
    wanted, _ = tfla.mlstm_step(
        *(t[:3] for t in token(x, 0)), tfla.State(*(s[::2] for s in x.memory))
    )
    assert_close(h, wanted, 1e-14)
    before = copy(state)
    none, _ = tfla.mlstm_step(
        *(t[:0] for t in token(x, 0)), state, inplace=True, slots=torch.arange(0)
    )
    assert none.shape == (0, *wanted.shape[1:])
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@variants
def test_the_step_has_the_gradients_of_the_recurrence(
    input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=3, input_gate=input_gate, normalize=normalize))
    kind = {"input_gate": input_gate, "normalize": normalize}
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    args = [leaves[n] for n in "qkvif"]
    memory = [leaves.get(f"{n}0") for n in "Cnm"]
    truth, true_end = oracle.mlstm(*args, **kind, memory=oracle.Memory(*memory))
    state, hs = tfla.State(*memory), []
    for t in range(3):
        h, state = tfla.mlstm_step(*(a[:, t] for a in args), state, **kind)
        hs.append(h)

    def grads(h: Tensor, end: tfla.State | oracle.Memory) -> tuple[Tensor, ...]:
        loss = (h * x.dh).sum() + (true_size(end)[0] * x.G_C).sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    for name, a, b in zip(
        leaves, grads(torch.stack(hs, 1), state), grads(truth, true_end), strict=True
    ):
        assert_close(a, b, 1e-11, name)


def test_the_gradient_passes_a_state_in_bf16() -> None:
    x = make_inputs(Case(T=1, dtype=torch.float32))
    C, n, m = x.memory
    low = [C.bfloat16().requires_grad_(), n.bfloat16().requires_grad_(), m.clone().requires_grad_()]
    h, end = tfla.mlstm_step(*token(x, 0), tfla.State(*low))
    assert end.C.dtype == torch.bfloat16
    got = torch.autograd.grad((h * x.dh[:, 0]).sum(), low)
    wide = [t.detach().double().requires_grad_() for t in low]
    truth, _ = oracle.mlstm(
        *(t.double() for t in (x.q, x.k, x.v, x.i, x.f)), memory=oracle.Memory(*wide)
    )
    wanted = torch.autograd.grad((truth * x.dh).sum(), wide)
    for name, a, b in zip("Cn", got, wanted, strict=False):
        assert a.dtype == torch.bfloat16
        assert_close(a, b, torch.finfo(torch.bfloat16).eps, name)


@variants
def test_a_shift_of_the_gauge_changes_no_step(input_gate: str, normalize: bool | None) -> None:
    x = make_inputs(Case(T=1, input_gate=input_gate, normalize=normalize))
    C, n, m = x.memory
    if m is None:
        return
    kind = {"input_gate": input_gate, "normalize": normalize}
    h, end = tfla.mlstm_step(*token(x, 0), tfla.State(C, n, m), **kind)
    for c in (-40.0, 40.0):
        e = torch.tensor(-c, dtype=torch.float64).exp()
        h1, end1 = tfla.mlstm_step(*token(x, 0), tfla.State(C * e, n * e, m + c), **kind)
        assert_close(h1, h, 1e-12)
        for a, b in zip(true_size(end1), true_size(end), strict=True):
            assert_close(a, b, 1e-12)


def test_an_empty_batch_steps() -> None:
    x = make_inputs(Case(T=1, B=0))
    h, end = tfla.mlstm_step(*token(x, 0), tfla.State(*x.memory))
    assert h.shape == x.v[:, 0].shape
    assert [s.shape for s in end] == [s.shape for s in x.memory]


def test_a_query_of_zeros_stays_finite_when_the_floor_underflows() -> None:
    x = make_inputs(Case(T=1, dtype=torch.float32))
    q, k, v, i, f = token(x, 0)
    h, end = tfla.mlstm_step(torch.zeros_like(q), k, v, i + 120.0, f, tfla.State(*x.memory))
    assert (h == 0).all() and all(torch.isfinite(s).all() for s in end)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_one_token_of_linear_attention_is_the_same_with_and_without_gradients(
    grad: bool, state: bool
) -> None:
    """Without gradients it takes the step, with them the sequence: one function."""
    x = make_inputs(Case(T=1))
    memory = x.memory if state else None
    log_f, log_i = oracle.log_gates(x.i, x.f, "exp", torch.float64)
    given = tfla.State(*memory) if state else None
    h, end = tfla.linear_attention(
        x.q.clone().requires_grad_(grad),
        x.k,
        x.v,
        log_f,
        log_i,
        normalize=True,
        initial_state=given,
        output_final_state=True,
    )
    truth, true_end = oracle.linear_attention(
        x.q, x.k, x.v, log_f, log_i, normalize=True, memory=memory
    )
    assert_close(h, truth, 1e-12)
    for a, b in zip(true_size(end), true_size(true_end), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded"])
def test_any_strides(layout: str) -> None:
    x = make_inputs(Case(T=1, H=3))

    def strided(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "every second":
            return torch.stack([t, t + 1], -1)[..., 0]
        return t[:, :1].expand_as(t)

    args = [strided(t) for t in token(x, 0)]
    state = tfla.State(*(strided(s) for s in x.memory))
    h, end = tfla.mlstm_step(*args, state)
    h1, end1 = tfla.mlstm_step(
        *(a.contiguous() for a in args), tfla.State(*(s.contiguous() for s in state))
    )
    for a, b in zip((h, *end), (h1, *end1), strict=True):
        assert_close(a, b, 1e-13)
