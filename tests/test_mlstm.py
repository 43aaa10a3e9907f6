"""tfla.mlstm against the recurrence in fp64: values, final state, every gradient."""

import pytest
import recurrence as oracle
import torch
from checks import (
    assert_close,
    check_against_recurrence,
    poisoned_buffers,
    run_recurrence,
    run_tfla,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    EXTREME,
    RESETS,
    VARIANTS,
    Case,
    make_inputs,
    normalized,
    packed,
    variants,
)

import tfla
from tfla.reference import layout

LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_oracle_agrees_with_the_closed_form(normalize: bool) -> None:
    case = Case(T=50, input_gate="exp", normalize=normalize, state=False)
    x = make_inputs(case)
    log_f, log_i = oracle.log_gates(x.i, x.f, "exp", torch.float64)
    h, _ = oracle.mlstm(x.q, x.k, x.v, x.i, x.f, normalize=normalize, scale=0.3)
    assert_close(h, oracle.closed_form(x.q, x.k, x.v, log_f, log_i, normalize=normalize, scale=0.3))


@variants
@pytest.mark.parametrize("T", [0, 1, 2, 3, 16, 63, 64, 65, 127, 130, 200])
def test_every_length(T: int, input_gate: str, normalize: bool | None) -> None:
    check_against_recurrence(Case(T=T, input_gate=input_gate, normalize=normalize, seed=T))


@variants
@pytest.mark.parametrize(("state", "final"), [(False, False), (True, False), (False, True)])
def test_with_and_without_states(
    state: bool, final: bool, input_gate: str, normalize: bool | None
) -> None:
    check_against_recurrence(
        Case(T=70, state=state, final=final, input_gate=input_gate, normalize=normalize)
    )


@pytest.mark.parametrize(
    ("K", "V"),
    [
        (1, 1),
        (8, 8),
        (13, 7),
        (7, 33),
        (16, 64),
        (48, 80),
        (92, 96),
        (184, 8),
        (8, 184),
        (512, 8),
        (8, 512),
    ],
)
def test_every_head_dim(K: int, V: int) -> None:
    check_against_recurrence(Case(T=66, B=1, H=1, K=K, V=V))
    check_against_recurrence(Case(T=66, B=1, H=1, K=K, V=V, input_gate="sigmoid"))


@variants
@pytest.mark.parametrize(("B", "H"), [(0, 2), (1, 1), (5, 1), (1, 7)])
def test_every_batch(B: int, H: int, input_gate: str, normalize: bool | None) -> None:
    check_against_recurrence(Case(T=20, B=B, H=H, input_gate=input_gate, normalize=normalize))


@variants
@pytest.mark.parametrize("scale", [1.0, 0.05, -0.7, 0.0])
def test_any_scale(scale: float, input_gate: str, normalize: bool | None) -> None:
    check_against_recurrence(Case(T=70, scale=scale, input_gate=input_gate, normalize=normalize))


@normalized
@pytest.mark.parametrize("gates", [*EXTREME, *RESETS, "initial"])
def test_extreme_gates(gates: str, input_gate: str, normalize: bool | None) -> None:
    check_against_recurrence(Case(T=130, gates=gates, input_gate=input_gate, normalize=normalize))


@pytest.mark.parametrize("gates", [*EXTREME, *RESETS, "initial"])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_extreme_gates_without_normaliser(gates: str, input_gate: str) -> None:
    check_against_recurrence(Case(T=130, gates=gates, input_gate=input_gate, normalize=False))


@variants
def test_no_result_is_left_unwritten(input_gate: str, normalize: bool | None) -> None:
    with poisoned_buffers():
        check_against_recurrence(Case(T=70, input_gate=input_gate, normalize=normalize))
        check_against_recurrence(packed(0, 70, 0, 3, input_gate=input_gate, normalize=normalize))
        check_against_recurrence(Case(T=0, input_gate=input_gate, normalize=normalize))


@variants
def test_infinite_gates_mask_and_reset(input_gate: str, normalize: bool | None) -> None:
    """i = -inf writes nothing, f = -inf keeps nothing, f = +inf keeps all; no gradient is NaN."""
    for state in (False, True):
        check_against_recurrence(
            Case(T=130, gates="infinite", state=state, input_gate=input_gate, normalize=normalize)
        )


