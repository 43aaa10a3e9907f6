"""The command's threads: fastest beside whatever else runs, kept where losses depend on them."""

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from tfla import cli, threads
from tfla.errors import RunError
from tfla.threads import Threads, counts, explore, tune
from tfla.xlstm import checkpoint
from tfla.xlstm.train import read_metrics

PACKAGE = Path(threads.__file__).parent
TINY = "--hidden-size 16 --num-layers 1 --num-heads 2 --context 32 --batch 2 --eval-bytes 500"


# ------------------------------------------------------------------------------- the search


class Machine:
    """Seconds of a step, by threads and by the programs that run beside.

    A step of one thread lasts `step` seconds alone; threads meet, which costs each a little. With
    more threads than cores that are free, all wait for one that has to share its core, `stall`
    times as long.
    """

    def __init__(self, cores: int, step: float, stall: float, noise: float = 0.0) -> None:
        self.cores, self.step, self.stall, self.noise = cores, step, stall, noise
        self.random = Random(0)

    def seconds(self, count: int, neighbours: int) -> float:
        alone = self.step * (0.95 / count + 0.05 + 0.01 * (count - 1) / self.cores)
        waits = self.stall if count > 1 and count > self.cores - neighbours else 1.0
        if count == 1 and neighbours >= self.cores:
            waits = (neighbours + 1) / self.cores
        return alone * waits * (1 + self.noise * self.random.uniform(-1, 1))

    def run(self, seconds: float, neighbours: Callable[[float], int]) -> list[tuple[float, int]]:
        """The end of each step, and its threads."""
        search = tune(counts(self.cores), self.cores)
        count, now, steps = next(search), 0.0, []
        while now < seconds:
            took = self.seconds(count, neighbours(now))
            now += took
            steps.append((now, count))
            count = search.send(took)
        return steps


def rate(steps: list[tuple[float, int]], start: float, end: float) -> float:
    """Steps a second between two times."""
    return sum(start <= at < end for at, _ in steps) / (end - start)


def best(machine: Machine, neighbours: int) -> float:
    """The rate of the best number of threads."""
    quiet = Machine(machine.cores, machine.step, machine.stall)
    return 1 / min(quiet.seconds(count, neighbours) for count in counts(machine.cores))


