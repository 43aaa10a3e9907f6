"""A run on several processes is the run of one: losses, weights, checkpoints, and when killed."""

import itertools
import os
import signal
import subprocess
import sys
import time
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


# ------------------------------------------------------------------------------- torchrun


def torchrun(out: Path, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    options = values("data") | {"steps": 400, "save_every": 20, "eval_every": 400}
    pairs = [
        (f"--{n.replace('_', '-')}", str(x)) for n, x in options.items() if n not in ("paths",)
    ]
    elastic = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", *elastic, "-m", "tfla", "train",
            str(options["paths"][0]), "--out", str(out), *itertools.chain(*pairs), *words,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def kill_worker(job: subprocess.Popen[str], out: Path, step: int) -> None:
    """kill -9 to rank 1 once the job has a checkpoint of that step."""
    until = time.monotonic() + 60
    while not (checkpoint.exists(out) and checkpoint.load(out).meta["step"] >= step):
        assert job.poll() is None and time.monotonic() < until, job.communicate()[0]
        time.sleep(0.1)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks_of = {}
    for pid in workers:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks_of |= {x: int(pid) for x in environment if x.startswith(b"RANK=")}
    os.kill(ranks_of[b"RANK=1"], signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
def test_a_killed_worker_ends_the_job_and_a_restart_goes_on(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = values("data") | {"steps": 400, "save_every": 400, "eval_every": 400}
    list(train(start(whole, options), Placement("cpu")))

    job = torchrun(out)
    kill_worker(job, out, 20)
    said = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert sum(line.startswith("tfla: ") for line in said.splitlines()) <= 1, said

    job = torchrun(out, "--resume", restarts=1)
    kill_worker(job, out, checkpoint.load(out).meta["step"] + 20)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 0, said
    assert numbers(out)[-1] == pytest.approx(numbers(whole)[-1], rel=1e-3)


def test_numbers_that_do_not_fit_are_said_once(tmp_path: Path) -> None:
    job = torchrun(tmp_path, "--context-ranks", "3")
    said = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert said.count("--context-ranks is 3, wanted a divisor of 2 ranks") == 1
