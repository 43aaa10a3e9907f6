"""benchmarks/stacks.py: ours is timed without the packages that it is compared with; with them, all
of the stacks compute the same."""

import argparse
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["stacks.py", "--size", "tiny", "--device", "cpu", "--seconds", "3600", "--each", "900"]


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("signal").SIGALRM  # noqa: B018
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("stacks")


def run(stacks: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    monkeypatch.setattr(sys, "argv", [*TINY, "--out", str(out)])
    # A large copy and a large product say nothing here, and take seconds.
    limits = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    monkeypatch.setattr(stacks.measure, "ceiling", lambda *_: limits)
    assert stacks.main() == 0
    return json.loads(out.read_text())["rows"]


def test_what_is_missing_is_a_line_and_ours_is_timed(
    stacks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "xlstm", "xlstm.xlstm_large.model"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = run(stacks, tmp_path / "new" / "stacks.json", monkeypatch)
    timed = [row for row in rows if "ms" in row]
    assert [(row["stack"], row["part"].split()[0]) for row in timed] == [
        ("tfla", "prefill"),
        ("tfla", "decode,"),
        ("tfla", "decode,"),
        ("tfla, bf16 states", "decode,"),
        ("tfla, bf16 states", "decode,"),
        ("tfla", "train"),
    ]
    assert all(row["ms"] > 0 and row["limit_ms"] > 0 and not row["wrong"] for row in timed)
    missing = [row for row in rows if "ms" not in row]
    assert len(missing) == 6
    assert all(row["reason"].startswith("ModuleNotFoundError") for row in missing)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when they are imported
def test_every_stack_computes_the_same(
    stacks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "xlstm", "mlstm_kernels"):
        pytest.importorskip(name, exc_type=ImportError)
    rows = run(stacks, tmp_path / "stacks.json", monkeypatch)
    assert len(rows) == 6 + 4 * 4 and not [row for row in rows if "reason" in row]
    assert max(row["off"] for row in rows) < 1e-5


def test_the_limits_are_those_of_the_arithmetic_and_of_the_bytes(stacks: ModuleType) -> None:
    ceiling = {"flops_per_s": 790e12, "bytes_per_s": 4.28e12}
    full, low = (
        {part.name: part.limit_ms for part in stacks.parts(stacks.SIZES["7b"], False, ceiling, t)}
        for t in (torch.float32, torch.bfloat16)
    )
    assert full["prefill 16,384"] == pytest.approx(290, rel=0.1)
    assert full["decode, batch 1"] == pytest.approx((13.32 + 2 * 0.1346) / 4.28, rel=0.01)
    assert full["decode, batch 64"] == pytest.approx((13.32 + 64 * 2 * 0.1346) / 4.28, rel=0.01)
    assert low["decode, batch 64"] == pytest.approx((13.32 + 64 * 0.1346) / 4.28, rel=0.01)


def test_a_part_has_its_time_and_no_more(stacks: ModuleType) -> None:
    with pytest.raises(TimeoutError, match="more than 1 s"):
        stacks.boxed(lambda: time.sleep(10), 1.0)
    with pytest.raises(TimeoutError, match="the whole run is over"):
        stacks.boxed(lambda: None, 0.5)
    assert stacks.boxed(lambda: 3, 5) == 3


def test_after_a_process_that_dies_another_goes_on_behind_it(
    stacks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows before it are kept, a model whose making ends a process is left out, and the checks
    of the first stack reach all the others."""
    out = tmp_path / "stacks.json"
    args = argparse.Namespace(size="tiny", out=out, profile=False, each=900.0, seconds=900.0)
    monkeypatch.setattr(stacks.measure, "ceiling", lambda *_: {"flops_per_s": 1, "bytes_per_s": 1})
    one = stacks.Run(stacks.SIZES["tiny"], torch.device("cpu"), args)
    one.apart = True

    def variants(name: str, build: tuple) -> Iterator[tuple[str, SimpleNamespace]]:
        if name == "xlstm" and not build[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        for row in (name, name + " on tfla"):
            yield row, SimpleNamespace(model=torch.nn.Linear(1, 1), row=row)

    def prepare(stack: SimpleNamespace, tokens: torch.Tensor) -> object:
        if stack.row == "transformers" and tokens.shape == (1, 64):
            os.kill(os.getpid(), signal.SIGKILL)
        return stacks.Prepared(lambda: None, 1, torch.full((2,), float(len(tokens))))

    monkeypatch.setattr(stacks, "variants", variants)
    for name in ("read", "decode", "train"):
        monkeypatch.setattr(stacks, name, lambda stack, tokens: prepare(stack, tokens))
    for name in ("transformers", "xlstm"):
        one.stack(name, 900.0)
    rows = json.loads(out.read_text())["rows"]
    inference = ["prefill 256", "decode, batch 1", "decode, batch 4"]
    train = [(name, "train step 2 x 128") for name in ("transformers", "xlstm")]
    assert [(row["stack"], row["part"]) for row in rows] == [
        *(("transformers", part) for part in inference),
        *(("transformers on tfla", part) for part in inference),
        train[0],
        (train[0][0] + " on tfla", train[0][1]),
        ("xlstm", "all"),
        train[1],
        (train[1][0] + " on tfla", train[1][1]),
    ]
    died = {row["part"]: row["reason"] for row in rows if "ms" not in row}
    assert list(died) == ["decode, batch 1", "all"]
    assert all("ended with -9" in reason for reason in died.values())
    assert all(row["off"] == 0 for row in rows if "ms" in row) and len(one.wanted) == 4


def test_a_process_that_does_not_answer_is_ended(stacks: ModuleType) -> None:
    def work(send: Callable[[object], None]) -> None:
        send("begun")
        time.sleep(60)

    waits = iter([900.0, 0.5])  # for the first message, and for one that does not come
    found = stacks.apart(work, lambda: next(waits))
    assert next(found) == "begun"
    with pytest.raises(RuntimeError, match="did not answer"):
        next(found)


def test_where_the_compiler_aborts_the_flag_is_set_and_the_process_goes_on(
    stacks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = importlib.import_module("guarded")
    monkeypatch.delenv("FLAG", raising=False)

    def build(wanted: str | None) -> str | None:
        if os.environ.get("FLAG") != wanted:
            faulthandler.disable()  # pytest's would print
            os.abort()
        return os.environ.get("FLAG")

    assert guarded.guarded(lambda: build(None), {"FLAG": "1"}) == (None, False)
    assert guarded.guarded(lambda: build("1"), {"FLAG": "1"}) == ("1", True)
    with pytest.raises(RuntimeError, match="the compiler aborts"):
        guarded.guarded(lambda: build("2"), {"FLAG": "1"})
    assert "FLAG" not in os.environ
    with pytest.raises(ZeroDivisionError):  # an error of the program is that error
        guarded.guarded(lambda: 1 / 0, {"FLAG": "1"})


def test_stacks_that_are_not_known_are_named(
    stacks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [*TINY, "--stacks", "tfla, xlstm on tfla,fla"])
    with pytest.raises(SystemExit):
        stacks.main()
    assert "got fla" in capsys.readouterr().err
