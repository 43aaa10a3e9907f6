"""One rank of tests/test_train_parallel.py: a run over many processes equals that of one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks

from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.parallel import Ranks
from tfla.xlstm.run import resume, start
from tfla.xlstm.train import train

MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
SMALL = MODEL | {"context": 24, "batch": 4, "log_every": 1, "eval_every": 3, "save_every": 3}
SMALL |= {"eval_bytes": 500, "steps": 6}


# The same run, however it is spread.
TRAIN: dict[str, dict[str, Any]] = {
    "data": {},
    "context": {"context_ranks": 2},
    "recompute": {"context_ranks": 2, "recompute": True},
    "sigmoid": {"input_gate": "sigmoid"},
    "accumulate": {"accumulate": 2, "batch": 4},
    "tied": {"tie_embeddings": True},
    "bf16": {"precision": "bf16"},
}
ON_FOUR = ("context", "accumulate")  # the others on two


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


def refused(words: str, act: Callable[[], object], group: Any) -> None:
    """By one line on rank 0, without one on the others."""
    try:
        act()
    except (RunError, SystemExit) as error:
        assert isinstance(error, RunError) == (group.rank() == 0)
        assert group.rank() or words in str(error), error
        return
    raise AssertionError("not refused")


def wrong_mesh(group: Any) -> None:
    refused("--context-ranks is 3, wanted a divisor", lambda: Ranks("cpu", 3), group)


def odd_batch(group: Any) -> None:
    folder = Path(os.environ["RUNS"], f"odd-{group.size()}")
    place, given = Ranks("cpu"), values("data") | {"batch": 5}
    words = "--batch is 5, wanted a multiple"
    refused(words, lambda: place.share(lambda: start(folder, given)), group)


def no_corpus(group: Any) -> None:
    folder = Path(os.environ["RUNS"], f"none-{group.size()}")
    given = values("data") | {"paths": [folder / "nowhere"]}
    refused("does not exist", lambda: Ranks("cpu").share(lambda: start(folder, given)), group)


def other_corpus(group: Any) -> None:
    """As when ranks see different disks: the last one finds other tokens than the first."""
    folder = Path(os.environ["RUNS"], f"other-{group.size()}")

    def make() -> Any:
        run = start(folder, values("data"))
        with (folder / "data" / "train.bin").open("r+b") as stream:
            stream.write(b"??")
        return run

    refused("is not the corpus", lambda: Ranks("cpu").share(make), group)


def names(world: int) -> tuple[str, ...]:
    return ON_FOUR if world == 4 else tuple(TRAIN)


def checks(world: int) -> dict[str, Callable[[Any], None]]:
    found = {name: trains(name) for name in names(world)} | {"goes on": goes_on}
    more = {"other corpus": other_corpus, "no corpus": no_corpus}
    return found | more | {"odd batch": odd_batch, "wrong mesh": wrong_mesh}


if __name__ == "__main__":
    ranks.main(checks(int(os.environ["WORLD_SIZE"])))
