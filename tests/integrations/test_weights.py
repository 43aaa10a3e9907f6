"""xLSTM checkpoints in transformers' format: what is read back, and every refusal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from tfla.integrations import load_xlstm, save_xlstm
from tfla.xlstm import XLSTM, XLSTMConfig

CONFIG = XLSTMConfig(vocab_size=50, hidden_size=128, num_layers=2, num_heads=2)
Q1 = "backbone.blocks.1.mlstm_layer.q.weight"


def saved(folder: Path, **options: object) -> XLSTM:
    model = XLSTM(CONFIG)
    save_xlstm(model, folder, **options)
    return model


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("mode", ["single", "fused"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
@pytest.mark.parametrize("tie", [False, True])
def test_what_is_saved_comes_back(
    mode: str, max_shard_bytes: int, tie: bool, tmp_path: Path
) -> None:
    fields = {**CONFIG.to_dict(), "tie_embeddings": tie, "gate_soft_cap": 9.0, "norm_eps": 1e-5}
    model = XLSTM(XLSTMConfig.from_dict(fields))
    folder = save_xlstm(model, tmp_path / "a/b", weight_mode=mode, max_shard_bytes=max_shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 5) == (max_shard_bytes < 10**9)
    again = load_xlstm(folder)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert all(p.requires_grad for p in again.parameters())
    assert (again.head.weight is again.embedding.weight) == tie


@pytest.mark.parametrize(
    ("hidden", "qk", "v"), [(704, 7 / 11, 5 / 11), (192, 1 / 3, 4 / 3), (4096, 0.5, 1.0)]
)
def test_factors_survive_being_cut_to_whole_widths(hidden: int, qk: float, v: float) -> None:
    """transformers takes int(hidden_size * factor), one less when the product rounds down."""
    from tfla.integrations.weights import _config, _describe

    config = XLSTMConfig(
        vocab_size=5,
        hidden_size=hidden,
        num_layers=1,
        num_heads=4,
        qk_dim_factor=qk,
        v_dim_factor=v,
    )
    body = _describe(config, "single", torch.float32)
    assert int(hidden * body["qk_dim_factor"]) == config.qk_dim
    assert int(hidden * body["v_dim_factor"]) == config.v_dim
    again = _config(Path("config.json"), body)
    assert (again.qk_dim, again.v_dim, again.ffn_dim) == (
        config.qk_dim,
        config.v_dim,
        config.ffn_dim,
    )


def test_fields_left_out_have_the_values_of_transformers() -> None:
    """config.json of the published 7B model states little; it describes our 7B configuration."""
    from tfla.integrations.weights import _config

    small = {"model_type": "xlstm", "embedding_dim": 4096, "num_blocks": 32}
    config = _config(Path("config.json"), small)
    assert config.ffn_dim == XLSTMConfig.xlstm_7b().ffn_dim == 10944
    assert config.num_parameters() == 6_865_424_896


def test_a_checkpoint_without_a_head_is_tied(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    edit(tmp_path / "m/config.json", tie_word_embeddings=True)
    rewrite(tmp_path / "m/model.safetensors", lambda t: t.pop("lm_head.weight"))
    model = load_xlstm(tmp_path / "m")
    assert model.config.tie_embeddings and model.head.weight is model.embedding.weight


def test_a_head_of_its_own_is_used_whatever_the_configuration_says(tmp_path: Path) -> None:
    """As transformers does."""
    model = saved(tmp_path / "m")
    edit(tmp_path / "m/config.json", tie_word_embeddings=True)
    again = load_xlstm(tmp_path / "m")
    assert not again.config.tie_embeddings
    assert torch.equal(again.head.weight, model.head.weight)


def test_dtype_is_that_of_the_file_or_the_one_asked_for(tmp_path: Path) -> None:
    save_xlstm(XLSTM(CONFIG).bfloat16(), tmp_path / "m")
    assert {p.dtype for p in load_xlstm(tmp_path / "m").parameters()} == {torch.bfloat16}
    wide = load_xlstm(tmp_path / "m", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    edit(tmp_path / "m/config.json", dtype=None)
    assert load_xlstm(tmp_path / "m").embedding.weight.dtype == torch.bfloat16


SCALING = {
    "embedding_dim": 128,
    "num_heads": 2,
    "num_blocks": 2,
    "vocab_size": 50,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "ffn_proj_factor": 2.667,
    "mode": "train",
    "chunkwise_kernel": "chunkwise--triton_xl_chunk",
    "weight_mode": "single",
}


def scaling_law_folder(folder: Path, embedding: str, shards: int) -> XLSTM:
    """Random weights as the checkpoints of the scaling laws lie on disk: xlstm_large's config.json,
    shards that are numbered, no index."""
    model = saved(folder, fields={"bos_token_id": 0})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors[embedding] = tensors.pop("backbone.embeddings.weight")
    (folder / "config.json").write_text(json.dumps(SCALING))
    for n in range(shards):
        part = {name: tensors[name] for name in sorted(tensors)[n::shards]}
        save_file(part, folder / (f"model_{n}.safetensors" if shards > 1 else "model.safetensors"))
    return model


@pytest.mark.parametrize("embedding", ["backbone.embeddings.weight", "embedding.weight"])
@pytest.mark.parametrize("shards", [1, 12])
def test_a_checkpoint_of_the_scaling_laws_is_read(
    embedding: str, shards: int, tmp_path: Path
) -> None:
    model = scaling_law_folder(tmp_path / "a", embedding, shards)
    again = load_xlstm(tmp_path / "a")
    assert again.config == model.config
    assert all(torch.equal(a, model.get_parameter(n)) for n, a in again.named_parameters())
    # ... and becomes one that transformers reads.
    save_xlstm(again, tmp_path / "b")
    body = json.loads((tmp_path / "b/config.json").read_text())
    assert (body["model_type"], body["hidden_size"]) == ("xlstm", 128)
    assert "backbone.embeddings.weight" in load_file(tmp_path / "b/model.safetensors")


def test_a_numbered_shard_that_is_missing_or_repeats_another_is_named(tmp_path: Path) -> None:
    scaling_law_folder(tmp_path, "embedding.weight", 3)
    (tmp_path / "model_1.safetensors").rename(tmp_path / "model_3.safetensors")
    refused(tmp_path, "model_1.safetensors is missing", error=FileNotFoundError)
    (tmp_path / "model_1.safetensors").write_bytes((tmp_path / "model_0.safetensors").read_bytes())
    refused(tmp_path, str(tmp_path / "model_1.safetensors"), "so does")


def test_two_embeddings_are_one_too_many(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    rewrite(file, lambda t: t.update({"embedding.weight": torch.zeros(50, 128)}))
    refused(tmp_path / "m", str(file), "embedding.weight")


def test_token_ids_are_those_given(tmp_path: Path) -> None:
    saved(tmp_path / "m", fields={"eos_token_id": 7})
    body = json.loads((tmp_path / "m/config.json").read_text())
    assert (body["eos_token_id"], body["bos_token_id"]) == (7, None)


# ------------------------------------------------------------------------------- damaged files


def refused(folder: Path, *said: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as caught:
        load_xlstm(folder)
    assert not [text for text in said if text not in str(caught.value)], str(caught.value)


def test_a_truncated_file_is_named_with_its_first_torn_tensor(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    whole = file.read_bytes()
    offsets = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    start, end = offsets[Q1]["data_offsets"]
    head = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[: head + (start + end) // 2])
    refused(tmp_path / "m", str(file), Q1, "truncated")
    file.write_bytes(whole[: head - 5])
    refused(tmp_path / "m", str(file), "truncated")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path / "m", str(file), "something else")
    file.write_bytes(b"")
    refused(tmp_path / "m", str(file))


def test_a_missing_shard_is_named_with_a_tensor_it_should_hold(tmp_path: Path) -> None:
    saved(tmp_path / "m", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())["weight_map"]
    file = tmp_path / "m" / index[Q1]
    held = [name for name in index if index[name] == index[Q1]]
    file.unlink()
    refused(tmp_path / "m", str(file), held[0], error=FileNotFoundError)


def test_a_shard_that_lacks_what_the_index_promises(tmp_path: Path) -> None:
    saved(tmp_path / "m", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())["weight_map"]
    file = tmp_path / "m" / index[Q1]
    rewrite(file, lambda t: (t.pop(Q1), t.update(other=torch.zeros(1))))
    refused(tmp_path / "m", str(file), Q1)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "m", max_shard_bytes=100_000)
    file = tmp_path / "m/model.safetensors.index.json"
    body = json.loads(file.read_text())
    body["weight_map"][Q1] = "../elsewhere.safetensors"
    file.write_text(json.dumps(body))
    refused(tmp_path / "m", str(file), Q1, "same folder")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q1), "lacks"),
        (lambda t: t.update({Q1: t[Q1][:-1].clone()}), "(63, 128)"),
        (lambda t: t.update({Q1: t[Q1].T.contiguous()}), "(128, 64)"),
        (lambda t: t.update({Q1: t[Q1].to(torch.int8)}), "I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[dict], object], said: str, tmp_path: Path
) -> None:
    saved(tmp_path / "m")
    rewrite(tmp_path / "m/model.safetensors", change)
    refused(tmp_path / "m", str(tmp_path / "m/model.safetensors"), Q1, said)


def test_a_tensor_that_is_left_over_is_named(tmp_path: Path) -> None:
    """Leaving out a bias, say, would change the function in silence."""
    saved(tmp_path / "m")
    name = "backbone.blocks.0.mlstm_layer.q.bias"
    rewrite(tmp_path / "m/model.safetensors", lambda t: t.update({name: torch.zeros(64)}))
    refused(tmp_path / "m", str(tmp_path / "m/model.safetensors"), name)


def test_a_folder_without_weights_or_with_pickles_only(tmp_path: Path) -> None:
    refused(tmp_path / "none", str(tmp_path / "none"), error=FileNotFoundError)
    refused(tmp_path, str(tmp_path / "config.json"), error=FileNotFoundError)
    saved(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/pytorch_model.bin")
    refused(tmp_path / "m", "only safetensors", error=FileNotFoundError)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "None"),
        ({"architectures": ["xLSTMModel"]}, "'xLSTMModel'"),
        ({"use_bias": True}, "use_bias"),
        ({"chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}, "siging"),
        ({"weight_mode": "other"}, "'other'"),
        ({"num_blocks": 3}, "num_hidden_layers 2 but num_blocks 3"),
        ({"hidden_size": "128", "embedding_dim": None}, "'128'"),
        ({"num_heads": 3}, "num_heads"),
        ({"gate_soft_cap": -1}, "gate_soft_cap"),
        ({"ffn_round_up_to_multiple_of": 0}, "config.json"),
        ({"ffn_round_up_to_multiple_of": 50}, "350"),
    ],
)
def test_a_configuration_that_is_not_ours_is_named(
    fields: dict[str, object], said: str, tmp_path: Path
) -> None:
    saved(tmp_path / "m")
    edit(tmp_path / "m/config.json", **fields)
    refused(tmp_path / "m", str(tmp_path / "m/config.json"), said)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_configuration_is_named(text: str, tmp_path: Path) -> None:
    saved(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(text)
    refused(tmp_path / "m", str(tmp_path / "m/config.json"))


# ------------------------------------------------------------------------------- what is not saved


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({"input_gate": "sigmoid"}, {}, "sigmoid"),
        ({"hidden_size": 64}, {}, "qk_dim_factor is 32"),
        ({}, {"weight_mode": "both"}, "'both'"),
        ({}, {"fields": {"hidden_size": 5}}, "hidden_size"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(
    fields: dict[str, object], options: dict[str, object], said: str, tmp_path: Path
) -> None:
    model = XLSTM(XLSTMConfig.from_dict({**CONFIG.to_dict(), **fields}))
    with pytest.raises(ValueError, match=said):
        save_xlstm(model, tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/precious").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        saved(tmp_path / "m")
    assert (tmp_path / "m/precious").read_text() == "x"


@pytest.mark.parametrize("module", ["blocks.1.mlstm.gates", "head"])
def test_weights_that_lie_elsewhere_are_not_left_out(module: str, tmp_path: Path) -> None:
    """A pruned or adapted model is not what its parameters say."""
    model = XLSTM(CONFIG)
    prune.random_unstructured(model.get_submodule(module), "weight", 0.5)
    with pytest.raises(ValueError, match=rf"model must hold {module}.weight .*prune.remove"):
        save_xlstm(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    prune.remove(model.get_submodule(module), "weight")
    again = load_xlstm(save_xlstm(model, tmp_path / "x"))
    tokens = torch.randint(50, (1, 9))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
