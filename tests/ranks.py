"""Tests that need several processes: started once, they run many checks and report on each.

A worker module lists its checks in CHECKS (name -> function of the group) and ends in
`ranks.main(CHECKS)`. `run` starts it once a rank, over gloo, and returns what went wrong by name.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

Outcome = dict[str, list[str]]  # of each check, what every rank says: "" is well
MINUTES = 30  # the last resort for processes that wait for each other; no test is judged by it


def run(worker: str, world: int, **environment: str) -> Outcome:
    """The worker tests/`worker`.py in `world` processes; when one of them fails, those that may be
    waiting for it are killed."""
    tests = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        environment = (
            os.environ
            | environment
            | {
                "WORLD_SIZE": str(world),
                "RANKS_FOLDER": folder,
                "PYTHONPATH": os.pathsep.join(
                    [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
                ),
            }
        )
        outputs = [Path(folder, f"{rank}.txt") for rank in range(world)]
        processes = []
        for rank, output in enumerate(outputs):
            with output.open("w") as stream:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "error", str(tests / f"{worker}.py")],
                        env=environment | {"RANK": str(rank)},
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        limit = time.monotonic() + 60 * MINUTES
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes) or time.monotonic() > limit:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = [output.read_text(errors="replace") for output in outputs]
        files = [Path(folder, f"{rank}.json") for rank in range(world)]
        assert all(file.exists() for file in files), "\n".join(said)
        outcomes = [json.loads(file.read_text()) for file in files]
    return {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}


def failures(outcome: Outcome) -> dict[str, str]:
    """What the first rank that failed said, by check."""
    return {n: next(filter(None, said)) for n, said in outcome.items() if any(said)}


def main(checks: Mapping[str, Callable[[Any], None]]) -> None:
    """Run the checks in this process, one of several."""
    import torch.distributed as dist

    warnings.simplefilter("error")
    if os.environ.get("TRITON_INTERPRET"):  # NumPy's: of numbers that are selected away, of age
        warnings.simplefilter("ignore")
    folder, rank, world = (os.environ[x] for x in ("RANKS_FOLDER", "RANK", "WORLD_SIZE"))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(minutes=MINUTES / 2),
    )
    outcome = {}
    for name, check in checks.items():
        try:
            check(dist.group.WORLD)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
