"""tfla.linear_attention: the family, each member against its own definition."""

import pytest
import recurrence as oracle
import torch
from checks import (
    assert_close,
    true_size,
)
from problems import Case, make_inputs, offsets, packed
from torch import Tensor

import tfla


def lower(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.float64).tril()


def test_without_gates_it_is_causal_linear_attention() -> None:
    """h = (mask * (q k^T)) v"""
    x = make_inputs(Case(T=90, H=3))
    weights = torch.einsum("bthk,bshk->bhts", x.q, x.k) * lower(90)
    h, _ = tfla.linear_attention(x.q, x.k, x.v, scale=1.0)
    assert_close(h, torch.einsum("bhts,bshv->bthv", weights, x.v), 1e-12)
    h, _ = tfla.linear_attention(x.q, x.k, x.v)
    assert_close(h, torch.einsum("bhts,bshv->bthv", weights * 12**-0.5, x.v), 1e-12)


def test_normalised_it_divides_by_the_sum_of_weights() -> None:
    """Positive features: the weights are positive and their sum lies above the floor of 1."""
    x = make_inputs(Case(T=90))
    q, k = x.q.abs() + 1, x.k.abs() + 1
    weights = torch.einsum("bthk,bshk->bhts", q, k) * lower(90)
    h, _ = tfla.linear_attention(q, k, x.v, normalize=True, scale=1.0)
    wanted = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), x.v)
    assert_close(h, wanted, 1e-12)


def test_a_constant_decay_per_head_is_retention() -> None:
    """h = (mask * gamma^(t - s) * (q k^T)) v, gamma_h = 1 - 2^(-5 - h)"""
    x = make_inputs(Case(T=90, H=4))
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    t = torch.arange(90)
    decay = torch.where(lower(90).bool(), gamma[:, None, None] ** (t[:, None] - t), 0.0)
    weights = torch.einsum("bthk,bshk->bhts", x.q, x.k) * decay
    h, _ = tfla.linear_attention(x.q, x.k, x.v, gamma.log(), scale=1.0)
    assert_close(h, torch.einsum("bhts,bshv->bthv", weights, x.v), 1e-12)


def test_a_decay_per_token_is_simple_gla() -> None:
    """S_t = a_t S_{t-1} + k_t v_t^T"""
    x = make_inputs(Case(T=90))
    a = torch.sigmoid(x.f)
    S, hs = torch.zeros(2, 2, 12, 10, dtype=torch.float64), []
    for t in range(90):
        S = a[:, t, :, None, None] * S + torch.einsum("bhk,bhv->bhkv", x.k[:, t], x.v[:, t])
        hs.append(torch.einsum("bhk,bhkv->bhv", x.q[:, t], S) * 0.7)
    h, end = tfla.linear_attention(x.q, x.k, x.v, a.log(), scale=0.7, output_final_state=True)
    assert_close(h, torch.stack(hs, 1), 1e-12)
    assert_close(end.C, S, 1e-12)
    assert end.n is None and end.m is None


def test_with_step_sizes_it_is_the_ssd_of_mamba_2() -> None:
    """S_t = exp(A dt_t) S_{t-1} + dt_t B_t x_t^T,  y_t = C_t S_t; all heads share B, C"""
    x = make_inputs(Case(T=90, H=4))
    g = torch.Generator().manual_seed(5)
    dt = torch.nn.functional.softplus(torch.randn(2, 90, 4, generator=g, dtype=torch.float64))
    A = -torch.rand(4, generator=g, dtype=torch.float64) - 0.1
    C, B = x.q[:, :, :1].expand_as(x.q), x.k[:, :, :1].expand_as(x.k)
    S, ys = torch.zeros(2, 4, 12, 10, dtype=torch.float64), []
    for t in range(90):
        inflow = torch.einsum("bhk,bhv->bhkv", B[:, t], x.v[:, t]) * dt[:, t, :, None, None]
        S = (A * dt[:, t]).exp()[..., None, None] * S + inflow
        ys.append(torch.einsum("bhk,bhkv->bhv", C[:, t], S))
    options = {"scale": 1.0, "output_final_state": True}
    for y, end in (
        tfla.linear_attention(C, B, x.v * dt[..., None], A * dt, **options),
        tfla.linear_attention(C, B, x.v, A * dt, dt.log(), **options),
    ):
        assert_close(y, torch.stack(ys, 1), 1e-12)
        assert_close(end.C, S, 1e-12)


def test_steps_of_size_0_mask_tokens_and_have_gradients() -> None:
    """dt = 0 is how users of Mamba-2 mask padding; the gradient of dt is right there too."""
    x = make_inputs(Case(T=40, B=1, H=2))
    g = torch.Generator().manual_seed(5)
    dt = torch.rand(1, 40, 2, generator=g, dtype=torch.float64)
    dt[:, 10:20] = 0.0
    dt.requires_grad_()
    A = torch.tensor([-0.4, -0.1], dtype=torch.float64, requires_grad=True)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]

    def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        S, ys = torch.zeros(1, 2, 12, 10, dtype=torch.float64), []
        for t in range(40):
            inflow = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t]) * dt[:, t, :, None, None]
            S = (A * dt[:, t]).exp()[..., None, None] * S + inflow
            ys.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return torch.stack(ys, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tfla.linear_attention(q, k, v * dt[..., None], A * dt, scale=1.0)[0]

    y, expected = ours(*leaves), recurrent(*leaves)
    assert_close(y, expected, 1e-12)
    grads = [torch.autograd.grad((h * x.dh).sum(), [*leaves, dt, A]) for h in (y, expected)]
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        assert_close(a, b, 1e-11)


def test_the_mlstm_is_gate_activations_plus_this() -> None:
    x = make_inputs(Case(T=70))
    for input_gate, normalize in (
        ("exp", True),
        ("exp", False),
        ("sigmoid", True),
        ("sigmoid", False),
    ):
        log_f, log_i = oracle.log_gates(x.i, x.f, input_gate, torch.float64)
        state = tfla.State(*x.memory) if normalize else tfla.State(x.memory.C, None, None)
        options = {"normalize": normalize, "initial_state": state, "output_final_state": True}
        h, end = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, input_gate=input_gate, **options)
        h1, end1 = tfla.linear_attention(x.q, x.k, x.v, log_f, log_i, **options)
        assert_close(h, h1, 1e-12)
        for a, b in zip(true_size(end), true_size(end1), strict=True):
            assert_close(a, b, 1e-12)


