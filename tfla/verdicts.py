"""Verdicts of the self-test, for a device and a Triton on which the kernels have never run.

    pair_of(device)      the names by which a verdict is kept
    known(pair, dtype)   a verdict from this process or from disk, or None
    test(pair, ...)      makes one: ``tfla.selftest`` in a process of its own, so that a kernel that
                         hangs, crashes or breaks the GPU's context leaves the caller's alone

Files lie in $TFLA_CACHE_DIR, else in $XDG_CACHE_HOME/tfla, else in ~/.cache/tfla. Many processes
test once: the first to take the lock does it, the others wait for its verdict. Where nothing can be
written a verdict holds for its process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from tfla import _compat

logger = logging.getLogger("tfla")

# Where every kernel of this version has run and was held against fp64 (`pytest -m gpu`).
PROVEN_CAPABILITIES = {"9.0"}
SECONDS = 900.0  # that the self-test of one dtype may take: it compiles about 60 kernels


class Pair(NamedTuple):
    """What a verdict depends on."""

    device: str  # name of the device
    capability: str  # "8.9" of an NVIDIA GPU, "gfx942" of an AMD GPU, "interpreter" of a CPU
    torch: str
    triton: str
    tfla: str
    kernels: str  # a digest of our kernels' sources

    def __str__(self) -> str:
        kind = self.capability
        if kind[0].isdigit():
            kind = f"compute capability {kind}"
        return f"{self.device} ({kind}) with torch {self.torch} and Triton {self.triton}"


class Verdict(NamedTuple):
    """What the self-test found."""

    failed: tuple[str, ...]  # what is wrong, in words; empty: all is as it should be
    lasting: bool = True  # False: the test itself could not run, and may another time
    when: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        if self.passed:
            return f"passed ({self.when}, {self.seconds:.0f} s)" if self.when else "passed"
        rest = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
        return ("failed: " if self.lasting else "could not run: ") + self.failed[0] + rest


@functools.cache
def _digest() -> str:
    total = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def tfla_version() -> str:
    return importlib.import_module(__name__.split(".")[0]).__version__


@functools.cache
def pair_of(device: torch.device) -> Pair:
    """The pair of this device and the installed torch, Triton and tfla."""
    name, capability = "CPU", "interpreter"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        capability = f"{properties.major}.{properties.minor}"
        if torch.version.hip:
            capability = getattr(properties, "gcnArchName", "hip").split(":")[0]
    triton = _compat.triton_release() or "none"
    return Pair(name, capability, torch.__version__, triton, tfla_version(), _digest())


def is_proven(pair: Pair) -> bool:
    """Have our kernels run on such a device with such a Triton?"""
    return pair.capability in PROVEN_CAPABILITIES and _compat.triton_is_checked()


# ---------------------------------------------------------------- kept verdicts

_kept: dict[tuple[Pair, str], Verdict] = {}  # of this process
_testing = threading.Lock()


def folder() -> Path:
    """Where verdicts are kept."""
    chosen = os.environ.get("TFLA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored. Without a home it is "~", unwritable.
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "tfla"


def _file(pair: Pair, dtype: str) -> Path:
    name = hashlib.sha256(json.dumps([*pair, dtype]).encode()).hexdigest()[:24]
    return folder() / f"selftest-{name}.json"


def known(pair: Pair, dtype: str) -> Verdict | None:
    """The verdict of this process, or the one on disk."""
    found = _kept.get((pair, dtype))
    if found is None and (found := _read(pair, dtype)) is not None:
        _kept[pair, dtype] = found
    return found


def _read(pair: Pair, dtype: str) -> Verdict | None:
    """The verdict in a file that says exactly this pair; anything else is as no file."""
    try:
        with open(_file(pair, dtype), "rb") as file:
            kept = json.loads(file.read(1 << 20))
        if kept["pair"] != pair._asdict() or kept["dtype"] != dtype:
            return None
        failed, when, seconds = kept["failed"], kept["when"], kept["seconds"]
        if not isinstance(failed, list) or not all(isinstance(x, str) for x in failed):
            return None
        return Verdict(tuple(failed), True, str(when), float(seconds))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(pair: Pair, dtype: str, verdict: Verdict) -> None:
    """Keep a verdict on disk: a whole file or none; where it cannot be, in this process alone."""
    path = _file(pair, dtype)
    about = {
        "pair": pair._asdict(),
        "dtype": dtype,
        "failed": list(verdict.failed),
        "when": verdict.when,
        "seconds": round(verdict.seconds, 1),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(about, file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError:
        return


@contextlib.contextmanager
def _locked(path: Path, seconds: float) -> Iterator[bool]:
    """Holds a lock that all processes of this folder share, which the system takes back from one
    that dies. Waits no longer than ``seconds``; False: it is not ours, or there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    except OSError:
        yield False
        return
    with file:
        held, until = False, time.monotonic() + seconds
        while not held and time.monotonic() < until:
            try:
                held = _take(file)
            except OSError:  # a file system without locks
                break
            if not held:
                time.sleep(0.1)
        yield held


