"""The xLSTM: its layout, and that no way of cutting or batching a text changes what it says."""

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from xlstm_models import GATES, SMALL, close, draw, make, plain, plain_norm, same_state

import tfla
from tfla.xlstm import XLSTM, Block, MLSTMLayer, XLSTMConfig


@pytest.fixture(params=GATES)
def model(request: pytest.FixtureRequest) -> XLSTM:
    return make(dataclasses.replace(SMALL, input_gate=request.param))


# ---------------------------------------------------------------- what it computes


@torch.no_grad()
def test_logits_are_those_of_the_formulas(model: XLSTM) -> None:
    tokens = draw(9)
    close(model(tokens[None])[0][0], plain(model, tokens))


def test_caps_can_be_left_out() -> None:
    capped = make(dataclasses.replace(SMALL, gate_soft_cap=1e9, logit_soft_cap=1e9))
    free = XLSTM(dataclasses.replace(SMALL, gate_soft_cap=None, logit_soft_cap=None)).double()
    free.load_state_dict(capped.state_dict())
    tokens = draw(2, 9)
    close(capped(tokens)[0], free(tokens)[0])


@torch.no_grad()
def test_initialisation_follows_the_paper() -> None:
    model = XLSTM(XLSTMConfig(vocab_size=512, hidden_size=256, num_layers=4, num_heads=4))
    for name, p in model.named_parameters():
        if name.endswith("gates.weight"):
            assert (p == 0).all()
        elif name.endswith("gates.bias"):
            assert p.tolist() == [-10.0] * 4 + [3.0, 4.0, 5.0, 6.0]
        elif p.dim() == 1:
            assert (p == 1).all()
        else:
            narrow = "out." in name or "down." in name
            std = 2 / (4 * 16) if narrow else math.sqrt(2 / (5 * 256))
            assert p.std().item() == pytest.approx(std, rel=0.02) and abs(p.mean()) < 0.02 * std


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_the_initial_loss_is_that_of_knowing_nothing(gate: str) -> None:
    model = XLSTM(XLSTMConfig(512, 128, 3, 4, input_gate=gate))
    tokens = torch.randint(512, (4, 129))
    loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    # The logits of a fresh model are about normal with variance 2/5, which costs 1/5 nat.
    assert loss.item() == pytest.approx(math.log(512) + 0.2, abs=0.1)


