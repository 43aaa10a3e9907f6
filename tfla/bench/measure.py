"""Time, memory and the machine: everything that is measured is measured here.

Runs are timed in turns (A B B A A B), so that a slow moment of the machine meets all of them and
none is always the first, each with the last-level cache flushed and inputs other than the turn
before.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tfla

Run = Callable[[int], object]  # called with the number of the turn


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that was launched; on a CPU nothing is to be waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _larger_than_cache(device: torch.device) -> torch.Tensor:
    """A buffer to overwrite, so that nothing else is left in the last-level cache."""
    size = 64 << 20
    if device.type == "cuda":
        level_2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = max(256 << 20, 4 * level_2)
    return torch.empty(size, dtype=torch.int8, device=device)


def in_turns(
    runs: Mapping[str, Run], device: torch.device, repeats: int, seconds: float, warm: int
) -> dict[str, list[float] | Exception]:
    """Milliseconds of each call of each run, or what it raised.

    `repeats` turns, fewer (but 3) when `seconds` have passed, after `warm` that are not counted.
    On a GPU between two events on the stream, elsewhere by the clock.
    """
    flush, cuda = _larger_than_cache(device), device.type == "cuda"
    marks: dict[str, list[Any]] = {name: [] for name in runs}
    failed: dict[str, Exception] = {}
    began = time.perf_counter()
    for turn in range(warm + repeats):
        late = time.perf_counter() - began > seconds
        if late and turn >= warm + 3:
            break
        if turn == warm:
            began = time.perf_counter()
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            if name in failed:
                continue
            try:
                flush.zero_()
                if cuda:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    run(turn)
                    end.record()
                    mark: Any = (start, end)
                else:
                    before = time.perf_counter()
                    run(turn)
                    mark = (time.perf_counter() - before) * 1e3
            except Exception as error:  # a run that fails is a line of the table
                failed[name] = error
                continue
            if turn >= warm:
                marks[name].append(mark)
    synchronize(device)
    times = {
        name: [a.elapsed_time(b) for a, b in found] if cuda else found
        for name, found in marks.items()
    }
    return {name: failed.get(name, times[name]) for name in runs}


def until_done(
    call: Callable[[], object],
    device: torch.device,
    repeats: int,
    warm: int,
    *,
    seconds: float = math.inf,
    before: Callable[[], object] = lambda: None,
) -> list[float]:
    """Milliseconds by the clock of each call until the device is done: what a user waits for.

    `repeats` calls after `warm` that do not count; once `seconds` have passed, 2 after 1 are
    enough. `before` is called ahead of each, outside of the clock.
    """
    times: list[float] = []
    first = time.perf_counter()
    for turn in range(warm + repeats):
        before()
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        now = time.perf_counter()
        late = now - first > seconds
        if turn >= (min(warm, 1) if late else warm):
            times.append((now - began) * 1e3)
        if late and len(times) >= 2:
            break
    return times


def host_us(run: Run, device: torch.device, repeats: int = 20) -> float | None:
    """Until a call returns to the host, the device idle before: None where the host computes."""
    if device.type != "cuda":
        return None
    times = []
    for turn in range(repeats):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        run(turn)
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize(device)
    return statistics.median(times) * 1e6


def by_launch(run: Callable[[], object], calls: int = 8) -> list[tuple[str, float]]:
    """(kernel, median microseconds) of the launches of a call on a GPU, in order."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [e for e in seen.events() if e.device_type == on_device]
    events.sort(key=lambda e: e.time_range.start)
    each = len(events) // calls
    return [
        (events[n].name, statistics.median(e.time_range.elapsed_us() for e in events[n::each]))
        for n in range(each)
    ]


def by_kernel(call: Callable[[], object], device: torch.device) -> list[tuple[str, int, float]]:
    """What the device (on a CPU: torch) spends most on in a call: name, launches, milliseconds."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if cuda else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        synchronize(device)
    where = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = [
        (e.key, e.count, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3)
        for e in profile.key_averages()
        if e.device_type == where
    ]
    return sorted(found, key=lambda row: -row[2])


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most that torch's allocator has handed out during a call over what it had before."""
    with peak(device) as found:
        kept = run(0)
    del kept
    return found.bytes


@dataclass
class Peak:
    """What `peak` has found, once its block has ended."""

    bytes: int = 0


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """The most that torch's allocator hands out within the block over what it had before.

    On a CPU from the allocator's own records, which the profiler collects: no other process and no
    page of the operating system is in it.
    """
    found = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    os.environ["KINETO_LOG_LEVEL"] = "99"  # or the profiler writes into tables
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    events = profile.profiler.kineto_results.events()
    now = 0
    moves = (event for event in events if event.name() == "[memory]")
    for event in sorted(moves, key=lambda event: event.start_ns()):
        now += event.nbytes()
        found.bytes = max(found.bytes, now)


def ceiling(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What this device reaches in a copy and in a matrix product: the limits of all else."""
    cuda = device.type == "cuda"
    words, n = (1 << 29, 8192) if cuda else (1 << 25, 2048)
    with torch.no_grad():
        x = torch.zeros(words, device=device)
        y = torch.zeros_like(x)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        runs: dict[str, Run] = {"copy": lambda _: y.copy_(x), "matmul": lambda _: a @ b}
        found = in_turns(runs, device, 30 if cuda else 5, 20.0 if cuda else 5.0, 5 if cuda else 1)
    best = {}
    for name, times in found.items():
        if isinstance(times, Exception):
            raise times
        best[name] = min(times) / 1e3  # the machine's limit: what it reaches when undisturbed
    return {
        "bytes_per_s": 2 * 4 * words / best["copy"],
        "flops_per_s": 2 * n**3 / best["matmul"],
        "dtype": str(dtype).removeprefix("torch."),
        "how": f"best of a copy of {4 * words >> 20} MiB and of a {n} x {n} product",
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know to judge or to repeat a number; no names of hosts or people."""
    info: dict[str, Any] = {
        "device": _cpu() if device.type == "cpu" else str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fp32_products": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "capability": None if torch.version.hip else (properties.major, properties.minor),
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        }
    for package in ("triton", "mlstm_kernels", "xlstm", "transformers", "fla-core", "mamba-ssm"):
        try:
            info[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return info


def commit() -> str | None:
    """The commit of the sources, with "+" where they differ from it; None outside of a clone."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(tfla.__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None  # installed somewhere below a clone of something else
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except OSError:
        return None


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()
