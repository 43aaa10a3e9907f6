"""A run on several processes is the run of one: losses, weights, checkpoints, and when killed."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from train_worker import CHECKS, TRAIN, values

from tfla.xlstm import checkpoint
from tfla.xlstm.run import resume, start
from tfla.xlstm.train import Placement, read_metrics, train
from tfla.xlstm.writer import load_writer


def numbers(folder: Path) -> list[Any]:
    """Step, loss and bits per byte of all records."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r.get("loss") or r.get("bits_per_byte")) for r in records]


def assert_same_run(one: Path, many: Path) -> None:
    """To the rounding of fp32."""
    for (step, x), (other, y) in zip(numbers(one), numbers(many), strict=True):
        assert step == other and x == pytest.approx(y, rel=2e-5), step
    a, b = (checkpoint.load(folder) for folder in (one, many))
    assert a.meta["step"] == b.meta["step"] and a.meta["data"] == b.meta["data"]
    for name, x in a.tensors("model").items():
        torch.testing.assert_close(b.tensors("model")[name], x, rtol=1e-3, atol=2e-5)
    assert a.tensors("optimizer").keys() == b.tensors("optimizer").keys()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, and some that stopped in the middle."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for name in TRAIN:
        list(train(start(folder / name, values(name)), Placement("cpu")))
    for world in (2, 4):
        for record in train(start(folder / f"broken-{world}", values("data")), Placement("cpu")):
            if record["step"] == 3 and record["event"] == "save":
                break
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_many_processes_train_as_one(single: Path, world: int) -> None:
    outcome = ranks.run("train_worker", world, RUNS=str(single))
    assert outcome.keys() == CHECKS.keys()
    assert not ranks.failures(outcome)
    for name in TRAIN:
        assert_same_run(single / name, single / f"{name}-{world}")
    assert_same_run(single / "data", single / f"broken-{world}")
    # One process goes on where several stopped, and writes with what they have learnt.
    more = resume(single / f"data-{world}", {"steps": 8})
    assert [r["step"] for r in train(more, Placement("cpu")) if r["event"] == "train"] == [7, 8]
    assert "".join(load_writer(single / f"data-{world}", "cpu").write(b"def ", 5, temperature=0.0))