def test_the_same_seed_makes_the_same_model() -> None:
    torch.manual_seed(3)
    first = XLSTM(SMALL).state_dict()
    torch.manual_seed(3)
    second = XLSTM(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_parameter_learns(model: XLSTM) -> None:
    tokens = draw(2, 20)
    F.cross_entropy(model(tokens)[0].flatten(0, 1), draw(40)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_tied_embeddings_are_one_parameter() -> None:
    model = make(dataclasses.replace(SMALL, tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    again = XLSTM(model.config).double()
    again.load_state_dict(model.state_dict())
    assert again.head.weight is again.embedding.weight
    tokens = draw(1, 5)
    close(again(tokens)[0], model(tokens)[0])


# ---------------------------------------------------------------- cutting, packing, batching


def test_two_parts_joined_by_the_state_are_the_whole(model: XLSTM) -> None:
    """Values and every gradient, through the state too."""
    tokens, weight = draw(2, 33), torch.randn(2, 33, SMALL.vocab_size, dtype=torch.float64)
    whole, end = model(tokens, output_state=True)
    wanted = torch.autograd.grad((whole * weight).sum(), list(model.parameters()))
    first, middle = model(tokens[:, :14], output_state=True)
    second, last = model(tokens[:, 14:], middle, output_state=True)
    parts = torch.cat((first, second), 1)
    close(parts, whole)
    same_state(last, end)
    got = torch.autograd.grad((parts * weight).sum(), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_prefill_and_steps_are_the_whole(model: XLSTM, inplace: bool) -> None:
    tokens = draw(3, 20)
    whole, end = model(tokens, output_state=True)
    logits, state = model(tokens[:, :12], output_state=True)
    close(logits, whole[:, :12])
    for t in range(12, 20):
        before = state
        logits, state = model.step(tokens[:, t], state, inplace=inplace)
        close(logits, whole[:, t])
        assert all((a.C is b.C) == inplace for a, b in zip(before, state, strict=True))
    same_state(state, end)


@torch.no_grad()
def test_steps_from_the_initial_state_are_the_whole(model: XLSTM) -> None:
    tokens, state = draw(2, 6), model.init_state(2)
    whole, _ = model(tokens)
    for t in range(6):
        logits, state = model.step(tokens[:, t], state)
        close(logits, whole[:, t])


def test_steps_carry_gradients(model: XLSTM) -> None:
    tokens = draw(2, 4)
    logits, state = model(tokens[:, :3], output_state=True)
    last, _ = model.step(tokens[:, 3], state)
    parts = torch.cat((logits, last[:, None]), 1)
    got = torch.autograd.grad(parts.square().sum(), list(model.parameters()))
    wanted = torch.autograd.grad(model(tokens)[0].square().sum(), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


@torch.no_grad()
def test_packed_texts_are_the_separate_ones(model: XLSTM) -> None:
    lengths = [5, 0, 17, 1]
    texts, more = [draw(1, n) for n in lengths], [draw(1, n) for n in (3, 4, 0, 2)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    logits, state = model(torch.cat(texts, 1), output_state=True, cu_seqlens=ends)
    close(logits, torch.cat([model(text)[0] for text in texts], 1))
    ends = torch.tensor([0, 3, 4, 0, 2]).cumsum(0)
    logits, state = model(torch.cat(more, 1), state, output_state=True, cu_seqlens=ends)
    both = [torch.cat(pair, 1) for pair in zip(texts, more, strict=True)]
    alone = [model(text, output_state=True) for text in both]
    close(logits, torch.cat([x[:, n:] for (x, _), n in zip(alone, lengths, strict=True)], 1))
    for row, (_, one) in enumerate(alone):
        part = tuple(tfla.State(*(t if t is None else t[row : row + 1] for t in s)) for s in state)
        same_state(part, one)


@torch.no_grad()
def test_the_rows_of_a_batch_do_not_know_each_other(model: XLSTM) -> None:
    tokens, order = draw(5, 11), torch.tensor([3, 0, 4, 1, 2])
    close(model(tokens[order])[0], model(tokens)[0][order])
    close(model(tokens[2:3])[0], model(tokens)[0][2:3])


@torch.no_grad()
def test_later_tokens_do_not_reach_back(model: XLSTM) -> None:
    a, b = draw(1, 12), draw(1, 12)
    b[:, :7] = a[:, :7]
    close(model(a)[0][:, :7], model(b)[0][:, :7])


@torch.no_grad()
def test_no_tokens_change_nothing(model: XLSTM) -> None:
    _, state = model(draw(2, 5), output_state=True)
    logits, after = model(draw(2, 0), state, output_state=True)
    assert logits.shape == (2, 0, SMALL.vocab_size)
    same_state(after, state)


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_an_idle_row_keeps_its_state_bit_for_bit(model: XLSTM, inplace: bool) -> None:
    _, state = model(draw(3, 9), output_state=True)
    kept = [[None if t is None else t[1].clone() for t in s] for s in state]
    token = draw(3)
    wanted, moved = model.step(token, state)
    active = torch.tensor([True, False, True])
    logits, after = model.step(token, state, inplace=inplace, active=active)
    close(logits[active], wanted[active])
    for s, old, all_active in zip(after, kept, moved, strict=True):
        for t, row, other in zip(s, old, all_active, strict=True):
            if t is not None:
                assert torch.equal(t[1], row)
                close(t[active], other[active])


@torch.no_grad()
def test_slots_step_some_rows_of_a_larger_state(model: XLSTM) -> None:
    _, pool = model(draw(5, 9), output_state=True)
    slots, token = torch.tensor([4, 1]), draw(2)
    part = tuple(tfla.State(*(t if t is None else t[slots] for t in s)) for s in pool)
    untouched = [s.C[[0, 2, 3]].clone() for s in pool]
    wanted, moved = model.step(token, part)
    logits, after = model.step(token, pool, inplace=True, slots=slots)
    close(logits, wanted)
    rows = tuple(tfla.State(*(t if t is None else t[slots] for t in s)) for s in after)
    same_state(rows, moved)
    assert all(torch.equal(s.C[[0, 2, 3]], old) for s, old in zip(after, untouched, strict=True))


# ---------------------------------------------------------------- dtypes and the machinery of torch


@torch.no_grad()
def test_gates_are_fp32_under_autocast_and_in_a_bf16_model() -> None:
    layer = make(SMALL, torch.float32).blocks[0].mlstm
    x = torch.randn(2, 5, SMALL.hidden_size)
    wanted = layer.gate_preactivations(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(
            torch.equal(a, b) for a, b in zip(layer.gate_preactivations(x), wanted, strict=True)
        )
    layer.bfloat16()
    exact = layer.gates.weight.double() @ x.bfloat16().double()[0, 0] + layer.gates.bias.double()
    i, f = layer.gate_preactivations(x.bfloat16())
    assert i.dtype == f.dtype == torch.float32
    got = torch.cat((i[0, 0], f[0, 0])).double()
    torch.testing.assert_close(got, 15 * torch.tanh(exact / 15), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (2, 0)])
def test_gates_are_as_exact_without_gradients_on_a_gpu(shape: tuple[int, ...]) -> None:
    """A product of 16-bit tensors into fp32 takes the place of copies in fp32."""
    layer = make(SMALL, torch.bfloat16).blocks[0].mlstm.cuda()
    x = torch.randn(*shape, SMALL.hidden_size, device="cuda").bfloat16()
    exact = x.double() @ layer.gates.weight.double().T + layer.gates.bias.double()
    with torch.no_grad():
        got = torch.cat(layer.gate_preactivations(x), -1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), 15 * torch.tanh(exact / 15), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_a_block_is_one_graph_under_autocast_on_a_gpu() -> None:
    """Torch 2.11 breaks a graph where one asks whether a device knows autocast: five graphs a block
    in place of one, and a training step on many GPUs that waits for the host."""
    block = make(SMALL, torch.float32).blocks[0].cuda()
    compiled = torch.compile(block.forward, fullgraph=True)
    x = torch.randn(2, 70, SMALL.hidden_size, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        (got, _), (wanted, _) = compiled(x), block(x)
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    got.square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def rounded_once(x: Tensor, exact: Tensor) -> bool:
    """Whether bf16 x is within half a spacing of exact, plus what fp32 arithmetic adds."""
    half = torch.exp2(exact.abs().log2().floor() - 8)
    return x.dtype == torch.bfloat16 and bool(((x.double() - exact).abs() <= 1.001 * half).all())


@torch.no_grad()
def test_norm_statistics_are_fp32_in_a_bf16_model() -> None:
    """One rounding at the end; statistics in bf16 would add theirs to it."""
    config = XLSTMConfig(2, 256, 1, 1)
    block = Block(config).bfloat16()
    x = torch.randn(2, 9, 256).bfloat16() + 0.2
    exact = plain_norm(x.double(), torch.ones(256), config.norm_eps)
    assert rounded_once(block.norm_mlstm(x), exact)

    layer = block.mlstm
    layer.out = torch.nn.Identity()
    layer.gates.bias.zero_()
    layer.qkvo.weight[-256:] = 0  # o = 0, so that sigmoid(o) halves, which is exact
    q, k, v, _ = layer.qkvo(x).split(layer.widths, -1)
    h, _ = tfla.mlstm(q[:, :, None], k[:, :, None], v[:, :, None], *layer.gate_preactivations(x))
    exact = F.layer_norm(h.double(), (256,), eps=config.norm_eps)[:, :, 0] / 2
    got, _ = layer(x)
    assert rounded_once(got, exact)


@torch.no_grad()
def test_a_block_given_a_sum_in_two_parts_returns_one(model: XLSTM) -> None:
    block = model.blocks[0]
    x, y = torch.randn(2, 2, 9, model.config.hidden_size, dtype=torch.float64)
    wanted, end = block(x + y, output_final_state=True)
    (a, b), after = block((x, y), output_final_state=True)
    assert torch.equal(a + b, wanted) and torch.equal(after.C, end.C)
    (a, b), _ = block((x + y, None))
    assert torch.equal(a + b, wanted)


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("gate", GATES)
def test_low_precision_costs_no_more_than_in_plain_torch(gate: str, autocast: bool) -> None:
    """Against fp64: at most twice the error of the formulas written out in the same precision."""
    truth = make(dataclasses.replace(SMALL, input_gate=gate))
    tokens = draw(4, 16)
    wanted, state = truth(tokens, output_state=True)
    model = XLSTM(truth.config)
    model.load_state_dict(truth.state_dict())
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, after = model(tokens, output_state=True)
        logits.square().mean().backward()
        with torch.no_grad():
            step, _ = model.step(tokens[:, 0], after)
            allowed = 2 * error(torch.stack([plain(model, row) for row in tokens]), wanted)
    assert logits.dtype == step.dtype == after[0].C.dtype == torch.float32
    assert error(logits, wanted) < allowed
    assert error(step, truth.step(tokens[:, 0], state)[0]) < allowed
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_changes_no_gradient(model: XLSTM) -> None:
    tokens = draw(2, 12)
    _, state = model(draw(2, 3), output_state=True)
    state = tuple(s.detach() for s in state)
    wanted = torch.autograd.grad(model(tokens, state)[0].square().sum(), list(model.parameters()))
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    got = torch.autograd.grad(model(tokens, state)[0].square().sum(), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("gate", GATES)
def test_compiles_as_one_graph(gate: str) -> None:
    """Forward and backward with states and packing, under autocast, and the step."""
    model = make(dataclasses.replace(SMALL, input_gate=gate, num_layers=1), torch.float32)
    tokens, ends = draw(1, 12), torch.tensor([0, 5, 12])
    _, state = model(draw(2, 4), output_state=True)
    state = tuple(s.detach() for s in state)

    def run(tokens: Tensor) -> tuple[Tensor, tuple[tfla.State, ...]]:
        with torch.autocast("cpu", torch.bfloat16):
            return model(tokens, state, output_state=True, cu_seqlens=ends)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (wanted, after), (logits, got) = run(tokens), compiled(tokens)
    torch.testing.assert_close(logits, wanted, rtol=0.02, atol=0.02)
    torch.testing.assert_close(got[0].C, after[0].C, rtol=0.02, atol=0.02)
    a = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
    b = torch.autograd.grad(wanted.square().mean(), list(model.parameters()))
    for name, x, y in zip(dict(model.named_parameters()), a, b, strict=True):
        assert error(x, y.double()) < 0.02, name
    with torch.no_grad():
        step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(draw(2) * 0, state)[0], model.step(draw(2) * 0, state)[0])


def test_a_model_built_on_meta_and_reset_is_a_fresh_one() -> None:
    with torch.device("meta"):
        model = XLSTM(SMALL)
    model.to_empty(device="cpu")
    other = XLSTM(SMALL)
    for each in (model, other):
        torch.manual_seed(1)
        each.reset_parameters()
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


TIED = dataclasses.replace(SMALL, tie_embeddings=True)


def on_meta() -> XLSTM:
    with torch.device("meta"):
        return XLSTM(TIED)


def emptied() -> XLSTM:
    model = on_meta().to_empty(device="cpu")
    model.reset_parameters()
    return model


def filled() -> XLSTM:
    model = on_meta()
    model.load_state_dict(XLSTM(TIED).state_dict(), assign=True)
    return model


def filled_after_emptied() -> XLSTM:
    model = on_meta().to_empty(device="cpu")
    model.load_state_dict(XLSTM(TIED).state_dict())
    return model


def overwritten() -> XLSTM:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return XLSTM(TIED).double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def pickled() -> XLSTM:
    return pickle.loads(pickle.dumps(XLSTM(TIED)))


def within() -> XLSTM:
    """As a part of a larger model."""
    outer = torch.nn.ModuleDict({"inner": on_meta()}).to_empty(device="cpu")
    outer["inner"].reset_parameters()
    outer.load_state_dict(outer.state_dict(), assign=True)
    return outer["inner"]


@pytest.mark.parametrize(
    "make",
    [
        emptied,
        filled,
        filled_after_emptied,
        overwritten,
        pickled,
        within,
        lambda: copy.deepcopy(XLSTM(TIED)),
        lambda: XLSTM(TIED).double().float().to("cpu"),
        lambda: XLSTM(TIED).bfloat16().float().share_memory(),
    ],
)
def test_ties_hold_however_the_parameters_are_made(make: Callable[[], XLSTM]) -> None:
    model = make()
    assert model.head.weight is model.embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "embedding.weight" in names and "head.weight" not in names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(draw(1, 4))[0].square().sum().backward()
    before = model.embedding.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)
    assert torch.equal(model.head.weight, model.embedding.weight)


def test_a_model_without_ties_gets_none() -> None:
    with torch.device("meta"):
        model = XLSTM(SMALL)
    model.to_empty(device="cpu").reset_parameters()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.head.weight is not model.embedding.weight


# ---------------------------------------------------------------- errors


def test_wrong_arguments_are_named() -> None:
    model = make(SMALL)
    _, state = model(draw(2, 3), output_state=True)
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\); got \(3,\)"):
        model(draw(3))
    with pytest.raises(TypeError, match="tokens must be int64 or int32; got torch.float32"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="state must be 2 tfla.State, one a layer; got 1"):
        model(draw(2, 3), state[:1])
    with pytest.raises(ValueError, match="initial_state"):
        model(draw(3, 3), state)
    with pytest.raises(ValueError, match=r"tokens must be \(B,\), one token per sequence"):
        model.step(draw(2, 1), state)
    with pytest.raises(ValueError, match="step needs a state"):
        model.step(draw(2), None)
    with pytest.raises(ValueError, match=r"active must be \(2,\) bool"):
        model.step(draw(2), state, active=torch.ones(2))
    with pytest.raises(ValueError, match="inplace"):
        model.step(draw(2), tuple(s.detach() for s in state), inplace=True)
    with pytest.raises(RuntimeError, match="triton"):
        model(draw(2, 3), backend="triton")
    with pytest.raises(ValueError, match="not normalised"):
        make(dataclasses.replace(SMALL, input_gate="sigmoid"))(draw(2, 3), state)


def test_a_layer_alone_remembers_for_many_tokens() -> None:
    """Its gates are drawn as those of a model: a head keeps 95% or more of its state a token."""
    layer = MLSTMLayer(XLSTMConfig(vocab_size=16, hidden_size=32, num_layers=1, num_heads=4))
    i, f = layer.gate_preactivations(torch.randn(2, 5, 32))
    assert torch.sigmoid(f).min() > 0.95 and (i < -5).all()