def _take(file: IO[bytes]) -> bool:
    """Try to lock an open file until it is closed."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


# ---------------------------------------------------------------- tests

# Takes a device and a dtype's name; what failed. RuntimeError: the test could not run.
Runner = Callable[[torch.device, str], "list[str]"]


def test(
    pair: Pair, device: torch.device, dtype: str, *, run: Runner | None = None, again: bool = False
) -> Verdict:
    """The verdict of a pair: a known one, or one that is made now, by ``run`` (None: in a process
    of its own). ``again``: also where one is known."""
    run = run or in_a_process
    with _testing:  # of many threads one tests
        if not again and (found := known(pair, dtype)):
            return found
        lock = _file(pair, dtype).with_suffix(".lock")
        with _locked(lock, SECONDS + 60):
            if not again and (found := known(pair, dtype)):  # another process was first
                return found
            began = time.monotonic()
            try:
                failed, lasting = tuple(run(device, dtype)), True
            except RuntimeError as error:
                failed, lasting = (str(error),), False
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            verdict = Verdict(failed, lasting, when, time.monotonic() - began)
            if lasting:
                _write(pair, dtype, verdict)
        _kept[pair, dtype] = verdict
        return verdict


# The child sees the packages that its parent does, in the same order.
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tfla import selftest
selftest.main()
"""


def in_a_process(device: torch.device, dtype: str) -> list[str]:
    """What fails of one dtype, found by ``tfla.selftest`` in a process of its own. RuntimeError:
    the process could not do its work, for a reason that says nothing about the kernels."""
    logger.warning(
        "tfla tests its kernels in %s once on this device with this Triton: a minute or two (ahead "
        "of time: tfla env --self-test)",
        dtype,
    )
    words = [json.dumps(sys.path), str(device), dtype]
    environment = {name: x for name, x in os.environ.items() if name != "TFLA_LOG"}
    try:
        done = subprocess.run(
            [sys.executable or "python", "-c", _CHILD, *words],
            env=environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [f"{dtype}: the self-test did not end within {SECONDS:.0f} s"]
    except OSError as error:
        raise RuntimeError(f"no process could be started for the self-test ({error})") from error
    return read_report(done.returncode, done.stdout, done.stderr, pair_of(device), dtype)


def read_report(status: int, out: bytes, errors: bytes, pair: Pair, dtype: str) -> list[str]:
    """What failed, from what a process of the self-test left behind."""
    try:
        report: Any = json.loads(out.decode(errors="replace").strip().splitlines()[-1])
        failed, cannot, of = report["failed"], report["cannot"], report["pair"]
    except (ValueError, TypeError, KeyError, IndexError):
        if status < 0 and -status not in (signal.SIGTERM, getattr(signal, "SIGKILL", 9)):
            name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
            return [f"{dtype}: the process of the self-test died of {name}"]
        lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
        message = f"its process ended with status {status}: {lines[-1]}"
        raise RuntimeError(message) from None
    if of != pair._asdict():
        raise RuntimeError(f"its process saw another pair, {of}")
    if cannot:
        raise RuntimeError(cannot)
    return [str(x) for x in failed]
