"""A run that is told to end saves a checkpoint first, and leaves with the status of the signal."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tfla import signals
from tfla.signals import Interrupted, Signals, exit_status
from tfla.xlstm import checkpoint
from tfla.xlstm.train import read_metrics

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")

# So few checkpoints and evaluations that only the signal writes one.
RARE = {
    "--hidden-size": 16, "--num-layers": 1, "--context": 16, "--batch": 2, "--threads": 1,
    "--steps": 10**9, "--save-every": 10**9, "--eval-every": 10**9, "--log-every": 1,
    "--device": "cpu", "--eval-bytes": 500,
}  # fmt: skip
ENDS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """A suite in the background of a shell, or under nohup, ignores some signals, and so would the
    runs that it starts."""
    ignored = [number for number in ENDS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, own)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def begin(out: Path, *before: str, more: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    text = str(Path(json.__file__).parent)
    pairs = [(name, str(value)) for name, value in RARE.items()]
    words = ["-m", "tfla", "train", text, "--out", str(out), *itertools.chain(*pairs), *more]
    return subprocess.Popen(
        [sys.executable, *before, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_step(job: "subprocess.Popen[str]", out: Path) -> None:
    until = time.monotonic() + 600
    while not read_metrics(out / "metrics.jsonl"):
        assert job.poll() is None and time.monotonic() < until, job.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_saves_once_and_gives_its_status(number: signal.Signals, tmp_path: Path) -> None:
    job = begin(tmp_path)
    wait_for_step(job, tmp_path)
    reached = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    job.send_signal(number)
    _, said = job.communicate(timeout=600)
    assert job.returncode == ENDS[number]
    assert said == f"tfla: stopped; go on with: tfla train --out {tmp_path} --resume\n"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    last = checkpoint.load(tmp_path).meta["step"]
    assert names == ["step-00000000", f"step-{last:08d}"] and last >= reached > 0
    assert not (tmp_path / ".tfla-lock").exists()


def test_one_that_comes_before_the_first_step_leaves_nothing_half(tmp_path: Path) -> None:
    big = tmp_path / "text.txt"
    big.write_bytes(bytes(range(32, 127)) * 2_000_000)
    out = tmp_path / "run"
    job = subprocess.Popen(
        [sys.executable, "-m", "tfla", "train", str(big), "--out", str(out), "--device", "cpu"],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    until = time.monotonic() + 600
    while not list(out.glob(".*.tmp")):
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=600) == ("", "")
    assert job.returncode == 143
    assert not out.exists()


def test_what_was_to_be_ignored_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not received.noted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_held_signals_are_noted_and_a_second_ctrl_c_is_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals() as received:
        with received.held():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert received.noted == signal.SIGTERM
            with pytest.raises(Interrupted) as raised:
                os.kill(os.getpid(), signal.SIGINT)
            assert exit_status(raised.value) == 130
        with pytest.raises(Interrupted) as raised:
            os.kill(os.getpid(), signal.SIGHUP)
        assert exit_status(raised.value) == 129
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_a_library_swallows_is_not_lost() -> None:
    with Signals() as outer:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        assert outer.noted == signal.SIGTERM
        for look in (signals.look, Signals().__enter__):
            with pytest.raises(Interrupted) as raised:
                look()
            assert exit_status(raised.value) == 143


def test_a_command_whose_signal_was_swallowed_leaves_with_its_status() -> None:
    program = """
import os, signal, sys
from contextlib import suppress
from tfla import cli
def command(arguments):
    with suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
    return 0
cli.run_command = command
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.parametrize("module", ["typer", "torch", "tfla.xlstm.writer"])
def test_ctrl_c_during_imports_leaves_no_traceback(module: str, tmp_path: Path) -> None:
    """Sent by the import itself, so whatever the speed of the machine."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import importlib.abc, os, signal, sys
class Sends(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Sends())
""")
    done = subprocess.run(
        [sys.executable, "-m", "tfla", "generate", str(tmp_path), "x"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (130, -signal.SIGINT)
    assert (done.stdout, done.stderr) == ("", "")


def test_another_thread_changes_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def inside() -> None:
        with Signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in ENDS if n != signal.SIGTERM),
    ],
)
def test_many_processes_save_together(number: signal.Signals, tmp_path: Path) -> None:
    """The signal goes to torchrun, which passes it on to all."""
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = begin(tmp_path, *elastic)
    wait_for_step(job, tmp_path)
    job.send_signal(number)
    out, said = job.communicate(timeout=600)
    assert checkpoint.load(tmp_path).meta["step"] > 0, said
    assert said.count("tfla: stopped; go on with") == 1, said
    assert "tfla/" not in said.replace(str(tmp_path), ""), said  # no traceback through ours
