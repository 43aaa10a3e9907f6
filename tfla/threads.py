"""How many threads torch computes with on a CPU, chosen by the command `tfla`.

torch takes a thread a core. The threads meet after every operation, so one other busy program
makes all of them wait for the one that lost its core; and while they wait, they spin. Both are put
right here: `limit_spinning` bounds the spinning, before torch is imported, and the number of
threads is the one with which steps are fastest now (`Threads.adaptive`, `Threads.fastest`).

Only the command uses this file. The library never changes torch's threads.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tfla.errors import RunError

MOST = 1024  # more threads than that, OpenMP may fail to start

# GNU OpenMP checks so many times whether the other threads have arrived before it sleeps; its own
# number is 300,000. Training of the default model on a virtual machine of 2 cores (Xeon, AVX-512,
# torch 2.13), thousands of tokens a second, medians of 4 turns, alone and beside one busy process:
#
#   threads, checks   1, any   2, 300,000   2, 100,000   2, 30,000   2, 10,000   2, 3,000
#   alone                 24           40           41          40          40         38
#   beside one            22            8            9          12          14         15
#
# Without any spinning (OMP_WAIT_POLICY=passive) two threads are as slow as one, alone too. Where
# other programs came and went, 10,000 was up to a quarter slower than 300,000, 20,000 a tenth.
SPINS = 30_000

# Tokens are drawn one after the other, in operations so small that meeting costs more than it
# gains. A token of models of 0.5, 3.4, 7.3, 20, 57 and 102 million parameters took 0.80, 2.25,
# 3.03, 7.1, 20 and 32 ms with one thread of the same machine, 3.53, 2.37, 2.91, 5.5, 13 and 19 ms
# with two. More than two threads were not measured.
PARAMETERS_PER_THREAD = 10_000_000

BETTER = 0.95  # another number of threads is taken for steps that last less than this share
CLEARLY_BETTER = 0.85  # the same, where the number is kept for a whole run
DRIFT = 0.75, 1.3  # steps that last less or more than expected by this: the choice is made again
MUCH = 3.0  # two steps in a row that last so many times as long as expected: the same, at once
LOOK_AGAIN = 15.0  # seconds of steps: what a neighbour that is gone has freed is found by trying
TRIAL_SHARE = 0.05  # of the time may be lost to trials


# What the user may have told OpenMP: how many threads, and how they wait.
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def limit_spinning() -> None:
    """Let OpenMP's threads sleep where they would spin for long; to be called before torch is
    imported. What the user has set stays."""
    if not os.environ.keys() & {*OPENMP[1:]}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def cores(root: Path = Path("/")) -> int:
    """The cores that this process may use, by its affinity and the quotas of its control groups; a
    part of a core counts as one."""
    try:
        own = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        own = os.cpu_count() or 1
    return max(1, min([own, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Each quota, in cores, of the control groups (versions 1 and 2) that this process is in."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "":
            places = [mounted, mounted / "unified"]
        elif "cpu" in controllers.split(","):
            places = [mounted / "cpu", mounted / controllers]
        else:
            continue
        # In a container the path can be the host's, and its own group the root of what it sees.
        group = Path(path.lstrip("/"))
        for folder in (place / part for place in places for part in (group, *group.parents)):
            try:
                if controllers == "":
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    quota = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
                if quota != "max" and float(quota) > 0 and float(period) > 0:
                    yield float(quota) / float(period)
            except (OSError, ValueError):
                continue


def requested(option: int | None) -> int | None:
    """The number that the user gave: by `--threads`, else by OMP_NUM_THREADS, else none."""
    if option is not None:
        if not 1 <= option <= MOST:
            raise RunError(f"--threads is {option}; it must be from 1 to {MOST}")
        return option
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and 1 <= int(first) <= MOST else None


def for_generation(parameters: int, option: int | None = None) -> int:
    """The number for drawing tokens from a model of that size. It follows from the size and the
    cores alone, not from the load: the same seed writes the same text."""
    return requested(option) or min(cores(), 1 + parameters // PARAMETERS_PER_THREAD)


def counts(most: int) -> list[int]:
    """The numbers of threads that are tried: powers of two, and of many cores all but a few."""
    below = {most - 1, most - most // 4} if most > 2 else set()
    return sorted({2**n for n in range(most.bit_length()) if 2**n <= most} | below | {most})


def words(count: int) -> str:
    """1 thread, 2 threads."""
    return "1 thread" if count == 1 else f"{count} threads"


# A search yields the number of threads of the next step, and is sent the seconds that it took.
Steps = Generator[int, float, None]


def _timed_steps(count: int, best: float) -> Generator[int, float, list[float]]:
    """The seconds of at least three steps and a tenth of a second, or of what two seconds hold; of
    one, where that lasts much longer than the `best` so far."""
    times: list[float] = []
    while not times or not (sum(times) >= 2 or (len(times) >= 3 and sum(times) >= 0.1)):
        times.append((yield count))
        if times[0] > MUCH * best:
            break
    return times


def explore(
    among: Sequence[int], current: int, wide: bool
) -> Generator[int, float, dict[int, list[float]]]:
    """Seconds of steps by number of threads: of `current`, then of fewer and of more, each as long
    as that is better.

    `wide`: where more programs run than cores are free, a few threads less may be no better, and
    one alone the best. So the fewest are tried next: when they are better, then more from there on,
    else all that are fewer than `current`.
    """
    found: dict[int, list[float]] = {}

    def try_each(counts: Sequence[int], to_the_end: bool = False) -> Generator[int, float, None]:
        for count in counts:
            best = min(map(statistics.median, found.values()), default=math.inf)
            found[count] = yield from _timed_steps(count, best)
            if statistics.median(found[count]) >= best and not to_the_end:
                break

    at = among.index(current)
    yield from try_each([current])
    if wide and at > 0:
        yield from try_each(among[:1])
        if _best(found, current, 1.0) != current:
            yield from try_each(among[1:at])
            return found
        yield from try_each(among[1:at][::-1], to_the_end=True)
    else:
        yield from try_each(among[:at][::-1])
    yield from try_each(among[at + 1 :])
    return found


def tune(among: Sequence[int], current: int) -> Steps:
    """Never ends: explore, stay with the fastest, explore again when steps last longer or shorter
    than they did, and after a while in any case. What trials lose is bounded by TRIAL_SHARE."""
    slower, before = True, math.inf
    while True:
        found = yield from explore(among, current, wide=slower)
        current = _best(found, current, BETTER)
        expected = statistics.median(found[current])
        if not slower and expected > DRIFT[1] * before:  # a neighbour came just now
            slower = True
            continue
        before = expected
        lost = sum(seconds - expected for times in found.values() for seconds in times)
        rest = max(0.0, lost) / TRIAL_SHARE
        size = max(5, math.ceil(0.1 / max(expected, 1e-6)))
        latest: list[float] = []
        passed, slower = 0.0, False
        while passed < max(LOOK_AGAIN, rest):
            if len(latest) == size:
                latest = []
            latest.append((yield current))
            passed += latest[-1]
            much = min(latest[-2:]) > MUCH * expected and len(latest) > 1
            if much or (passed >= rest and len(latest) == size and _has_drifted(latest, expected)):
                slower = statistics.median(latest) > expected
                break


def _has_drifted(latest: list[float], expected: float) -> bool:
    low, high = (factor * expected for factor in DRIFT)
    return not low <= statistics.median(latest) <= high


def _best(found: dict[int, list[float]], current: int, share: float) -> int:
    """The fastest; `current` unless a step takes less than `share` of its time with another."""
    seconds = {count: statistics.median(times) for count, times in found.items()}
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < share * seconds[current] else current


KEPT = "kept for the whole run, so that it can be resumed to the same losses"
COMPILED = "kept for the whole run, as its compiled code is made for them"


@dataclasses.dataclass
class Threads:
    """The threads of a command: how many now, whether that changes, and why, in words."""

    count: int
    why: str = ""
    search: Steps | None = None
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def adaptive(cls) -> "Threads":
        """As many as are fastest, step by step, from one to the number of cores."""
        most = cores()
        why = "the number follows the load of the machine" if most > 1 else ""
        threads = cls(most, why, tune(counts(most), most) if most > 1 else None)
        if threads.search is not None:
            threads.count = next(threads.search)
        return threads

    @classmethod
    def fastest(cls, once: Callable[[], object], why: str = "") -> "Threads":
        """As many as `once`, which is called a few times, is fastest with; they stay."""
        threads = cls(cores(), why)
        among = counts(threads.count)
        if len(among) > 1:
            threads.set()
            once()  # what happens only once is not timed
            search = explore(among, threads.count, wide=True)
            current = threads.count
            try:
                threads.count = next(search)
                while True:
                    threads.set()
                    started = threads.clock()
                    once()
                    threads.count = search.send(threads.clock() - started)
            except StopIteration as end:
                threads.count = _best(end.value, current, CLEARLY_BETTER)
        return threads

    @classmethod
    def for_training(
        cls,
        option: int | None,
        *,
        keep: str,
        before: int | None,
        ranks: int,
        once: Callable[[], object],
    ) -> "Threads":
        """What the user asked for, else the choice for a run.

        Args:
            option: the value of `--threads`, or None.
            keep: why the number may not change during the run; empty if it may.
            before: the number that the run had when it was last saved, or None.
            ranks: processes on this machine that share in the run.
            once: a pass like a step's, to be timed where the number is kept.
        """
        if asked := requested(option):
            other = keep == KEPT and before not in (None, asked)
            had = f"the run had {before} so far: its losses now differ in the last digits"
            return cls(asked, had if other else keep)
        if ranks > 1:  # each would measure the others
            return cls(max(1, cores() // ranks))
        if not keep:
            return cls.adaptive()
        try:
            return cls(before, keep) if before else cls.fastest(once, keep)
        except (MemoryError, RuntimeError):  # the run itself will say what is wrong with it
            return cls(cores(), keep)

    def set(self) -> None:
        """Tell torch."""
        import torch

        if torch.get_num_threads() != self.count:
            torch.set_num_threads(self.count)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step: it is timed, and taken with the number that is due."""
        self.set()
        started = self.clock()
        yield
        if self.search is not None:
            self.count = self.search.send(self.clock() - started)

    def __str__(self) -> str:
        return f"{words(self.count)} ({self.why})" if self.why else words(self.count)
