"""Modules are called: what others hang on a Linear acts, in training, reading and single steps."""

import copy
from collections.abc import Callable

import pytest
import torch
import xlstm_models
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from xlstm_models import SMALL, draw

import tfla.nn
from tfla.linear import PreciseLinear, is_plain
from tfla.xlstm import XLSTM

LINEARS = ["mlstm.qkvo", "mlstm.gates", "mlstm.out", "ffn.up", "ffn.down"]


class LowRank(nn.Module):
    """What adapters do: a module in the place of another, which it calls."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.T) @ self.up.T


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replaced(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, child, LowRank(getattr(module, child)))


def hooked(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, y: y * 0.5 + 0.1)


def hooked_before(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def pruned(model: nn.Module, name: str) -> None:
    prune.random_unstructured(model.get_submodule(name), "weight", 0.5)


def parametrized(model: nn.Module, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())


def overridden(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    before = module.forward
    module.forward = lambda x: before(x) * 0.5 + 0.1  # type: ignore[method-assign]


CHANGES = [replaced, hooked, hooked_before, pruned, parametrized, overridden]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("linear", LINEARS)
def test_changes_of_a_linear_act_on_every_way(
    linear: str, change: Callable[[nn.Module, str], None]
) -> None:
    """The whole sequence, pieces of it and single tokens agree with each other, and not with the
    model as it was."""
    model, tokens = xlstm_models.make(SMALL), draw(2, 9)
    before = model(tokens)[0].detach()
    change(model, f"blocks.0.{linear}")
    logits, _ = model(tokens)
    assert (logits - before).abs().max() > 1e-3
    with torch.no_grad():
        piece, state = model(tokens[:, :6], output_state=True)
        xlstm_models.close(piece, logits[:, :6].detach())
        for t in range(6, 9):
            one, state = model.step(tokens[:, t], state)
            xlstm_models.close(one, logits[:, t].detach())
        out = model.generate(tokens, 3, temperature=0).tokens
        for n in range(3):
            longer = torch.cat([tokens, out[:, :n]], 1)
            assert torch.equal(model(longer)[0][:, -1].argmax(-1), out[:, n])
    names = [n for n, p in model.named_parameters() if f"blocks.0.{linear}." in n and p.dim() == 2]
    grads = torch.autograd.grad(logits.sum(), [model.get_parameter(n) for n in names])
    assert names and all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("linear", ["qkvo", "gates", "proj"])
def test_changes_of_a_linear_act_in_layers(
    linear: str, change: Callable[[nn.Module, str], None]
) -> None:
    layer, x = (
        tfla.nn.MLSTM(6, 8, proj_size=4, num_heads=2, batch_first=True).double(),
        torch.randn(2, 9, 6).double(),
    )
    nn.init.normal_(layer.layers[0].gates.weight)
    before = layer(x)[0]
    change(layer, f"layers.0.{linear}")
    y, _ = layer(x)
    assert (y - before).abs().max() > 1e-3
    with torch.no_grad():
        first, state = layer(x[:, :8])
        last, _ = layer(x[:, 8:], state)  # the decode step
    torch.testing.assert_close(torch.cat([first, last], 1), y.detach())


@pytest.mark.parametrize("targets", [["gates"], ["gates", "qkvo", "down"], ["head"]])
def test_lora_of_peft_moves_learns_and_merges(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = xlstm_models.make(SMALL, torch.float32), draw(2, 9)
    before = model(tokens)[0].detach()
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    logits, _ = adapted.base_model.model(tokens)
    assert (logits - before).abs().max() > 1e-2
    logits.sum().backward()
    lora = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    assert lora and all(g is not None and g.abs().max() > 0 for g in lora.values())
    merged = adapted.merge_and_unload()
    assert isinstance(merged, XLSTM) and merged.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(merged(tokens)[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
def test_dynamic_quantisation_leaves_a_model_that_computes() -> None:
    model, tokens = XLSTM(SMALL), draw(2, 9)  # gates as they begin: 8 bits are a few percent
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(small.blocks[0].mlstm.qkvo) is not nn.Linear
    with torch.no_grad():
        logits, right = small(tokens)[0], model(tokens)[0]
        assert not torch.equal(logits, right)
        assert (logits - right).norm() < 0.1 * right.norm()
        assert small.generate(tokens, 3, temperature=0).tokens.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gates_are_fp32_whatever_the_model_is(dtype: torch.dtype, autocast: bool) -> None:
    layer = PreciseLinear(48, 4).to(dtype)
    x = torch.randn(3, 48, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_may_read_plain_modules_only() -> None:
    """What decides on a GPU whether a fused kernel takes the weight in place of the module."""
    assert is_plain(PreciseLinear(3, 4), PreciseLinear)
    assert is_plain(nn.RMSNorm(3), nn.RMSNorm)
    for change in CHANGES:
        model = nn.Sequential(PreciseLinear(3, 4))
        change(model, "0")
        assert not is_plain(model[0], PreciseLinear), change
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    try:
        assert not is_plain(PreciseLinear(3, 4), PreciseLinear)
    finally:
        everywhere.remove()
    layer = PreciseLinear(3, 4)
    prune.random_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    assert is_plain(layer, PreciseLinear)


def test_names_of_weights_are_those_of_plain_linears() -> None:
    names = xlstm_models.make(SMALL).blocks[0].mlstm.state_dict().keys()
    assert set(names) == {"qkvo.weight", "gates.weight", "gates.bias", "norm_weight", "out.weight"}
