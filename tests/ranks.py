"""Tests that need several processes: started once, they run many checks and report on each.

A worker module lists its checks in CHECKS (name -> function of the group) and ends in
`ranks.main(CHECKS)`. `run` starts it once a rank, over gloo, and returns what went wrong by name.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

Outcome = dict[str, list[str]]  # of each check, what every rank says: "" is well


def run(worker: str, world: int, seconds: float = 900, **environment: str) -> Outcome:
    """The worker tests/`worker`.py in `world` processes; those that hang are killed."""
    tests = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | environment | {
            "WORLD_SIZE": str(world), "RANKS_FOLDER": folder, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
            ),
        }  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", str(tests / f"{worker}.py")],
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
            for rank in range(world)
        ]
        try:
            said = [process.communicate(timeout=seconds)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        files = [Path(folder, f"{rank}.json") for rank in range(world)]
        assert all(file.exists() for file in files), "\n".join(said)
        outcomes = [json.loads(file.read_text()) for file in files]
    return {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}


def failures(outcome: Outcome) -> dict[str, str]:
    """What the first rank that failed said, by check."""
    return {n: next(filter(None, said)) for n, said in outcome.items() if any(said)}


def main(checks: Mapping[str, Callable[[Any], None]]) -> None:
    """Run the checks in this process, one of several."""
    import torch
    import torch.distributed as dist

    if hasattr(os, "nice"):  # more processes than cores: tests that watch the clock go first
        os.nice(10)
    warnings.simplefilter("error")
    if os.environ.get("TRITON_INTERPRET"):  # NumPy's: of numbers that are selected away, of age
        warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, rank, world = (os.environ[x] for x in ("RANKS_FOLDER", "RANK", "WORLD_SIZE"))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(world),
        timeout=timedelta(seconds=40),
    )  # fmt: skip
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
