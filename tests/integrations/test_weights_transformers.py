"""Weights to and from transformers: the same logits, the same tokens, in both its layouts."""

import json
from pathlib import Path

import pytest
import torch
from peers import make, relative, tokens, xLSTMConfig, xLSTMForCausalLM
from safetensors.torch import save_file
from torch import Tensor, nn

from tfla.integrations import load_xlstm, save_xlstm
from tfla.integrations.weights import names_in_checkpoint
from tfla.xlstm import XLSTM, XLSTMConfig

pytestmark = pytest.mark.peers


def same_to_rounding(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Where the normaliser nearly cancels fp32 is off for both: not more for us."""
    assert relative(ours, truth) <= 2 * relative(theirs, truth) < 1e-3
    assert relative(ours, theirs) <= 4 * relative(theirs, truth)


def from_pretrained(folder: Path) -> nn.Module:
    """transformers 5.24 cannot load a fused checkpoint, not even its own: its initialisation of the
    gates, which runs before, fails. Without that step it can."""
    with pytest.MonkeyPatch.context() as patch:
        if xLSTMConfig.from_pretrained(folder).weight_mode == "fused":
            base = xLSTMForCausalLM.__mro__[1]
            patch.setattr(base, "_init_weights", lambda self, module: None)
        model, info = xLSTMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize(("mode", "shard"), [("single", "5GB"), ("fused", "150KB")])
def test_logits_and_greedy_tokens_are_those_of_transformers(
    mode: str, shard: str, tmp_path: Path
) -> None:
    theirs = make(weight_mode=mode)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "150KB")
    ours = load_xlstm(tmp_path)
    x = tokens(2, 70)
    with torch.no_grad():
        same_to_rounding(
            ours(x)[0], theirs(x).logits, load_xlstm(tmp_path, dtype=torch.float64)(x)[0]
        )
    wanted = theirs.generate(x, max_new_tokens=40, do_sample=False)[:, 70:]
    assert wanted.unique().numel() > 10  # not one token over and over
    assert torch.equal(ours.generate(x, 40, temperature=0).tokens, wanted)


def test_they_agree_to_the_last_digits_in_fp64_without_their_eps(tmp_path: Path) -> None:
    """Nothing but rounding and eps separates the two: all dimensions, factors and caps arrive."""
    theirs = make(
        torch.float64,
        eps=0.0,
        num_heads=4,
        hidden_size=192,
        qk_dim_factor=1 / 3,
        v_dim_factor=4 / 3,
        ffn_proj_factor=1.7,
        ffn_round_up_to_multiple_of=128,
        gate_soft_cap=7.0,
        output_logit_soft_cap=11.0,
        norm_eps=1e-3,
        inference_state_dtype="float32",
    )
    # They compute norms and remainders of chunks in fp32 whatever the model is, unless told not to.
    theirs.config.norm_reduction_force_float32 = False
    for module in theirs.modules():
        if hasattr(module, "force_float32_reductions"):
            module.force_float32_reductions = False
    theirs.save_pretrained(tmp_path)
    ours = load_xlstm(tmp_path)
    assert ours.embedding.weight.dtype == torch.float64
    assert (ours.config.K, ours.config.V, ours.config.ffn_dim) == (16, 64, 384)
    x = tokens(2, 128)
    with torch.no_grad():
        hidden = theirs.backbone(x, use_cache=False).last_hidden_state
        assert relative(ours.hidden(x)[0], hidden) < 1e-12
        # They return logits in fp32.
        assert relative(ours(x)[0].float(), theirs(x, use_cache=False).logits) < 1e-6


@pytest.mark.parametrize(
    ("mode", "tie", "max_shard_bytes"),
    [("single", False, 10**9), ("single", True, 200_000), ("fused", False, 200_000)],
)
def test_transformers_loads_what_was_saved(
    mode: str, tie: bool, max_shard_bytes: int, tmp_path: Path
) -> None:
    config = XLSTMConfig(
        vocab_size=97, hidden_size=128, num_layers=2, num_heads=2, tie_embeddings=tie
    )
    ours = XLSTM(config)
    with torch.no_grad():
        for block in ours.blocks:
            block.mlstm.gates.weight.normal_(std=0.3)
            block.mlstm.gates.bias.normal_()
    folder = save_xlstm(ours, tmp_path / "out", weight_mode=mode, max_shard_bytes=max_shard_bytes)
    x = tokens(2, 70)
    theirs = from_pretrained(folder).eval()
    assert theirs.generation_config.eos_token_id is None
    with torch.no_grad():
        same_to_rounding(ours(x)[0], theirs(x).logits, ours.double()(x)[0])


@pytest.mark.parametrize(
    ("width", "layers", "heads"),
    [(768, 12, 4), (1024, 24, 4), (2048, 24, 8), (2560, 32, 8), (4096, 32, 8)],
)
def test_models_of_160M_to_7B_have_the_tensors_of_transformers(
    width: int, layers: int, heads: int
) -> None:
    """Each by name and shape, as the scaling laws' checkpoints have them; nothing is allocated."""
    sizes = {"hidden_size": width, "num_heads": heads, "vocab_size": 50304}
    config = XLSTMConfig(num_layers=layers, ffn_factor=2.667, **sizes)
    with torch.device("meta"):
        theirs = xLSTMForCausalLM(xLSTMConfig(num_hidden_layers=layers, **sizes))
        own = dict(XLSTM(config).named_parameters())
    wanted = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    names = names_in_checkpoint(config)
    assert wanted == {
        name: (rows, *own[key].shape[1:]) for key, parts in names.items() for name, rows in parts
    }
    if width == 4096:
        assert sum(p.numel() for p in own.values()) == 6_865_424_896


def test_a_checkpoint_of_the_scaling_laws_has_the_logits_of_transformers(tmp_path: Path) -> None:
    """As their own loader reads it: config.json becomes an xLSTMConfig, numbered shards its state.

    Source: NX-AI/xlstm_scaling_laws, checkpoint_loading.
    """
    theirs = make()
    fields = {"embedding_dim": 128, "num_blocks": 2, "num_heads": 2, "vocab_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    state = theirs.state_dict()
    for n in range(3):
        part = {name: state[name].clone() for name in sorted(state)[n::3]}
        save_file(part, tmp_path / f"model_{n}.safetensors")
    x = tokens(2, 70)
    with torch.no_grad():
        truth = load_xlstm(tmp_path, dtype=torch.float64)(x)[0]
        same_to_rounding(load_xlstm(tmp_path)(x)[0], theirs(x).logits, truth)


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    make(torch.bfloat16).save_pretrained(tmp_path)
    assert load_xlstm(tmp_path).embedding.weight.dtype == torch.bfloat16
    assert load_xlstm(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32
