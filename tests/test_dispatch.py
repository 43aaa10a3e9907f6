"""Which backend serves, where the kernels have never run, and what is said about it. No GPU is
needed: the pair is made up, and what would test it is a function."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tfla
from tfla import _compat, dispatch, log, selftest, verdicts

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda", 0)
A100 = verdicts.Pair("NVIDIA A100", "8.0", "2.13.0", "3.7.1", "0.1.0", "abc")


class Pair:
    """A GPU that is not there, and its self-test."""

    def __init__(self) -> None:
        self.pair, self.calls, self.capturing = A100, [], False
        self.result: Any = []

    def run(self, device: torch.device, dtype: str) -> list[str]:
        self.calls.append((str(device), dtype))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def forget(self) -> None:
        """As a new process."""
        for kept in (dispatch._chosen, dispatch._warned, verdicts._kept, log.reasons):
            kept.clear()

    def pick(self, dtype: torch.dtype = torch.bfloat16, backend: str | None = None) -> str:
        q: Any = SimpleNamespace(device=GPU, dtype=dtype, shape=(1, 1, 1, 1))
        return dispatch.pick_backend(backend, q)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pair]:
    gpu = Pair()
    monkeypatch.setenv("TFLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "pair_of", lambda device: gpu.pair)
    monkeypatch.setattr(verdicts, "in_a_process", gpu.run)
    monkeypatch.setattr(_compat, "triton_version", lambda: (3, 7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu.forget()
    yield gpu
    gpu.forget()


# ---------------------------------------------------------------- what is tested, and when


@pytest.mark.parametrize(
    ("capability", "triton", "proven"),
    [
        ("9.0", (3, 6), True),
        ("9.0", (3, 9), True),
        ("9.0", (3, 10), False),
        ("9.0", (3, 5), False),
        ("9.0", None, False),
        ("8.0", (3, 7), False),
        ("8.9", (3, 7), False),
        ("10.0", (3, 7), False),
        ("12.0", (3, 9), False),
        ("gfx942", (3, 7), False),
    ],
)
def test_only_pairs_that_have_run_are_not_tested(
    gpu: Pair, monkeypatch: pytest.MonkeyPatch, capability: str, triton: Any, proven: bool
) -> None:
    gpu.pair = A100._replace(capability=capability)
    monkeypatch.setattr(_compat, "triton_version", lambda: triton)
    assert gpu.pick() == "triton"
    assert gpu.calls == ([] if proven else [("cuda:0", "bfloat16")])


def test_a_pair_is_tested_once_for_each_dtype_and_over_processes(gpu: Pair) -> None:
    for _ in range(3):
        assert [gpu.pick(x) for x in (torch.bfloat16, torch.float32)] == ["triton"] * 2
    assert gpu.calls == [("cuda:0", "bfloat16"), ("cuda:0", "float32")]
    gpu.forget()
    assert gpu.pick() == "triton" and len(gpu.calls) == 2
    for name in ("device", "capability", "torch", "triton", "tfla", "kernels"):
        gpu.forget()
        gpu.pair = A100._replace(**{name: "8.6" if name == "capability" else "another"})
        assert gpu.pick() == "triton"
    assert len(gpu.calls) == 8
    assert gpu.pick(torch.float64) == "reference" and len(gpu.calls) == 8


def test_what_fails_is_not_used_and_the_warning_says_why(gpu: Pair) -> None:
    gpu.result = ["bfloat16, exp: dq differs by 0.9 of its norm", "bfloat16, step: h is not finite"]
    with pytest.warns(UserWarning, match='"reference" here.*A100.*8.0.*failed.*dq differs by 0.9'):
        assert gpu.pick() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.pick() == "reference"  # said once
    gpu.result = []
    assert gpu.pick(torch.float16) == "triton"  # another dtype has a verdict of its own
    gpu.forget()
    with pytest.warns(UserWarning, match="failed"):
        assert gpu.pick() == "reference"  # from disk
    assert len(gpu.calls) == 2


def test_a_named_backend_asks_no_self_test(gpu: Pair) -> None:
    gpu.result = ["broken"]
    assert gpu.pick(backend="triton") == "triton"
    assert gpu.pick(backend="reference") == "reference"
    assert not gpu.calls


def test_no_test_is_begun_while_a_graph_is_captured(gpu: Pair) -> None:
    gpu.capturing = True
    with pytest.warns(UserWarning, match="never run on.*A100.*tfla env --self-test"):
        assert gpu.pick() == "reference"
    assert not gpu.calls
    gpu.capturing = False  # the choice was for that call alone
    assert gpu.pick() == "triton" and len(gpu.calls) == 1
    gpu.capturing = True
    assert gpu.pick() == "triton"


def test_no_test_is_begun_while_torch_compile_traces(gpu: Pair) -> None:
    q: Any = dispatch._Kind(GPU, torch.bfloat16)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch.pick_backend(None, q) == "reference" else x * 10

    x = torch.full((2,), 5.0)
    with pytest.warns(UserWarning, match="torch.compile traces"):
        assert torch.compile(f, backend="eager", fullgraph=True)(x).tolist() == [6, 6]
    assert not gpu.calls
    assert gpu.pick() == "triton"
    torch.compiler.reset()
    # And a verdict that is there is used.
    assert torch.compile(f, backend="eager", fullgraph=True)(x).tolist() == [50, 50]


def test_a_test_that_could_not_run_is_tried_by_the_next_process(gpu: Pair) -> None:
    gpu.result = RuntimeError("no process could be started")
    with pytest.warns(UserWarning, match="could not run: no process could be started"):
        assert gpu.pick() == "reference"
    assert gpu.pick() == "reference" and len(gpu.calls) == 1
    gpu.forget()
    gpu.result = []
    assert gpu.pick() == "triton" and len(gpu.calls) == 2


# ---------------------------------------------------------------- verdicts on disk


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.json"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"pair": {}}',
        "[" * 100_000,
        "\x00\xff",
        json.dumps(
            {
                "pair": A100._replace(device="x")._asdict(),
                "dtype": "bfloat16",
                "failed": [],
                "when": "",
                "seconds": 0,
            }
        ),
        json.dumps(
            {"pair": A100._asdict(), "dtype": "float16", "failed": [], "when": "", "seconds": 0}
        ),
        json.dumps(
            {"pair": A100._asdict(), "dtype": "bfloat16", "failed": "no", "when": "", "seconds": 0}
        ),
        json.dumps(
            {"pair": A100._asdict(), "dtype": "bfloat16", "failed": [1], "when": "", "seconds": 0}
        ),
        json.dumps(
            {"pair": A100._asdict(), "dtype": "bfloat16", "failed": [], "when": "", "seconds": "x"}
        ),
    ],
    ids=range(12),
)
def test_a_file_that_is_not_this_pairs_verdict_is_no_verdict(
    gpu: Pair, tmp_path: Path, text: str
) -> None:
    gpu.pick()
    (file,) = kept(tmp_path)
    file.write_text(text, encoding="latin-1")
    gpu.forget()
    assert gpu.pick() == "triton" and len(gpu.calls) == 2
    assert json.loads(file.read_text())["failed"] == []  # and it is one again
    assert [path.suffix for path in sorted(file.parent.iterdir())] == [".json", ".lock"]


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(
    gpu: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no"), "\0"):
        gpu.forget()
        gpu.calls.clear()
        if place == "\0":
            monkeypatch.setattr(verdicts, "folder", lambda: Path("/dev/null/x"))
        else:
            monkeypatch.setenv("TFLA_CACHE_DIR", str(place))
        assert [gpu.pick() for _ in range(3)] == ["triton"] * 3
        assert len(gpu.calls) == 1


def test_the_folder_follows_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFLA_CACHE_DIR", "/a/b")
    assert verdicts.folder() == Path("/a/b")
    monkeypatch.delenv("TFLA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "tfla"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert verdicts.folder() == Path.home() / ".cache" / "tfla"


def test_of_many_threads_one_tests(gpu: Pair) -> None:
    found = []

    def slow(device: torch.device, dtype: str) -> list[str]:
        gpu.calls.append(dtype)
        time.sleep(0.2)
        return []

    def one() -> None:
        found.append(verdicts.test(A100, GPU, "bfloat16", run=slow))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(v.passed for v in found) and len(gpu.calls) == 1


def test_of_many_processes_one_tests(tmp_path: Path) -> None:
    code = f"""