GATES = {
    "none": (None, None),
    "decay per head": ("head", None),
    "decay per token": ("token", None),
    "weight per head": (None, "head"),
    "weight per token": (None, "token"),
    "both per head": ("head", "head"),
    "both per token": ("token", "token"),
    "per head and per token": ("head", "token"),
}


@pytest.mark.parametrize("kinds", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", [Case(T=70), Case(T=1), Case(T=0), packed(0, 40, 30)], ids=str)
def test_values_and_gradients_for_every_kind_of_gate(
    case: Case, normalize: bool, kinds: tuple[str | None, str | None]
) -> None:
    x = make_inputs(case)
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items() if n not in "if"}
    if not normalize:
        leaves = {n: t for n, t in leaves.items() if n not in ("n0", "m0")}
    values = {"log_f": torch.nn.functional.logsigmoid(x.f), "log_i": x.i - 1}
    gates: dict[str, Tensor | None] = {}
    for (name, value), kind in zip(values.items(), kinds, strict=True):
        if kind is not None:
            per_head = torch.linspace(-0.5, -0.01, case.H, dtype=torch.float64)
            gates[name] = (value if kind == "token" else per_head).clone().requires_grad_()
    leaves |= gates
    memory = [leaves.get(f"{n}0") for n in "Cnm"]
    args = (leaves["q"], leaves["k"], leaves["v"])
    truth, true_end = oracle.linear_attention(
        *args, **gates, normalize=normalize, memory=oracle.Memory(*memory), lengths=case.lengths
    )
    h, end = tfla.linear_attention(
        *args,
        **gates,
        normalize=normalize,
        initial_state=tfla.State(*memory),
        output_final_state=True,
        cu_seqlens=None if case.lengths is None else offsets(case.lengths),
    )
    assert_close(h, truth, 1e-10)
    for a, b in zip(true_size(end), true_size(true_end), strict=True):
        assert_close(a, b, 1e-10)

    def grads(h: Tensor, end: tfla.State | oracle.Memory) -> tuple[Tensor, ...]:
        loss = (h * x.dh).sum()
        for size, G in zip(true_size(end), (x.G_C, x.G_n), strict=False):
            loss = loss + (size * G).sum()
        return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    wanted = grads(truth, true_end)
    for name, a, b in zip(leaves, grads(h, end), wanted, strict=True):
        assert a.shape == leaves[name].shape
        assert_close(a, b, 1e-9, f"d{name}")


def test_growing_log_gates_are_the_function_asked_for() -> None:
    """log_f > 0 and log_i > 0: a growing state, right as long as it is finite."""
    x = make_inputs(Case(T=80))
    log_f, log_i = x.f.abs() * 0.3, x.i.abs() * 4
    for normalize in (False, True):
        h, end = tfla.linear_attention(
            x.q, x.k, x.v, log_f, log_i, normalize=normalize, output_final_state=True
        )
        truth, true_end = oracle.linear_attention(x.q, x.k, x.v, log_f, log_i, normalize=normalize)
        assert_close(h, truth, 1e-10)
        c = 0.0 if true_end.m is None else true_end.m.max()
        for a, b in zip(true_size(end, c), true_size(true_end, c), strict=True):
            assert_close(a, b, 1e-10)


def test_a_gate_without_gradient_beside_one_with() -> None:
    x = make_inputs(Case(T=70))
    log_f = torch.full((2,), -0.1, dtype=torch.float64, requires_grad=True)
    h, _ = tfla.linear_attention(x.q, x.k, x.v, log_f, x.i)
    (grad,) = torch.autograd.grad((h * x.dh).sum(), log_f)
    truth, _ = oracle.linear_attention(x.q, x.k, x.v, log_f, x.i)
    (wanted,) = torch.autograd.grad((truth * x.dh).sum(), log_f)
    assert_close(grad, wanted, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_the_recurrence_in_it(dtype: torch.dtype) -> None:
    x = make_inputs(Case(T=130, B=8, dtype=dtype))
    log_f = torch.tensor([-0.03, -0.3])
    h, end = tfla.linear_attention(x.q, x.k, x.v, log_f, output_final_state=True)
    exact = [t.double() for t in (x.q, x.k, x.v)]
    truth, _ = oracle.linear_attention(*exact, log_f)
    plain, _ = oracle.linear_attention(x.q, x.k, x.v, log_f, dtype=dtype)
    assert h.dtype == dtype and end.C.dtype == torch.float32
    assert (h.double() - truth).norm() <= 2 * (plain.double() - truth).norm()
