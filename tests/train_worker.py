"""One rank of tests/test_train_parallel.py: a run over many processes equals that of one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks

from tfla.xlstm.parallel import Ranks
from tfla.xlstm.run import resume, start
from tfla.xlstm.train import train

MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
SMALL = MODEL | {"context": 24, "batch": 4, "log_every": 1, "eval_every": 3, "save_every": 3}
SMALL |= {"eval_bytes": 500, "steps": 6}


TRAIN = {  # the same run, however it is spread
    "data": {},
    "context": {"context_ranks": 2},
    "recompute": {"context_ranks": 2, "recompute": True},
    "sigmoid": {"input_gate": "sigmoid"},
    "accumulate": {"accumulate": 2, "batch": 4},
    "tied": {"tie_embeddings": True},
}


def values(name: str) -> dict[str, Any]:
    own = {k: x for k, x in TRAIN[name].items() if k not in ("context_ranks", "recompute")}
    return SMALL | own | {"paths": [Path(json.__file__).parent]}


def trains(name: str) -> Callable[[Any], None]:
    def check(group: Any) -> None:
        folder = Path(os.environ["RUNS"], f"{name}-{group.size()}")
        own = {k: TRAIN[name].get(k) for k in ("context_ranks", "recompute") if k in TRAIN[name]}
        place = Ranks("cpu", **own)
        list(train(place.share(lambda: start(folder, values(name))), place))

    return check


def goes_on(group: Any) -> None:
    """From step 3 of a run of one process to the end."""
    folder = Path(os.environ["RUNS"], f"broken-{group.size()}")
    place = Ranks("cpu", context_ranks=2)
    list(train(place.share(lambda: resume(folder, {})), place))


CHECKS = {name: trains(name) for name in TRAIN} | {"goes on": goes_on}

if __name__ == "__main__":
    ranks.main(CHECKS)