import sys, time, torch
from tfla import verdicts
pair = verdicts.Pair(*{tuple(A100)!r})
def run(device, dtype):
    with open({str(tmp_path / "log")!r}, "a") as file:
        file.write("tested\\n")
    time.sleep(0.5)
    return ["wrong"]
print(verdicts.test(pair, torch.device("cuda:0"), "bfloat16", run=run).failed)
"""
    environment = {**os.environ, "TFLA_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert outputs == [b"('wrong',)\n"] * 3
    assert (tmp_path / "log").read_text() == "tested\n"


def test_a_lock_of_a_process_that_died_is_free(gpu: Pair, tmp_path: Path) -> None:
    gpu.pick()
    (file,) = kept(tmp_path)
    file.unlink()
    lock = file.with_suffix(".lock")
    code = f"import fcntl, os; fcntl.flock(open({str(lock)!r}), fcntl.LOCK_EX); os._exit(9)"
    subprocess.run([sys.executable, "-c", code])
    gpu.forget()
    assert gpu.pick() == "triton" and len(gpu.calls) == 2


def test_again_tests_what_is_known(gpu: Pair, tmp_path: Path) -> None:
    gpu.result = ["wrong"]
    assert not verdicts.test(A100, GPU, "bfloat16").passed
    gpu.result = []
    assert not verdicts.test(A100, GPU, "bfloat16").passed
    assert verdicts.test(A100, GPU, "bfloat16", again=True).passed
    assert verdicts.known(A100, "bfloat16") is not None
    (file,) = kept(tmp_path)
    assert json.loads(file.read_text())["failed"] == []


# ---------------------------------------------------------------- the process of a self-test


def report(**fields: Any) -> bytes:
    return json.dumps({"failed": [], "cannot": "", "pair": A100._asdict()} | fields).encode()


def test_reports_of_the_process() -> None:
    def read(status: int, out: bytes, errors: bytes = b"") -> list[str]:
        return verdicts.read_report(status, out, errors, A100, "bfloat16")

    assert read(0, b"Triton says hello\n" + report() + b"\n") == []
    assert read(0, report(failed=["dq is wrong"])) == ["dq is wrong"]
    assert "SIGSEGV" in read(-11, b"")[0]
    assert "SIGABRT" in read(-6, b"half a line")[0]
    for status, out, errors, message in (
        (-9, b"", b"", "status -9"),  # the memory of the machine was full
        (1, b"", b"Traceback\nImportError: no x\n", "ImportError: no x"),
        (0, b"not json", b"", "no message"),
        (0, report(cannot="cannot use cuda:0: busy"), b"", "busy"),
        (0, report(pair={"device": "another"}), b"", "another pair"),
    ):
        with pytest.raises(RuntimeError, match=message):
            read(status, out, errors)


def test_a_process_that_hangs_fails_and_one_that_cannot_start_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verdicts, "pair_of", lambda device: A100)
    monkeypatch.setattr(verdicts, "SECONDS", 0.5)
    monkeypatch.setattr(verdicts, "_CHILD", "import time; time.sleep(60)")
    with caplog.at_level(logging.WARNING, logger="tfla"):
        assert "did not end within" in verdicts.in_a_process(GPU, "bfloat16")[0]
    assert "tests its kernels in bfloat16 once" in caplog.text
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(RuntimeError, match="no process could be started"):
        verdicts.in_a_process(GPU, "bfloat16")


def test_every_family_passes_in_the_interpreter(tmp_path: Path) -> None:
    """The real process, over all cases, of fp32 in Triton's interpreter; it leaves a verdict."""
    pytest.importorskip("triton")
    code = """
import torch
from tfla import verdicts
cpu = torch.device("cpu")
print(verdicts.test(verdicts.pair_of(cpu), cpu, "float32"))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TFLA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("passed"), done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_wrong_result_costs_the_backend_and_the_warning_says_which(gpu: Pair) -> None:
    x = torch.ones(5)
    gpu.result = list(selftest._differences({"h": -x}, {"h": x}, 0.1))
    with pytest.warns(UserWarning, match="h differs by 2 of its norm.*at most 0.1"):
        assert gpu.pick() == "reference"


# ---------------------------------------------------------------- tfla.supports


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_supports_without_a_gpu(device: Any, dtype: torch.dtype) -> None:
    backend, reason = tfla.supports(device, dtype)
    assert backend == "reference" and reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="where torch sees no GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda")])
def test_supports_says_that_there_is_no_gpu(device: Any) -> None:
    assert tfla.supports(device, torch.bfloat16) == (
        "reference",
        "torch sees no GPU here, or is a build for CPUs.",
    )


def test_supports_is_what_calls_take(gpu: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    backend, reason = tfla.supports("cuda", torch.bfloat16, self_test=False)
    assert backend == "reference" and "never run" in reason and not gpu.calls
    backend, reason = tfla.supports(0, torch.bfloat16)
    assert backend == "triton" == gpu.pick() and "passed" in reason and len(gpu.calls) == 1
    assert tfla.supports("cuda:0", torch.float64)[0] == "reference"
    assert tfla.supports("cuda:1", torch.bfloat16) == (
        "reference",
        "torch sees 1 GPUs here, no cuda:1.",
    )
    gpu.pair = A100._replace(capability="9.0")
    assert tfla.supports(GPU, torch.float32)[0] == "triton" and len(gpu.calls) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nowhere", torch.float32), ValueError, "device must be .*got 'nowhere'"),
        ((None, torch.float32), TypeError, "device must be .*got NoneType"),
        ((1.5, torch.float32), TypeError, "device must be .*got float 1.5"),
        ((True, torch.float32), TypeError, "device must be .*got bool True"),
        ((-1, torch.float32), ValueError, "device must be .*got -1"),
        (("cpu", torch.int32), TypeError, "dtype must be .*got torch.int32"),
        (("cpu", "float32"), TypeError, "dtype must be .*got 'float32'"),
        (("cpu", torch.float8_e4m3fn), TypeError, "dtype must be"),
    ],
)
def test_supports_names_a_wrong_argument(
    arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tfla.supports(*arguments)
    with pytest.raises(TypeError, match="self_test must be True or False"):
        tfla.supports("cpu", torch.float32, self_test=1)  # type: ignore[arg-type]


def test_an_old_gpu_is_said_to_be_one(gpu: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.warns(UserWarning, match="Tesla T4 has 7.5"):
        assert gpu.pick() == "reference"
    assert not gpu.calls


# ---------------------------------------------------------------- TFLA_LOG=1

LOGGED = """
import torch, tfla
def x(T=20, dtype=torch.float32):
    q, k, v = torch.randn(3, 2, T, 2, 8, dtype=dtype)
    return q, k, v, torch.randn(2, T, 2), torch.randn(2, T, 2)
