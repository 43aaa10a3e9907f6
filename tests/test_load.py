"""`tfla.xlstm.load`: a run, a checkpoint and a folder in transformers' format give one model."""

import json
from pathlib import Path

import pytest
import torch

from tfla.errors import RunError
from tfla.integrations import save_xlstm
from tfla.xlstm import checkpoint, load
from tfla.xlstm.run import start
from tfla.xlstm.train import Placement, train

SMALL = {"hidden_size": 128, "num_layers": 2, "num_heads": 2, "context": 16, "batch": 2}
SMALL |= {"steps": 2}


def test_load_reads_a_run_a_checkpoint_and_a_folder_of_transformers(tmp_path: Path) -> None:
    paths = [Path(json.__file__).parent]
    list(train(start(tmp_path / "run", SMALL | {"paths": paths}), Placement("cpu")))
    model = load(tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run")
    weights = saved.tensors("model")
    assert not model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    save_xlstm(model, tmp_path / "theirs")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        want = model(tokens)[0]
        for path in (str(tmp_path / "run"), saved.path, str(tmp_path / "theirs")):
            assert torch.equal(load(path)(tokens)[0], want)
    low = load(tmp_path / "run", "cpu", torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    first = load(tmp_path / "run" / "checkpoints" / "step-00000000")
    assert not torch.equal(first.embedding.weight, model.embedding.weight)


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere does not exist"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="holds no checkpoint"):
        load(tmp_path)
    with pytest.raises(TypeError, match="dtype must be a floating"):
        load(tmp_path, dtype=torch.int64)