@normalized
@pytest.mark.parametrize("gates", ["ordinary", "i=+30", "i=+95", "f=-1e5"])
def test_a_query_of_zeros(gates: str, input_gate: str, normalize: bool | None) -> None:
    """n . q = 0: the floor exp(-m) divides, and no gradient passes the normaliser."""
    case = Case(T=66, gates=gates, input_gate=input_gate, normalize=normalize)
    inputs = make_inputs(case)
    inputs.q[:, ::3] = 0.0
    truth, c = run_recurrence(case, inputs, torch.float64)
    ours = run_tfla(case, inputs, c)
    for name, t in truth.items():
        if name != "m":
            assert_close(ours[name], t, 1e-9, name)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_a_query_of_zeros_stays_finite_when_the_floor_underflows(dtype: torch.dtype) -> None:
    x = make_inputs(Case(T=70, gates="i=+95", dtype=dtype, gate_dtype=torch.float32))
    h, end = tfla.mlstm(torch.zeros_like(x.q), x.k, x.v, x.i + 20, x.f, output_final_state=True)
    assert (h == 0).all()
    assert all(torch.isfinite(part).all() for part in end)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_a_large_scale_where_the_floor_underflows(scale: float, dtype: torch.dtype) -> None:
    """scale / den is beyond fp32 at a query of zeros, and past the end of a ragged last chunk."""
    case = Case(T=70, state=False, gates="i=+95", dtype=dtype)
    x = make_inputs(case)
    x.q[:, ::5] = 0.0
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
    h, _ = tfla.mlstm(*leaves, scale=scale)
    grads = torch.autograd.grad(h[:, 1::5].float().sum(), leaves)
    assert all(t.isfinite().all() for t in grads[2:])  # dq and dk may be beyond fp16
    assert all(not t.isnan().any() for t in (h, *grads))


