"""A run that begins with the weights of another: what it has from it, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from tfla.errors import RunError
from tfla.integrations import save_xlstm
from tfla.integrations.text import export_run
from tfla.xlstm import load
from tfla.xlstm.run import resume, start
from tfla.xlstm.train import Placement, train
from tfla.xlstm.writer import load_writer, read_base

MODEL = {"hidden_size": 128, "num_layers": 1, "num_heads": 2}
TRAINING = {"context": 16, "batch": 2, "eval_bytes": 500, "paths": [Path(json.__file__).parent]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    list(train(start(folder, MODEL | TRAINING | {"steps": 3}), Placement("cpu")))
    return folder


@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder"])
def test_a_run_begins_with_the_weights_of_another(kind: str, first: Path, tmp_path: Path) -> None:
    source = {"run": first, "checkpoint": first / "checkpoints/step-00000003"}.get(kind)
    if source is None:
        writer = load_writer(first)
        source = export_run(writer.model, writer.codec, tmp_path / "exported")
    out = tmp_path / "out"
    run = start(out, TRAINING | {"steps": 2, "lr": 1e-4}, None, read_base(source))
    list(train(run, Placement("cpu")))
    begun = load(out / "checkpoints/step-00000000")
    assert all(
        torch.equal(a, b) for a, b in zip(begun.parameters(), load(first).parameters(), strict=True)
    )
    assert not torch.equal(load(out).head.weight, begun.head.weight)
    more = resume(out, {"steps": 4, "init": source})
    assert [r["step"] for r in train(more, Placement("cpu")) if r["event"] == "train"] == [4]
    with pytest.raises(RunError, match="--init is not what the run"):
        resume(out, {"init": tmp_path})
    # It can be written with, and begun with, in its turn.
    assert "".join(load_writer(out).write(b"def ", 9, seed=1))
    assert read_base(out).config == read_base(first).config


def test_another_shape_or_tokenizer_is_refused(first: Path, tmp_path: Path) -> None:
    base = read_base(first)
    (tmp_path / "t.json").write_text("{}")
    for name, value in (("hidden_size", 64), ("tokenizer", tmp_path / "t.json")):
        with pytest.raises(RunError, match=f"--{name.replace('_', '-')} is not what .* has"):
            start(tmp_path / "x", TRAINING | {"steps": 1, name: value}, None, base)
    assert not (tmp_path / "x").exists()


def test_a_folder_in_which_nothing_ends_a_document_is_refused(first: Path, tmp_path: Path) -> None:
    writer = load_writer(first)
    folder = export_run(writer.model, writer.codec, tmp_path / "a")
    source = (folder / "tokenizer.json").read_text()
    save_xlstm(writer.model, tmp_path / "b", texts={"tokenizer.json": source})
    with pytest.raises(RunError, match="names no eos_token_id"):
        read_base(tmp_path / "b")
    with pytest.raises(RunError, match="no id that begins a text"):
        load_writer(tmp_path / "b").write(b"", 3)


def test_a_model_with_more_rows_than_its_tokenizer(first: Path, tmp_path: Path) -> None:
    """As many models of others have, whose number of rows is a round one."""
    writer = load_writer(first)
    config = writer.model.config
    wide = type(writer.model)(type(config)(**config.to_dict() | {"vocab_size": 320}))
    source = export_run(writer.model, writer.codec, tmp_path / "a") / "tokenizer.json"
    fields = {"eos_token_id": 256, "bos_token_id": 256}
    texts = {"tokenizer.json": source.read_text()}
    save_xlstm(wide, tmp_path / "wide", fields=fields, texts=texts)
    out = tmp_path / "out"
    options = TRAINING | {"steps": 1}
    list(train(start(out, options, None, read_base(tmp_path / "wide")), Placement("cpu")))
    assert load(out).config.vocab_size == 320
    assert "".join(load_writer(out).write(b"x", 9, seed=1))
    assert resume(out, {"steps": 2}).corpus.codec.end == 256
