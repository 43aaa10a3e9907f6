"""benchmarks/stacks.py: ours is timed without the packages that it is compared with; with them, all
of the stacks compute the same."""

import argparse
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["stacks.py", "--size", "tiny", "--device", "cpu"]


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
        ("tfla", "prefill"), ("tfla", "decode,"), ("tfla", "decode,"),
        ("tfla, bf16 states", "decode,"), ("tfla, bf16 states", "decode,"), ("tfla", "train"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["limit_ms"] > 0 and not row["wrong"] for row in timed)
    missing = [row for row in rows if "ms" not in row]
    assert len(missing) == 6
    assert all(row["reason"].startswith("ModuleNotFoundError") for row in missing)


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


def test_a_process_that_dies_ends_only_its_own_rows(
    stacks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(size="tiny", out=None, profile=False, each=60.0, seconds=60.0)
    monkeypatch.setattr(stacks.measure, "ceiling", lambda *_: {"flops_per_s": 1, "bytes_per_s": 1})
    one = stacks.Run(stacks.SIZES["tiny"], torch.device("cpu"), args)
    one.apart = True

    def rows(name: str, training: bool) -> None:
        one.wanted["prefill"] = torch.ones(2)
        one.add(stack=name, part="prefill", reason="as it is")
        if name == "transformers":
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(one, "rows", rows)
    for name in ("transformers", "xlstm"):
        one.stack(name, training=False)
    assert [(row["stack"], row["part"]) for row in one.result["rows"]] == [
        ("transformers", "prefill"), ("transformers", "the rest"), ("xlstm", "prefill"),
    ]  # fmt: skip
    assert "ended with -9" in one.result["rows"][1]["reason"]
    assert torch.equal(one.wanted["prefill"], torch.ones(2))
