"""``tfla.integrations.torchao``: weights in int8. Needs torchao (pip install torchao)."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tfla.integrations import save_xlstm
from tfla.integrations.torchao import quantize_int8
from tfla.xlstm import XLSTM, XLSTMConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others warn about when they are imported is their affair
    pytest.importorskip("torchao.quantization", reason="needs torchao", exc_type=ImportError)

pytestmark = pytest.mark.peers
CONFIG = XLSTMConfig(vocab_size=97, hidden_size=256, num_layers=2, num_heads=4)


def new_model(dtype: torch.dtype = torch.bfloat16, **fields: object) -> XLSTM:
    torch.manual_seed(0)
    model = XLSTM(XLSTMConfig.from_dict({**CONFIG.to_dict(), **fields})).to(dtype).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mlstm.gates.weight.normal_(std=0.05)
            block.mlstm.gates.bias.normal_()
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(5))


def bytes_of(model: nn.Module) -> int:
    """Of the parameters, those in parts counted by their parts."""
    total = 0
    for parameter in model.parameters():
        parts = [parameter]
        if type(parameter) not in (nn.Parameter, Tensor):
            parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_half_the_bytes_and_nearly_the_logits() -> None:
    model = new_model()
    small = quantize_int8(copy.deepcopy(model))
    linear = sum(m.weight.numel() * 2 for m in model.modules() if isinstance(m, nn.Linear))
    assert bytes_of(small) < bytes_of(model) - 0.48 * linear
    x = tokens(2, 60)
    exact = copy.deepcopy(model).double()(x)[0].float()
    # Weights are off by up to 1/254 of the largest of their row, and that is all: activations in
    # bf16 are off by up to 1/256 of themselves, at every layer.
    bf16, int8 = (relative(m(x)[0], exact) for m in (model, small))
    assert bf16 < int8 < 0.1


def test_gates_stay_as_they_are() -> None:
    model = quantize_int8(new_model())
    for block in model.blocks:
        assert type(block.mlstm.gates.weight) is nn.Parameter
        assert type(block.mlstm.qkvo.weight) is not nn.Parameter


@torch.no_grad()
def test_it_generates_what_it_predicts() -> None:
    model = quantize_int8(new_model(torch.float32))
    text = tokens(2, 9)
    out = model.generate(text, 8, temperature=0).tokens
    for n in range(8):
        assert torch.equal(model(text)[0][:, -1].argmax(-1), out[:, n])
        text = torch.cat([text, out[:, n : n + 1]], 1)


def test_a_tied_head_stays_the_embedding() -> None:
    model = quantize_int8(new_model(tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert type(model.head.weight) is nn.Parameter


def test_it_is_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    model = quantize_int8(new_model(hidden_size=128, num_heads=2))
    with pytest.raises(ValueError, match="quantized"):
        save_xlstm(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_patched_model_of_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)
    from peers import make

    from tfla.integrations.transformers import patch

    model = patch(make(pad_token_id=11))
    x = tokens(2, 9)
    with torch.no_grad():
        before = model(x).logits
        small = quantize_int8(model)
        assert 0 < relative(small(x).logits, before) < 0.1
    layer = small.backbone.blocks[0].mlstm_layer
    assert type(layer.igate_preact.weight) is type(layer.fgate_preact.weight) is nn.Parameter
    assert type(layer.q.weight) is not nn.Parameter
    out = small.generate(x, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, small.generate(x, max_new_tokens=6, do_sample=False, use_cache=False))


def test_what_has_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have linear layers; got LayerNorm"):
        quantize_int8(nn.LayerNorm(3))
