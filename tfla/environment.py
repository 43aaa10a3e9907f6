"""``tfla env``: what a bug report needs, in one paste; it never fails for want of one of them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tfla
from tfla import _compat, dispatch, verdicts

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that "triton" may serve
PACKAGES = (
    "numpy",
    "jax",
    "jaxlib",
    "triton",
    "safetensors",
    "tokenizers",
    "transformers",
    "peft",
    "accelerate",
    "mlstm_kernels",
    "xlstm",
    "flash-linear-attention",
    "mamba-ssm",
    "typer",
    "rich",
)
PREFIXES = (
    "TFLA_",
    "TRITON_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "NVIDIA_VISIBLE_",
    "HIP_",
    "ROCR_",
    "HSA_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "XDG_CACHE_HOME",
    "CUBLAS_",
    "NCCL_",
)
SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


def report() -> Iterator[str]:
    """The lines of ``tfla env``; it starts no self-test."""
    yield f"tfla      {tfla.__version__}{_commit()}"
    yield f"python    {platform.python_version()} ({platform.python_implementation()})"
    yield f"system    {_try(_system)}"
    yield f"cpu       {_try(_cpu)}"
    yield f"torch     {torch.__version__}, {_toolkit()}; {_try(_precision)}"
    yield f"Triton    {_try(_triton)}"
    yield f"driver    {_try(_driver)}"
    found = (f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    yield f"packages  {', '.join(found)}"
    for name, value in sorted(os.environ.items()):
        if name.startswith(PREFIXES):
            hidden = any(word in name.upper() for word in SECRET)
            yield f"variable  {name}={'(hidden)' if hidden else _short(value)}"
    yield from _devices()
    yield f"verdicts  {_short(str(verdicts.folder()))}"


def _devices() -> Iterator[str]:
    """Each device, what serves each dtype on it and why, and what the self-test found."""
    yield from _served(torch.device("cpu"))
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:
        yield f"gpu       torch cannot say: {_line(error)}"
        return
    if not count:
        yield "gpu       torch sees none"
    for index in range(count):
        device = torch.device("cuda", index)
        yield ""
        yield f"{device}    {_try(functools.partial(_gpu, device))}"
        yield from _served(device)
        yield f"{device}    self-test: {_try(functools.partial(_verdicts, device))}"


def _served(device: torch.device) -> Iterator[str]:
    """What serves each dtype and why, dtypes of one answer together."""
    answers: dict[str, list[str]] = {}
    for dtype in (*DTYPES, torch.float64):
        try:
            backend, reason = tfla.supports(device, dtype, self_test=False)
            answer = f'"{backend}": {reason}'
        except Exception as error:
            answer = f"cannot say: {_line(error)}"
        answers.setdefault(answer, []).append(str(dtype).removeprefix("torch."))
    for answer, names in answers.items():
        yield f"{device!s:9} {', '.join(names)}: {answer}"


def _verdicts(device: torch.device) -> str:
    pair = verdicts.pair_of(device)
    found = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found.append(f"{name} {verdicts.known(pair, name) or 'not run'}")
    needed = "not needed here" if verdicts.is_proven(pair) else "decides here"
    return f"{needed}; {'; '.join(found)}"


def self_test() -> Iterator[tuple[str, bool]]:
    """Run the self-test anew on every device: a line for each dtype, and whether it has passed.
    Where there is no GPU, on the CPU if Triton's interpreter is to run the kernels."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    if not devices and os.environ.get("TRITON_INTERPRET") == "1":
        # What the interpreter makes of a bf16 product is its own fault (Triton 3.6 to 3.9).
        devices, dtypes = [torch.device("cpu")], (torch.float16, torch.float32)
    tested: set[verdicts.Pair] = set()
    for device in devices:
        pair = verdicts.pair_of(device)
        if pair in tested:
            continue
        tested.add(pair)
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            why = dispatch.cannot_serve(device, dtype)
            if why is None:
                found = verdicts.test(pair, device, name, again=True)
                lines, passed = [f"self-test of {name} on {pair}: {found}"], found.passed
                lines += [f"  {line}" for line in found.failed]
                yield "\n".join(lines), passed
            else:
                yield f"self-test of {name} on {pair}: not run: {why}", True


# ---------------------------------------------------------------- the lines


def _try(line: Callable[[], str]) -> str:
    try:
        return line()
    except Exception as error:
        return f"unknown ({_line(error)})"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _short(value: str) -> str:
    """A value on one line, without the name of the user."""
    home = os.path.expanduser("~")
    value = value.replace(home, "~") if len(home) > 1 else value
    return " ".join(value.split())[:200]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*words: str) -> str:
    """What a program prints, "" where it cannot be run."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str:
    """The commit of a clone, with "+" where files differ from it; "" for an installed package."""
    where = ("git", "-C", str(Path(tfla.__file__).parent))
    if not _run(*where, "ls-files", "__init__.py"):
        return ""
    changed = "+" if _run(*where, "status", "--porcelain", ".") else ""
    return f" (commit {_run(*where, 'rev-parse', '--short=12', 'HEAD')}{changed})"


def _system() -> str:
    libc = " ".join(platform.libc_ver()).strip()
    return f"{platform.platform()}{f', {libc}' if libc else ''}"


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {os.cpu_count()} cores, {usable} usable, {torch.get_num_threads()} threads"


def _toolkit() -> str:
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"


def _precision() -> str:
    matmul: Any = torch.backends.cuda.matmul
    return f"fp32 products: {matmul.fp32_precision}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    if error := _compat.triton_error():
        return f"cannot be imported ({error})"
    first, last = (".".join(map(str, v)) for v in (_compat.FIRST_CHECKED, _compat.LAST_CHECKED))
    seen = "checked with" if _compat.triton_is_checked() else "outside of"
    return f"{_compat.triton_release() or 'unknown'}, {seen} {first} to {last}"


def _driver() -> str:
    nvidia = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    words = [f"NVIDIA {nvidia.splitlines()[0]}"] if nvidia else []
    cuda = _compat.driver_cuda_version()
    words += [f"CUDA up to {cuda}"] if cuda else []
    return ", ".join(words) or "none found"


def _gpu(device: torch.device) -> str:
    p = torch.cuda.get_device_properties(device)
    kind = f"compute capability {p.major}.{p.minor}"
    if torch.version.hip:
        kind = str(getattr(p, "gcnArchName", "architecture unknown"))
    shared = getattr(p, "shared_memory_per_block_optin", 0)
    return (
        f"{p.name}, {kind}, {p.multi_processor_count} multiprocessors, "
        f"{p.total_memory / 2**30:.1f} GiB, {shared / 1024:.0f} KiB shared memory a program"
    )