@pytest.mark.parametrize("cores", [2, 3, 4, 16, 64])
@pytest.mark.parametrize("step", [0.002, 0.09, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_alone_a_tenth_of_the_time_is_not_lost(cores: int, step: float, noise: float) -> None:
    machine = Machine(cores, step, stall=3.0, noise=noise)
    steps = machine.run(100.0, lambda now: 0)
    assert rate(steps, 0, 100) > best(machine, 0) / 1.1


@pytest.mark.parametrize("cores", [2, 4, 16])
@pytest.mark.parametrize("step", [0.02, 0.2])
@pytest.mark.parametrize("stall", [3.0, 30.0])
@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("begins", [0.0, 1.0, 40.0, 43.7, 47.0, 55.9])
def test_a_neighbour_costs_its_share_and_for_as_long_as_it_runs(
    cores: int, step: float, stall: float, neighbours: int, begins: float
) -> None:
    """Ten seconds after it begins as good as one thread, sixty after its end as if alone."""
    machine = Machine(cores, step, stall, noise=0.1)
    steps = machine.run(400.0, lambda now: neighbours if begins <= now < 200 else 0)
    one_thread = 1 / Machine(cores, step, stall).seconds(1, neighbours)
    for start in range(math.ceil(begins) + 10, 171, 20):
        assert rate(steps, start, start + 30) > 0.8 * one_thread, start
    assert rate(steps, 260, 400) > best(machine, 0) / 1.1


def test_many_threads_are_tried_from_the_top() -> None:
    """One thread of many takes as long as all the others together: once is enough."""
    tried = [count for _, count in Machine(64, 1.0, stall=3.0).run(300.0, lambda now: 0)]
    assert tried[0] == 64 and tried.count(1) == 1


def test_a_single_slow_step_changes_nothing() -> None:
    """A laptop that slept, a page that came from disk."""
    search = tune([1, 2], 2)
    count, seen = next(search), []
    for number in range(150):
        seen.append(count)
        count = search.send(50.0 if number == 120 else {1: 0.09, 2: 0.05}[count])
    assert set(seen[20:120]) == {2}
    assert seen[121] == 2


def test_counts_are_powers_of_two_and_all_but_a_few() -> None:
    assert [counts(n) for n in (1, 2, 3, 4, 6)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 3, 4],
        [1, 2, 4, 5, 6],
    ]
    assert counts(16) == [1, 2, 4, 8, 12, 15, 16]


def test_exploring_stops_where_fewer_are_slower_and_goes_up_too() -> None:
    times = {0: 9.5, 1: 9.0, 2: 5.0, 3: 4.0, 4: 4.5}
    for among, wide, wanted in (
        ([1, 2, 3, 4], False, [2, 1, 3, 4]),
        ([0, 1, 2, 3], False, [2, 1, 3]),
        ([0, 1, 2, 3], True, [2, 0, 1, 3]),
        ([3, 4, 1, 2], True, [2, 3, 4]),
    ):
        search = explore(among, 2, wide)
        count = next(search)
        try:
            while True:
                count = search.send(times[count])
        except StopIteration as end:
            assert list(end.value) == wanted
            assert all(set(seconds) == {times[n]} for n, seconds in end.value.items())


# ------------------------------------------------------------------------------- the choice


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is set by the user, and there are two cores."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "cores", lambda: 2)
    return monkeypatch


def test_an_option_wins_over_the_environment(free: pytest.MonkeyPatch) -> None:
    assert threads.requested(None) is None and threads.requested(3) == 3
    free.setenv("OMP_NUM_THREADS", "4,2")
    assert threads.requested(None) == 4 and threads.requested(3) == 3
    for nonsense in ("", "many", "0", "-1", "99999999"):
        free.setenv("OMP_NUM_THREADS", nonsense)
        assert threads.requested(None) is None
    for wrong in (0, -1, 100_000):
        with pytest.raises(RunError, match=f"--threads is {wrong}; it must be from 1 to"):
            threads.requested(wrong)


def test_small_models_write_with_one_thread(free: pytest.MonkeyPatch) -> None:
    sizes = [1, 500_000, 9_999_999, 10_000_000, 10**9]
    assert [threads.for_generation(size) for size in sizes] == [1, 1, 1, 2, 2]
    free.setattr(threads, "cores", lambda: 1)
    assert threads.for_generation(10**9) == 1
    assert threads.for_generation(1, 5) == 5


@pytest.mark.parametrize(("seconds", "count"), [({1: 4, 2: 3}, 2), ({1: 3, 2: 4}, 1), ({}, 2)])
def test_the_fastest_for_a_whole_run_is_found_by_trying(
    seconds: dict[int, float], count: int, free: pytest.MonkeyPatch
) -> None:
    """Where both are alike, as many as torch takes by itself."""
    now = [0.0]

    def once() -> None:
        now[0] += seconds.get(torch.get_num_threads(), 1.0)

    free.setattr(Threads, "clock", staticmethod(lambda: now[0]))
    free.setattr(Threads.__init__, "__defaults__", ("", None, lambda: now[0]))
    assert Threads.fastest(once).count == count


def choose(option: int | None = None, **given: object) -> Threads:
    values = {"keep": threads.KEPT, "before": None, "ranks": 1, "once": lambda: None} | given
    return Threads.for_training(option, **values)


def test_what_a_run_computes_with(free: pytest.MonkeyPatch) -> None:
    kept = "kept for the whole run"
    adaptive = choose(keep="")
    assert adaptive.search is not None and "follows the load" in str(adaptive)
    assert choose(keep="", before=1).search is not None
    assert choose(before=1).count == 1 and kept in str(choose(before=1))
    fixed = choose(1)
    assert fixed.count == 1 and fixed.search is None and kept in str(fixed)
    compiled = choose(2, keep=threads.COMPILED, before=1)
    assert str(compiled) == f"2 threads ({threads.COMPILED})" and compiled.search is None
    assert choose(once=lambda: torch.empty(2**60)).count == 2  # the run says what is wrong
    assert "the run had 1 so far" in str(choose(2, before=1))
    assert str(choose(2, keep="")) == "2 threads" and str(choose(1, keep="")) == "1 thread"
    free.setenv("OMP_NUM_THREADS", "2")
    assert choose().count == 2 and choose(keep="").search is None
    free.delenv("OMP_NUM_THREADS")
    assert choose(ranks=2, keep="") == Threads(1) and choose(ranks=8).count == 1
    free.setattr(threads, "cores", lambda: 1)
    assert choose(keep="").search is None and str(choose(keep="")) == "1 thread"


def test_the_user_says_how_openmp_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setattr(os, "environ", {name: "active"})
        threads.limit_spinning()
        assert os.environ == {name: "active"}
    monkeypatch.setattr(os, "environ", {})
    threads.limit_spinning()
    assert os.environ == {"GOMP_SPINCOUNT": str(threads.SPINS)}


CGROUP_2 = {"proc/self/cgroup": "0::/a/b\n"}
CGROUP_1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,cpuacct:/a\n3:cpuset:/\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8),
        (CGROUP_2, 8),
        (CGROUP_2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        (CGROUP_2 | {"sys/fs/cgroup/a/b/cpu.max": "200000 100000\n"}, 2),
        (CGROUP_2 | {"sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 1),
        (CGROUP_2 | {"sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 2),
        (CGROUP_2 | {"sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),  # of a parent
        (CGROUP_2 | {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),  # all that a container sees
        (CGROUP_2 | {"sys/fs/cgroup/a/b/cpu.max": "9900000 100000\n"}, 8),
        (CGROUP_2 | {"sys/fs/cgroup/a/b/cpu.max": "nonsense\n"}, 8),
        (
            CGROUP_1
            | {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        (
            CGROUP_1
            | {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            CGROUP_1
            | {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
    ],
)
def test_cores_by_affinity_and_quota(
    files: dict[str, str], wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert threads.cores(tmp_path) == wanted
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert threads.cores(tmp_path) == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert threads.cores(tmp_path) == wanted


def test_only_the_command_changes_torchs_threads() -> None:
    changes = re.compile(r"set_num_(interop_)?threads|OMP_NUM_THREADS\"\] *=")
    found = [path.name for path in PACKAGE.rglob("*.py") if changes.search(path.read_text())]
    assert found == ["threads.py"]
    uses = re.compile(r"^ *(from tfla.threads|from tfla import .*threads)", re.M)
    found = [p.stem for p in PACKAGE.rglob("*.py") if uses.search(p.read_text())]
    assert sorted(found) == ["cli", "demo", "language", "render"]


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "lines").write_text("".join(f"{n} and {n + 1} is {2 * n + 1}\n" for n in range(4000)))
    return folder


def run(line: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert cli.run_command(line.split()) == 0
    return capfd.readouterr().out


def test_a_run_by_steps_keeps_its_threads_and_says_so(
    text: Path, tmp_path: Path, free: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    free.setenv("COLUMNS", "200")
    out = tmp_path / "run"
    line = f"train {text} --out {out} {TINY} --log-every 1"
    said = run(f"{line} --steps 2 --threads 2", capfd)
    assert "on CPU, 2 threads (kept for the whole run" in said
    for step in (0, 2):
        saved = checkpoint.load(out / "checkpoints" / f"step-{step:08d}")
        assert saved.meta["threads"] == 2
    free.setattr(threads, "cores", lambda: 1)  # what would be chosen today
    said = run(f"train --out {out} --resume --steps 4", capfd)
    assert "on CPU, 2 threads (kept for the whole run" in said
    free.setenv("OMP_NUM_THREADS", "1")
    said = run(f"train --out {out} --resume --steps 6", capfd)
    assert "on CPU, 1 thread (the run had 2 so far" in said
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["event"] == "train"]
    assert [r["threads"] for r in records] == [2, 2, 2, 2, 1, 1]


def test_a_trial_leaves_no_trace_in_a_run(
    text: Path, tmp_path: Path, free: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same losses whether the threads were given or found."""
    free.setattr(threads, "_best", lambda *_: 1)
    losses = []
    for name, more in (("found", ""), ("given", "--threads 1")):
        out = tmp_path / name
        said = run(f"train {text} --out {out} {TINY} --steps 3 --log-every 1 {more}", capfd)
        assert "on CPU, 1 thread (kept for the whole run" in said
        first = checkpoint.load(out / "checkpoints" / "step-00000000")
        assert first.meta["threads"] == 1
        records = read_metrics(out / "metrics.jsonl")
        losses.append([r["loss"] for r in records if r["event"] == "train"])
    assert losses[0] == losses[1]


def test_a_run_by_the_clock_follows_the_load(
    text: Path, tmp_path: Path, free: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By turns with two threads and with one, and by a clock that every look at it moves on."""

    def turns(among: list[int], current: int) -> Iterator[int]:
        assert (among, current) == ([1, 2], 2)
        while True:
            yield 2
            yield 1

    ticks = itertools.count()
    free.setattr(threads, "tune", turns)
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 16)
    free.setattr("tfla.xlstm.train.time", clock)
    out = tmp_path / "run"
    said = run(f"train {text} --out {out} {TINY} --seconds 2 --log-every 1", capfd)
    assert "on CPU, 2 threads (the number follows the load of the machine)" in said
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["event"] == "train"]
    assert [r["threads"] for r in records[:4]] == [2, 1, 2, 1]
    assert "thread, " in said or "threads, " in said
    run(f"generate {out} x --tokens 3", capfd)
    assert torch.get_num_threads() == 1
    run(f"generate {out} x --tokens 3 --threads 2", capfd)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("line", ["train", "generate RUN x", "demo"])
def test_threads_that_cannot_be_are_one_line(
    line: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command([*line.split(), "--threads", "0"]) == 2
    said = capfd.readouterr().err
    assert said == f"tfla: --threads is 0; it must be from 1 to {threads.MOST}\n"


# ------------------------------------------------------------------------------- imports


def modules(line: str, program: str = "/usr/bin/tfla") -> set[str]:
    """What is imported by the command when it ends."""
    code = f"""
import sys
sys.argv = [{program!r}, *{line.split()!r}]
from tfla.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
finally:
    print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("line", ["", "--help", "--version", "train --help", "generate --help"])
def test_help_waits_for_nothing_but_what_prints_it(line: str) -> None:
    heavy = {"torch", "numpy", "matplotlib", "safetensors", "tokenizers", "triton", "sympy"}
    assert not modules(line) & heavy
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tfla", *line.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert "tfla.cli" in imported and not imported & heavy


def test_help_shows_the_commands_that_it_did_not_import(capfd: pytest.CaptureFixture[str]) -> None:
    """As it does once they are there."""
    before = run("--help", capfd)
    assert cli.run_command(["bench", "--help"]) == 0
    assert "kernels" in capfd.readouterr().out
    after = run("--help", capfd)
    assert sorted(before.splitlines()) == sorted(after.splitlines())


def test_generation_imports_what_it_uses(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.run_command(f"train {text} --out {out} {TINY} --steps 1".split()) == 0
    found = modules(f"generate {out} x --tokens 5")
    assert {"torch", "safetensors", "tfla.xlstm.writer"} <= found
    unused = {
        "matplotlib",
        "rich",
        "tokenizers",
        "transformers",
        "sympy",
        "triton",
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.fsdp",
        "tfla.xlstm.train",
        "tfla.xlstm.parallel",
        "tfla.bench.cli",
        "tfla.demo",
        "tfla.render",
    }
    assert not found & unused
