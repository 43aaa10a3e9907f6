"""One rank of tests/test_train_parallel.py: a run over many processes equals that of one."""

import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from seals import seal_files

from tfla.xlstm import checkpoint
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.parallel import Ranks
from tfla.xlstm.run import Run, resume, start
from tfla.xlstm.train import train
from tfla.xlstm.writer import read_base

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
    "narrow": {"hidden_size": 2, "num_heads": 1},  # on four, some hold nothing of a matrix
    "from another": {"init": "data", "lr": 1e-3},
    "from another, tied": {"init": "tied"},
    "compiled": {"compile": True},
    "compiled, context": {"compile": True, "recompute": True, "context_ranks": 2},
}
PLACE = ("context_ranks", "recompute", "compile")
FILES = ("model", "optimizer")
ON_FOUR = ("context", "accumulate", "narrow")  # the others on two


def values(name: str) -> dict[str, Any]:
    own = {k: x for k, x in TRAIN[name].items() if k not in (*PLACE, "init")}
    return SMALL | own | {"paths": [Path(json.__file__).parent]}


def begin(folder: Path, name: str) -> Run:
    """The run of that name, from its seed or from another run beside it."""
    init = TRAIN[name].get("init")
    return start(folder, values(name), None, read_base(folder.parent / init) if init else None)


def trains(name: str) -> Callable[[Any], None]:
    def check(group: Any) -> None:
        folder = Path(os.environ["RUNS"], f"{name}-{group.size()}")
        place = Ranks("cpu", **{k: x for k, x in TRAIN[name].items() if k in PLACE})
        run = place.share(lambda: begin(folder, name))
        if not place.compile:
            list(train(run, place))
            return
        torch.compiler.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, while it compiles
            list(train(run, place))
        # Blocks share one graph to learn from and one to be judged by, whatever the step.
        assert graphs["unique_graphs"] <= 3, dict(graphs)

    return check


def goes_on(group: Any) -> None:
    """From step 3 of a run of one process to the end."""
    folder = Path(os.environ["RUNS"], f"broken-{group.size()}")
    place = Ranks("cpu", context_ranks=2)
    list(train(place.share(lambda: resume(folder, {})), place))


def reads_what_is_listed(group: Any) -> None:
    """As above, beside a file of other weights that checkpoint.json does not list."""
    folder = Path(os.environ["RUNS"], f"listed-{group.size()}")
    path = checkpoint.load(folder).path
    if group.rank() == 0:
        weights = load_file(path / "model.safetensors")
        save_file({n: x + 1 for n, x in weights.items()}, path / "a.safetensors")
        save_file({n: x + 1 for n, x in weights.items()}, path / "model-00001.safetensors")
    dist.barrier()
    place = Ranks("cpu")
    list(train(place.share(lambda: resume(folder, {})), place))


def other_moments(group: Any) -> None:
    """Moments that are not the parameters' own are refused on all ranks, before they are used."""
    folder = Path(os.environ["RUNS"], f"moments-{group.size()}")
    path = checkpoint.load(folder).path
    whole = (path / "optimizer.safetensors").read_bytes()
    place, name = Ranks("cpu"), "blocks.0.ffn.up.weight/exp_avg"
    for harm, words in (
        (lambda x: x[:7].clone(), "is (7, 32); the model needs"),
        (lambda x: x.half(), "is float16; the model needs float32"),
        (None, "the checkpoint lacks blocks.0.ffn.up.weight/exp_avg"),
    ):
        dist.barrier()
        if group.rank() == 0:
            (path / "optimizer.safetensors").write_bytes(whole)
            moments = load_file(path / "optimizer.safetensors")
            moment = moments.pop(name)
            moments |= {name: harm(moment)} if harm else {}
            save_file(moments, path / "optimizer.safetensors")
            seal_files(path)
        dist.barrier()
        run = place.share(lambda: resume(folder, {}))
        refused(words, lambda: list(train(run, place)), group)  # noqa: B023


def writes_beside_training(group: Any) -> None:
    """The checkpoint of step 3 waits for steps 4 and 5; each rank writes half of it, no pickle."""
    folder = Path(os.environ["RUNS"], f"beside-{group.size()}")
    place, trained, real = Ranks("cpu"), threading.Event(), checkpoint.save

    def save(run: Path, meta: Any, *args: Any, **options: Any) -> Any:
        assert meta["step"] != 3 or trained.wait(600)
        return real(run, meta, *args, **options)

    with mock.patch.object(checkpoint, "save", save):
        for record in train(place.share(lambda: start(folder, values("data"))), place):
            if record["step"] == 5:
                assert checkpoint.load(folder).meta["step"] == 0 or not place.main
                trained.set()
    last = checkpoint.load(folder)
    assert last.meta["step"] == 6
    parts = [f"{name}-{rank:05d}.safetensors" for name in FILES for rank in range(group.size())]
    assert last.meta["files"].keys() == set(parts)
    assert {path.name for path in last.path.iterdir()} == {"checkpoint.json", *parts}
    sizes = [last.meta["files"][part]["bytes"] for part in parts if part.startswith("model")]
    assert max(sizes) < 1.3 * min(sizes), sizes
    assert not list(folder.rglob("*.tmp"))


def no_space(group: Any) -> None:
    """A checkpoint that one rank cannot write ends all, with one line, and is none."""
    folder = Path(os.environ["RUNS"], f"full-{group.size()}")
    place, real = Ranks("cpu"), checkpoint.seal

    def seal(path: Path) -> Any:
        if group.rank() == group.size() - 1 and "model" in path.name:
            raise OSError("No space left on device")
        return real(path)

    def act() -> None:
        with place.together():
            list(train(place.share(lambda: start(folder, values("data"))), place))

    with mock.patch.object(checkpoint, "seal", seal):
        refused(f"rank {group.size() - 1} wrote no checkpoint: No space left", act, group)
    assert not checkpoint.exists(folder)


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
    refused("--context-ranks is 3; it must be a divisor", lambda: Ranks("cpu", 3), group)


def odd_batch(group: Any) -> None:
    folder = Path(os.environ["RUNS"], f"odd-{group.size()}")
    place, given = Ranks("cpu"), values("data") | {"batch": 5}
    words = "--batch is 5; it must be a multiple"
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
    found |= {"listed": reads_what_is_listed, "moments": other_moments}
    found |= {"beside": writes_beside_training, "no space": no_space}
    more = {"other corpus": other_corpus, "no corpus": no_corpus}
    return found | more | {"odd batch": odd_batch, "wrong mesh": wrong_mesh}


if __name__ == "__main__":
    ranks.main(checks(int(os.environ["WORLD_SIZE"])))
