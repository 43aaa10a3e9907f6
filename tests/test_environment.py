"""tfla env: one paste that says what a bug report needs, whatever is broken."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tfla
from tfla import _compat, dispatch, environment, verdicts
from tfla.cli import run_command

ROOT = Path(__file__).resolve().parent.parent


def lines() -> dict[str, str]:
    """The report by the first word of its lines, lines of one word joined."""
    found: dict[str, str] = {}
    for line in environment.report():
        word, _, rest = line.partition(" ")
        found[word] = "\n".join(filter(None, [found.get(word, ""), rest.strip()]))
    return found


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TFLA_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two GPUs that are not there: one that is proven, one that is not."""
    parts = {
        0: SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132,
                           total_memory=150 << 30, shared_memory_per_block_optin=232448),
        1: SimpleNamespace(name="NVIDIA L40S", major=8, minor=9, multi_processor_count=142,
                           total_memory=48 << 30, shared_memory_per_block_optin=101376),
    }  # fmt: skip
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_properties": lambda d: parts[d.index],
        "get_device_capability": lambda d: (parts[d.index].major, parts[d.index].minor),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(_compat, "triton_version", lambda: (3, 7))
    for kept in (dispatch._chosen, dispatch._warned, verdicts._kept):
        kept.clear()
    verdicts.pair_of.cache_clear()
    yield {"parts": parts}
    verdicts.pair_of.cache_clear()
    for kept in (dispatch._chosen, dispatch._warned, verdicts._kept):
        kept.clear()


def test_the_report_names_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TRITON_CACHE_DIR", os.path.expanduser("~/triton"))
    monkeypatch.setenv("NCCL_SOMETHING_TOKEN", "hunter2")
    monkeypatch.setenv("UNRELATED", "private")
    found = lines()
    assert found["tfla"].startswith(tfla.__version__)
    assert torch.__version__ in found["torch"] and found["python"] and found["system"]
    assert "threads" in found["cpu"] and "cores" in found["cpu"]
    assert '"reference"' in found["cpu"] and "float64" in found["cpu"]
    assert "OMP_NUM_THREADS=3" in found["variable"] and "=~/triton" in found["variable"]
    text = "\n".join(found.values())
    assert "hunter2" not in text and "private" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="where torch sees no GPU")
def test_without_a_gpu_the_report_says_so() -> None:
    assert lines()["gpu"] == "torch sees none"


def test_each_gpu_is_described_and_what_serves_there(gpus: Any, folder: Path) -> None:
    found = lines()
    proven, other = found["cuda:0"], found["cuda:1"]
    assert "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 150.0 GiB" in proven
    assert "227 KiB shared memory" in proven and "not needed here" in proven
    assert 'bfloat16, float16, float32: "triton"' in proven
    assert 'bfloat16, float16, float32: "reference": its kernels have never run' in other
    assert "decides here; bfloat16 not run" in other
    assert 'float64: "reference"' in proven and 'float64: "reference"' in other
    assert not list(folder.iterdir())  # a report tests nothing


def test_the_self_test_is_run_on_every_gpu_and_shown(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def run(device: torch.device, dtype: str) -> list[str]:
        calls.append((str(device), dtype))
        wrong = str(device) == "cuda:1" and dtype == "float16"
        return ["float16, exp: dq differs", "float16, step: h differs"] if wrong else []

    monkeypatch.setattr(verdicts, "in_a_process", run)
    assert run_command(["env", "--self-test"]) == 1
    out = capsys.readouterr().out
    dtypes = ("bfloat16", "float16", "float32")
    assert calls == [(f"cuda:{n}", dtype) for n in (0, 1) for dtype in dtypes]
    assert "self-test of float16 on NVIDIA L40S" in out and "  float16, step: h differs" in out
    (line,) = [line for line in out.splitlines() if "decides here" in line]
    assert "bfloat16 passed" in line and "float16 failed: float16, exp: dq differs" in line
    assert '"reference": the self-test of its kernels on NVIDIA L40S' in out
    assert 'bfloat16, float32: "triton": its self-test on NVIDIA L40S' in out
    # Again: anew, over the kept verdict.
    monkeypatch.setattr(verdicts, "in_a_process", lambda *_: [])
    assert run_command(["env", "--self-test"]) == 0
    assert "failed" not in capsys.readouterr().out


def test_two_gpus_of_one_kind_are_tested_once(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus["parts"][1] = gpus["parts"][0]
    calls = []
    monkeypatch.setattr(verdicts, "in_a_process", lambda *x: calls.append(x) or [])
    assert len(list(environment.self_test())) == len(calls) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="where torch sees no GPU")
def test_a_self_test_without_a_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run_command(["env", "--self-test"]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.count("\n") == 1 and "--self-test needs a GPU" in seen.err


def test_what_is_broken_costs_its_own_line_alone(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no\ndriver")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(environment, "_system", broken)
    monkeypatch.setattr(_compat, "triton_error", lambda: "OSError: libfoo.so is missing")
    found = lines()
    assert found["system"] == "unknown (RuntimeError: no driver)"
    assert "cannot say: RuntimeError: no driver" in found["cuda:0"]
    assert "torch" in found and "variable" in found
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert "torch cannot say" in lines()["gpu"]


@pytest.mark.parametrize("missing", ["triton", "numpy", "rich", "matplotlib", "safetensors"])
def test_the_report_needs_no_package_but_typer(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from tfla import environment\nprint(*environment.report(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "torch sees" in done.stdout + "torch sees", done.stderr
    if missing == "triton":
        assert "Triton    cannot be imported" in done.stdout or "not installed" in done.stdout