for _ in range(3):
    h, state = tfla.mlstm(*x(), output_final_state=True)
tfla.mlstm(*x(), input_gate="sigmoid")
tfla.mlstm(*x(), backend="reference")
q, k, v, i, f = x(1)
tfla.mlstm_step(q[:, 0], k[:, 0], v[:, 0], i[:, 0], f[:, 0], state)
packed = [t[:1] for t in x()]
tfla.mlstm(*packed, cu_seqlens=torch.tensor([0, 7, 20]), initial_state=state)
q = x(dtype=torch.bfloat16)
q[0].requires_grad_()
tfla.linear_attention(*q[:3])[0].sum().backward()
torch.compile(lambda *x: tfla.mlstm(*x)[0], backend="eager", fullgraph=True)(*x(30))
"""


def logged(code: str, **variables: str) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stdout, done.stderr
    return done.stderr.splitlines()


def test_each_new_kind_of_call_has_one_line() -> None:
    lines = logged(LOGGED, TFLA_LOG="1")
    assert all(line.startswith("tfla: ") and 'backend "reference"' in line for line in lines)
    wanted = [
        ("h(2, 20, 2, 8) of q, k (2, 20, 2, 8) fp32", "final state", "no gradients"),
        ("i fp32", "not normalised"),
        ("normalised, no gradients",),
        ("one token, h(2, 2, 8)", "state fp32"),
        ("2 packed sequences", "initial state"),
        ("bf16", "log_f fp32", ", gradients"),
        ("h(2, 30, 2, 8)",),
    ]
    assert len(lines) == len(wanted), lines
    for line, words in zip(lines, wanted, strict=True):
        assert all(word in line for word in words), line
    assert all(line.endswith(": CPU tensors") for line in lines)


@pytest.mark.parametrize("value", ["0", ""])
def test_without_the_variable_nothing_is_said(value: str) -> None:
    assert logged(LOGGED, TFLA_LOG=value) == []


def test_a_line_says_the_plan_and_who_named_the_backend() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch, tfla\nq = torch.randn(1, 20, 1, 16)\ntfla.linear_attention(q, q, q, "
        "backend='triton')"
    )
    (line,) = logged(code, TFLA_LOG="1", TRITON_INTERPRET="1")
    assert 'backend "triton" (chunks of ' in line and line.endswith("): named by the caller")


def test_the_reason_of_the_choice_is_in_the_line(
    gpu: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.result = ["bfloat16, exp: h differs"]
    with pytest.warns(UserWarning):
        gpu.pick()
    monkeypatch.setattr(log, "_seen", set())
    log._line("a call", GPU, torch.bfloat16, "reference", "")
    log._line("a call", GPU, torch.bfloat16, "triton", "")
    first, second = capsys.readouterr().err.splitlines()
    assert "the self-test of its kernels" in first and "h differs" in first
    assert second.endswith('backend "triton": named by the caller')
