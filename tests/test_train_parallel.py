"""A run on several processes is the run of one: losses, weights, checkpoints, and when killed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from train_worker import TRAIN, begin, checks, names, values

from tfla import cli
from tfla.xlstm import checkpoint
from tfla.xlstm.run import resume, start
from tfla.xlstm.train import Placement, read_metrics, train
from tfla.xlstm.writer import load_writer


def numbers(folder: Path) -> list[Any]:
    """Step, loss and bits per byte of all records."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r.get("loss") or r.get("bits_per_byte")) for r in records]


def assert_same_run(one: Path, many: Path, close: float = 2e-5) -> None:
    """To the rounding of fp32, or of bf16."""
    for (step, x), (other, y) in zip(numbers(one), numbers(many), strict=True):
        assert step == other and x == pytest.approx(y, rel=close), step
    a, b = (checkpoint.load(folder) for folder in (one, many))
    assert a.meta["step"] == b.meta["step"] and a.meta["data"] == b.meta["data"]
    for name, x in a.tensors("model").items():
        torch.testing.assert_close(b.tensors("model")[name], x, rtol=1e-3, atol=max(close, 2e-5))
    assert a.tensors("optimizer").keys() == b.tensors("optimizer").keys()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, and some that stopped in the middle."""
    folder = tmp_path_factory.mktemp("runs")
    for name in TRAIN:
        list(train(begin(folder / name, name), Placement("cpu")))
    for world in (2, 4):
        for record in train(start(folder / f"broken-{world}", values("data")), Placement("cpu")):
            if record["step"] == 3 and record["event"] == "save":
                break
        for name in ("listed", "moments"):
            shutil.copytree(folder / f"broken-{world}", folder / f"{name}-{world}")
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_many_processes_train_as_one(single: Path, world: int) -> None:
    outcome = ranks.run("train_worker", world, RUNS=str(single))
    assert outcome.keys() == checks(world).keys()
    assert not ranks.failures(outcome)
    for name in names(world):
        assert_same_run(single / name, single / f"{name}-{world}", 3e-2 if name == "bf16" else 2e-5)
    assert_same_run(single / "data", single / f"broken-{world}")
    assert_same_run(single / "data", single / f"listed-{world}")
    # One process goes on where several stopped, and writes with what they have learnt.
    more = resume(single / f"context-{world}", {"steps": 8})
    assert [r["step"] for r in train(more, Placement("cpu")) if r["event"] == "train"] == [7, 8]
    writer = load_writer(single / f"context-{world}", torch.device("cpu"))
    assert "".join(writer.write(b"def ", 5, temperature=0.0))


# ------------------------------------------------------------------------------- torchrun


def torchrun(out: Path, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    options = values("data") | {"steps": 150, "save_every": 10, "eval_every": 150}
    pairs = [
        (f"--{n.replace('_', '-')}", str(x)) for n, x in options.items() if n not in ("paths",)
    ]
    elastic = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *elastic,
            "-m",
            "tfla",
            "train",
            str(options["paths"][0]),
            "--out",
            str(out),
            *itertools.chain(*pairs),
            *words,
        ],
        env=os.environ | {"TERM": "dumb"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_worker(job: subprocess.Popen[str], out: Path, step: int, rank: int = 1) -> None:
    """kill -9 to a rank once the job has a checkpoint of that step."""
    until = time.monotonic() + 900
    while not (checkpoint.exists(out) and checkpoint.load(out).meta["step"] >= step):
        assert job.poll() is None and time.monotonic() < until, job.communicate()[0]
        time.sleep(0.1)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks_of = {}
    for pid in workers:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks_of |= {x: int(pid) for x in environment if x.startswith(b"RANK=")}
    os.kill(ranks_of[f"RANK={rank}".encode()], signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
def test_a_killed_worker_ends_the_job_and_a_restart_goes_on(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = values("data") | {"steps": 150, "save_every": 150, "eval_every": 150}
    list(train(start(whole, options), Placement("cpu")))

    job = torchrun(out)
    kill_worker(job, out, 10)
    said = job.communicate(timeout=900)[0]
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert sum(line.startswith("tfla: ") for line in said.splitlines()) <= 1, said

    job = torchrun(out, "--resume", restarts=1)
    kill_worker(job, out, checkpoint.load(out).meta["step"] + 10)
    said = job.communicate(timeout=900)[0]
    assert job.returncode == 0, said
    assert numbers(out)[-1] == pytest.approx(numbers(whole)[-1], rel=1e-3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
def test_another_rank_says_that_rank_0_was_killed(tmp_path: Path) -> None:
    job = torchrun(tmp_path / "out")
    kill_worker(job, tmp_path / "out", 10, rank=0)
    said = job.communicate(timeout=900)[0]
    assert job.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("tfla: ")]
    assert len(lines) == 1 and "a process of this run has ended" in lines[0], said
    assert "--resume" in lines[0] and "tfla/xlstm" not in said
    assert checkpoint.load(tmp_path / "out").meta["step"] >= 10


@pytest.mark.skipif(sys.platform == "win32", reason="runs a shell")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--context-ranks $((RANK+1))", "--context-ranks is 1 on rank 0 and 2 on rank 1"),
        pytest.param(
            "--lr 0.00$((RANK+1))",
            "--lr is 0.001 on rank 0 and 0.002 on rank 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "$([ $RANK = 1 ] && echo --recompute)",
            "--recompute is False on rank 0 and True on",
            marks=pytest.mark.slow,
        ),
        ("--threads $((1-RANK))", "rank 1: --threads is 0"),
    ],
)
def test_ranks_with_other_options_end_in_one_line(words: str, said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = f"{sys.executable} -m tfla train --device cpu --out {out} {words}"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *elastic, "--no-python", "bash", "-c", line],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"TERM": "dumb"},
    )
    # One that waits for another is given up after 600 s.
    assert done.returncode != 0 and time.monotonic() - began < 500
    lines = [line for line in done.stdout.splitlines() if line.startswith("tfla: ")]
    assert len(lines) == 1 and said in lines[0], done.stdout
    assert "tfla/xlstm" not in done.stdout  # no traceback through ours
    assert not out.exists()


def test_the_benchmark_runs_in_pieces_at_a_tiny_size(root: Path, tmp_path: Path) -> None:
    """A later run adds its pieces to what an earlier one left."""
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(root / "benchmarks" / "scale.py"), "--tiny", "--out", str(tmp_path)]
    for pieces in ("exchange,agreement,functions,weak", "context,long,checkpoint"):
        command = [sys.executable, *elastic, *words, "--pieces", pieces]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert not [row for row in rows if "reason" in row]
    assert {"exchange", "train", "train, sharded", "1 x 128 over 2"} < {row["name"] for row in rows}
    assert list(dict.fromkeys(row["piece"] for row in rows)) == [
        *("exchange", "agreement", "functions", "weak", "context", "long", "checkpoint")
    ]
    assert all("model" in row for row in rows if "of_one_gpu_times_n" in row)
    assert rows[-1]["write_s"] > 0 and not (tmp_path / "checkpoint").exists()


def test_what_needs_torchrun_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.run_command([*words, "--context-ranks", "2"]) == 2
    assert "--context-ranks is for torchrun" in capsys.readouterr().err
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert cli.run_command(words) == 2
    said = capsys.readouterr().err
    assert "do not find each other" in said and "WORLD_SIZE" in said and said.count("\n") == 1