def test_padding_tokens_of_zeros_are_finite_and_harmless() -> None:
    x = make_inputs(Case(T=80, state=False))
    q, k, v = (t.clone() for t in (x.q, x.k, x.v))
    i, f = x.i.clone(), x.f.clone()
    for t in (q, k, v):
        t[:, 50:] = 0.0
    i[:, 50:], f[:, 50:] = -1e4, 1e4
    h, end = tfla.mlstm(q, k, v, i, f, output_final_state=True)
    short, short_end = tfla.mlstm(
        *(t[:, :50] for t in (x.q, x.k, x.v, x.i, x.f)), output_final_state=True
    )
    assert_close(h[:, :50], short)
    assert (h[:, 50:] == 0).all()
    assert_close(
        end.C * end.m.exp()[..., None, None], short_end.C * short_end.m.exp()[..., None, None]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_reset_forgets_even_the_strongest_past(dtype: torch.dtype) -> None:
    """i = +90, f = -1e5, i = -30: e^(90 - 1e5) loses to e^-30; clamped, f would let it win."""
    x = make_inputs(Case(T=40, B=1, H=1, state=False, dtype=dtype))
    i, f = torch.full_like(x.i, -30.0), torch.full_like(x.f, 3.0)
    i[:, :20], f[:, 20] = 90.0, -1e5
    h, end = tfla.mlstm(x.q, x.k, x.v, i, f, output_final_state=True)
    alone, alone_end = tfla.mlstm(
        *(t[:, 20:] for t in (x.q, x.k, x.v, i, f)), output_final_state=True
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(h[:, 20:], alone, tolerance)
    assert_close(end.C * (end.m - alone_end.m).exp()[..., None, None], alone_end.C, tolerance)


def test_no_token_sees_the_future() -> None:
    x = make_inputs(Case(T=100, B=1))
    args = [x.q, x.k, x.v, x.i, x.f]
    h, _ = tfla.mlstm(*args)
    for t in (1, 37, 64, 99):
        changed = [torch.cat([a[:, :t], a[:, t:].flip(1) * 1.5 + 1.0], 1) for a in args]
        assert_close(tfla.mlstm(*changed)[0][:, :t], h[:, :t], 1e-13, f"before {t}")


@variants
def test_permuting_the_batch_permutes_the_results(input_gate: str, normalize: bool | None) -> None:
    x = make_inputs(Case(T=70, B=4, input_gate=input_gate, normalize=normalize))
    order = torch.tensor([2, 0, 3, 1])

    def run(rows: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t[rows].clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
        state = tfla.State(*(s if s is None else s[rows] for s in x.memory))
        h, _ = tfla.mlstm(*leaves, input_gate=input_gate, normalize=normalize, initial_state=state)
        return [h, *torch.autograd.grad((h * x.dh[rows]).sum(), leaves)]

    for straight, permuted in zip(run(torch.arange(4)), run(order), strict=True):
        assert_close(permuted, straight[order], 1e-13)


def test_heads_do_not_know_each_other() -> None:
    x = make_inputs(Case(T=70, H=3))
    args = (x.q, x.k, x.v, x.i, x.f)
    h, _ = tfla.mlstm(*args)
    one, _ = tfla.mlstm(*(a[:, :, 1:2] for a in args))
    assert_close(h[:, :, 1:2], one, 1e-13)


def test_only_the_gradients_asked_for_are_given() -> None:
    x = make_inputs(Case(T=66))
    names = ["q", "k", "v", "i", "f"]
    full = {n: getattr(x, n).clone().requires_grad_() for n in names}
    h, _ = tfla.mlstm(**full)
    expected = dict(
        zip(names, torch.autograd.grad((h * x.dh).sum(), list(full.values())), strict=True)
    )
    for name in names:
        leaf = getattr(x, name).clone().requires_grad_()
        h, end = tfla.mlstm(**{**{n: getattr(x, n) for n in names}, name: leaf})
        assert h.requires_grad
        (grad,) = torch.autograd.grad((h * x.dh).sum(), leaf)
        assert_close(grad, expected[name], 1e-13, name)
    with torch.no_grad():
        assert not tfla.mlstm(**full)[0].requires_grad
    assert not tfla.mlstm(x.q, x.k, x.v, x.i, x.f)[0].requires_grad


def test_a_loss_on_the_final_state_alone_reaches_everything_it_depends_on() -> None:
    """h is not used at all; q has no part in the state and gets zeros."""
    case = Case(T=70)
    x = make_inputs(case)
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    memory = [leaves["C0"], leaves["n0"], leaves["m0"]]
    args = [leaves[n] for n in "qkvif"]
    truth = oracle.mlstm(*args, memory=oracle.Memory(*memory))[1]
    c = truth.m.detach()
    wanted = torch.autograd.grad(
        ((truth.C * (truth.m - c).exp()[..., None, None]) * x.G_C).sum(),
        list(leaves.values()),
        materialize_grads=True,
    )
    _, end = tfla.mlstm(*args, initial_state=tfla.State(*memory), output_final_state=True)
    got = torch.autograd.grad(
        ((end.C * (end.m - c).exp()[..., None, None]) * x.G_C).sum(),
        list(leaves.values()),
        materialize_grads=True,
    )
    for name, a, b in zip(leaves, got, wanted, strict=True):
        assert_close(a, b, 1e-9, f"d{name}")


@normalized
def test_the_identity_of_query_and_gradient(input_gate: str, normalize: bool | None) -> None:
    """q . dq is 0 where the normaliser divides (h is blind to the length of q), else dh . h."""
    case = Case(T=130, input_gate=input_gate, normalize=normalize)
    x = make_inputs(case)
    log_f, log_i = oracle.log_gates(x.i, x.f, input_gate, torch.float64)
    q = x.q.clone().requires_grad_()
    h, _ = tfla.mlstm(
        q,
        x.k,
        x.v,
        x.i,
        x.f,
        input_gate=input_gate,
        normalize=normalize,
        initial_state=tfla.State(*x.memory),
    )
    (dq,) = torch.autograd.grad((h * x.dh).sum(), q)
    unnormalised, _ = oracle.linear_attention(
        x.q,
        x.k,
        torch.ones_like(x.v[..., :1]),
        log_f,
        log_i,
        normalize=False,
        memory=oracle.Memory(x.memory.n[..., None] * x.memory.m.exp()[..., None, None], None, None),
    )
    active = unnormalised[..., 0].abs() > 1.0  # |n . q| e^m against 1
    assert active.any() and not active.all()
    assert_close((x.q * dq).sum(-1), torch.where(active, 0.0, (x.dh * h).sum(-1)), 1e-12)


problems = st.fixed_dictionaries(
    {
        "K": st.integers(1, 24),
        "V": st.integers(1, 24),
        "H": st.integers(1, 3),
        "gates": st.sampled_from(["ordinary", "initial", "f=-12", "f=+30", "i=-30", *RESETS]),
        "state": st.booleans(),
        "final": st.booleans(),
        "scale": st.none() | st.floats(-2, 2),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=25)
@given(st.sampled_from(VARIANTS), st.integers(0, 150), st.integers(1, 3), problems)
def test_random_problems(variant: tuple[str, bool | None], T: int, B: int, fields: dict) -> None:
    check_against_recurrence(Case(T=T, B=B, input_gate=variant[0], normalize=variant[1], **fields))


@settings(max_examples=15)
@given(st.sampled_from(VARIANTS), st.lists(st.integers(0, 90), min_size=1, max_size=5), problems)
def test_random_packed_problems(
    variant: tuple[str, bool | None], lengths: list[int], fields: dict
) -> None:
    check_against_recurrence(
        packed(*lengths, input_gate=variant[0], normalize=variant[1], **fields)
    )


@pytest.mark.gpu
@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_a_gpu_with_the_reference(
    dtype: torch.dtype, input_gate: str, normalize: bool | None
) -> None:
    check_against_recurrence(
        Case(
            T=130,
            dtype=dtype,
            device="cuda",
            backend="reference",
            input_gate=input_gate,
            normalize=normalize,
        )
    )


@pytest.mark.parametrize("lengths", [None, (130, 0, 64, 3, 70)])
@pytest.mark.parametrize(("block", "few"), [(1, 1), (20_000, 1), (2**20, 2**20)])
def test_however_many_chunks_are_worked_on_at_once(
    block: int, few: int, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence after the other, some, all; chunk by chunk, or several chunks at once."""
    monkeypatch.setattr(layout, "BLOCK", block)
    monkeypatch.setattr(layout, "FEW", few)
    for gates in (
        "ordinary",
        "f=-1e5",
        "resets 1%",
    ):  # with weights that are products of factors, and others
        case = Case(T=210, B=5, gates=gates) if lengths is None else packed(*lengths, gates=gates)
        check_against_recurrence(case)
