"""The attention of tfla bench language: causal, of relative positions, and its formula."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from xlstm_models import close

from tfla.bench.attention import BASE, CausalAttention, rotated
from tfla.xlstm import XLSTM, MLSTMLayer, XLSTMConfig

CONFIG = XLSTMConfig(vocab_size=23, hidden_size=24, num_layers=2, num_heads=2)


def model_of(num_heads: int = 3) -> XLSTM:
    return XLSTM(CONFIG, partial(CausalAttention, num_heads=num_heads)).double()


def test_only_the_mixer_of_the_model_differs() -> None:
    ours, other = dict(XLSTM(CONFIG).named_parameters()), dict(model_of().named_parameters())
    mixers = {"mlstm.qkv.weight", "mlstm.out.weight"}
    for name in other:
        part = name.partition("mlstm.")
        assert "".join(part[1:]) in mixers or other[name].shape == ours[name].shape
    same = {name for name in ours if ".mlstm." not in name}
    assert same == {name for name in other if ".mlstm." not in name}
    assert all(isinstance(block.mlstm, MLSTMLayer) for block in XLSTM(CONFIG).blocks)


def test_what_writes_to_the_residual_stream_starts_alike() -> None:
    wide = XLSTMConfig(vocab_size=5, hidden_size=256, num_layers=8, num_heads=2)
    block = XLSTM(wide, partial(CausalAttention, num_heads=4)).blocks[0]
    assert block.mlstm.out.weight.std().item() == pytest.approx(2 / (8 * 16), rel=0.05)
    assert block.mlstm.qkv.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 256)), rel=0.05)


def test_a_token_does_not_see_later_ones() -> None:
    model, tokens = model_of(), torch.randint(23, (2, 11))
    before, _ = model(tokens)
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % 23
    after, _ = model(other)
    assert torch.equal(before[:, :7], after[:, :7])
    changed = (before[:, 7:] - after[:, 7:]).abs().amax(-1)
    assert (changed > 0).all()  # and each that follows sees it


def test_a_rotation_keeps_lengths_and_turns_nothing_at_the_first_position() -> None:
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    close(rotated(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated(x)[:, 0], x[:, 0])
    assert not torch.allclose(rotated(x)[:, 1], x[:, 1])


@pytest.mark.parametrize("shift", [1, 5, 1000])
def test_products_depend_on_the_distance_alone(shift: int) -> None:
    q, k = torch.randn(2, 1, 7, 2, 8, dtype=torch.float64)

    def scores(first: int) -> Tensor:
        return torch.einsum("bthd,buhd->bhtu", rotated(q, first), rotated(k, first))

    close(scores(0), scores(shift))
    # Where the keys alone are shifted the distances are others.
    moved = torch.einsum("bthd,buhd->bhtu", rotated(q), rotated(k, shift))
    assert (moved - scores(0)).abs().max() > 0.1


def test_the_layer_is_its_formula() -> None:
    """Head by head and token by token, the rotation as a product of complex numbers."""
    layer = CausalAttention(CONFIG, 3).double()
    x = torch.randn(10, 24, dtype=torch.float64)
    q, k, v = (layer.qkv.weight @ x.T).T.split(24, -1)
    D = 8
    turns = torch.tensor([BASE ** (-2 * j / D) for j in range(D // 2)], dtype=torch.float64)

    def turned(y: Tensor, t: int) -> Tensor:
        return torch.complex(y[: D // 2], y[D // 2 :]) * torch.exp(1j * t * turns)

    heads = []
    for head in range(3):
        at = slice(head * D, (head + 1) * D)
        rows = []
        for t in range(len(x)):
            products = [
                (turned(q[t, at], t) * turned(k[u, at], u).conj()).real.sum() for u in range(t + 1)
            ]
            weights = (torch.stack(products) / math.sqrt(D)).softmax(0)
            rows.append(weights @ v[: t + 1, at])
        heads.append(torch.stack(rows))
    close(layer(x[None])[0][0], torch.cat(heads, -1) @ layer.out.weight.T)


def test_in_16_bits_it_answers_in_16_bits() -> None:
    layer = CausalAttention(CONFIG, 3).bfloat16()
    x = torch.randn(1, 10, 24)
    exact, _ = CausalAttention.forward(layer.float(), x)
    found, _ = layer.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("num_heads", [0, 5, 8])  # 8 heads would have 3 channels each
def test_heads_that_do_not_fit_are_refused(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads = {num_heads}"):
        CausalAttention(CONFIG, num_heads)


def test_states_are_refused() -> None:
    model, tokens = model_of(), torch.randint(23, (1, 5))
    with pytest.raises(ValueError, match="without states"):
        model(tokens, output_state=True)
    with pytest.raises(ValueError, match="without states"):
        model.step(tokens[:, 0], model.init_state(1))
    with pytest.raises(ValueError, match="not packed"):
        model(tokens, cu_seqlens=torch.tensor([0, 2, 5]))
