"""What `tfla bench language` trains, and the folder that a study stands in.

    OUT/language/
        study.json      what was asked for: a study that is resumed must be the same one
        data/           the corpus, which all trainings read (tfla.xlstm.data)
        plan.json       the speed of each model here, and the steps that therefore fit
        exp-lr0.002-seed0/
                        a training (tfla.xlstm.run), and its result.json once it is judged

Nothing but these files says where a study stands, so whoever is killed goes on where they end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfla.bench.attention import CausalAttention
from tfla.bench.runs import Row
from tfla.errors import RunError
from tfla.xlstm import files
from tfla.xlstm.data import Corpus, open_corpus, prepare
from tfla.xlstm.model import Mixer, MLSTMLayer
from tfla.xlstm.run import TrainOptions

NAMES = {"tfla exp": "exp", "tfla sigmoid": "sigmoid", "attention": None}  # and their input gate
SAME_SIZE = 0.01  # by how much the numbers of parameters may differ
LONG = 8  # times the context of training: the windows in which bits by position are measured
EVALUATIONS = 8  # of a training, evenly spread
MOST_EPOCHS = 2  # of the text in a training: what is read more often is learnt by heart
FEWEST_STEPS = 10
SAVE_SECONDS = 30.0  # between two checkpoints of a training
USED = 0.97  # share of the minutes that is planned


@dataclass(frozen=True)
class Size:
    """A model and how it is trained, the same for all but for the mixer of tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int  # of the mLSTM
    attention_heads: int
    context: int  # tokens in a window
    batch: int  # windows in a step
    rates: tuple[float, ...]  # learning rates of the sweep
    tuning_bytes: int  # held-out text of the evaluations during training
    reported_bytes: int  # of further held-out text, read once at the end

    def config(self, name: str) -> dict[str, Any]:
        """Fields of the XLSTMConfig of the model `name`; attention ignores gate and heads."""
        return {
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "input_gate": NAMES[name] or "exp",
        }

    def mixer(self, name: str) -> Mixer:
        """What makes the mixer of tokens in a block of the model `name`."""
        if NAMES[name] is not None:
            return MLSTMLayer
        return partial(CausalAttention, num_heads=self.attention_heads)


# Heads of the mLSTM are few and wide, as in xLSTM 7B; those of attention have 32 or 64 channels.
SIZES = {
    "0.1m": Size(64, 2, 2, 2, 256, 4, (1e-3, 3e-3, 1e-2), 16384, 65536),
    "1m": Size(128, 4, 4, 4, 256, 8, (1e-3, 2.5e-3, 6e-3), 16384, 65536),
    "8m": Size(256, 10, 4, 4, 1024, 32, (1e-3, 2e-3, 4e-3), 65536, 262144),
    "30m": Size(512, 9, 4, 8, 1024, 64, (5e-4, 1e-3, 2e-3), 65536, 262144),
}


def size_for(minutes: float, cuda: bool) -> str:
    """The size of model of which so many minutes train all that a study takes."""
    if cuda:
        return "8m" if minutes < 10 else "30m"
    return "0.1m" if minutes < 60 else "1m"


@dataclass(frozen=True)
class Asked:
    """What the user asked for: all of a study but its folder."""

    paths: tuple[str, ...]
    include: tuple[str, ...]
    tokenizer: str | None
    device: str
    precision: str  # fp32 or bf16
    size: str
    context: int
    batch: int
    minutes: float
    steps: int | None  # of a training, in place of those that fit into the minutes
    rates: tuple[float, ...]
    seeds: int

    @property
    def sized(self) -> Size:
        """The model, with the context and the batch that were asked for."""
        return dataclasses.replace(SIZES[self.size], context=self.context, batch=self.batch)

    @property
    def trainings(self) -> int:
        """Of each model: every learning rate with the first seed, the best one with the others."""
        return len(self.rates) + self.seeds - 1

    def options(self, steps: int, lr: float, seed: int) -> dict[str, Any]:
        """Fields of TrainOptions."""
        log_every = max(1, steps // (4 * EVALUATIONS))
        return {
            "context": self.context,
            "batch": self.batch,
            "steps": steps,
            "lr": lr,
            "seed": seed,
            "log_every": log_every,
            "eval_every": 4 * log_every,
            "save_every": 2**31,
            "save_every_seconds": SAVE_SECONDS,
            "precision": self.precision,
        }

    def check(self) -> None:
        """RunError in one line, before anything is read or written."""
        if not 0 < self.minutes < math.inf:
            raise RunError(f"--minutes is {self.minutes:g}; it must be above 0")
        if self.seeds < 1:
            raise RunError(f"--seeds is {self.seeds}; it must be 1 or more")
        if len(set(self.rates)) < len(self.rates) or min(self.rates) <= 0:
            words = ", ".join(f"{lr:g}" for lr in self.rates)
            raise RunError(f"--rates is {words}; it must be different numbers above 0")
        for path in map(Path, self.paths):
            if not path.exists():
                raise RunError(f"{path} does not exist; give files and folders of texts, or none")
        TrainOptions(**self.options(1 if self.steps is None else self.steps, self.rates[0], 0))


@dataclass(frozen=True)
class LanguageStudy:
    """A study whose corpus is there. began: time.time() of the command."""

    folder: Path
    fingerprint: str  # of the corpus
    asked: Asked
    began: float

    def corpus(self) -> Corpus:
        """The text of all trainings; RunError where it is not what the study was begun with."""
        return open_corpus(self.folder / "data", self.fingerprint)

    def describe(self) -> Row:
        """What of it belongs into a result: sizes, no paths."""
        asked = self.asked
        return {
            "size": asked.size,
            "model": {
                name: getattr(asked.sized, name)
                for name in ("hidden_size", "num_layers", "num_heads", "attention_heads")
            },
            "context": asked.context,
            "batch": asked.batch,
        }

    def training_folder(self, name: str, lr: float, seed: int) -> Path:
        """The folder of one training: its run, and result.json."""
        return self.folder / f"{name.removeprefix('tfla ')}-lr{lr:g}-seed{seed}"

    def plan(self) -> Plan | None:
        """The plan, once it is made."""
        path = self.folder / "plan.json"
        return Plan(**json.loads(path.read_text("utf-8"))) if files.is_regular(path) else None

    def save_plan(self, plan: Plan) -> None:
        """Write plan.json, which a study that is resumed reads."""
        _write(self.folder / "plan.json", dataclasses.asdict(plan))

    def best_rate(self, name: str) -> float:
        """The learning rate whose training with the first seed ended best on the tuning text."""
        ended = {}
        for lr in self.asked.rates:
            result = load_result(self.training_folder(name, lr, 0))
            if result is not None:
                ended[lr] = result["curve"][-1]
        if not ended:
            raise RunError(f"no learning rate of the sweep trained {name} to its end")
        return min(ended, key=ended.__getitem__)


@dataclass(frozen=True)
class Plan:
    """How long every training is. `measured`: what is known of each model that has been timed."""

    steps: int
    threads: int
    measured: dict[str, Row]


@dataclass(frozen=True)
class Training:
    """One training of a study; lr None: the best of the sweep, which must be over."""

    study: LanguageStudy
    lr: float | None
    seed: int

    def describe(self) -> Row:
        """As for LanguageStudy; "swept": is it one of the sweep?"""
        swept = self.lr is not None
        return {**self.study.describe(), "lr": self.lr, "seed": self.seed, "swept": swept}


def open_study(folder: Path, asked: Asked, resume: bool, began: float) -> LanguageStudy:
    """A new study in `folder`, whose corpus is written here; or the one that stands there.

    RunError when one that has a plan stands there and `resume` is False, when it has other options
    than `asked`, and when the texts are too few.
    """
    known = folder / "study.json"
    if resume and known.exists():
        said = json.loads(known.read_text("utf-8"))
        for name, value in _plain(asked).items():
            if said["asked"].get(name) != value:
                raise RunError(
                    f"--{name} is {value}, the study in {folder} was started with "
                    f"{said['asked'].get(name)}; give the options of its start"
                )
        study = LanguageStudy(folder, said["fingerprint"], asked, began)
        study.corpus()
        return study
    if (folder / "plan.json").exists():
        raise RunError(
            f"{folder} holds a study already; add --resume to go on with it, or take another --out"
        )
    paths = [Path(path) for path in asked.paths]
    tokenizer = Path(asked.tokenizer) if asked.tokenizer else None
    corpus = prepare(paths, folder / "data", tokenizer=tokenizer, include=asked.include)
    check_corpus(corpus, asked)
    _write(known, {"asked": _plain(asked), "fingerprint": corpus.fingerprint})
    return LanguageStudy(folder, corpus.fingerprint, asked, began)


def check_corpus(corpus: Corpus, asked: Asked) -> None:
    """RunError when nothing could be trained on it, or nothing said of it."""
    if corpus.lost:
        raise RunError(
            f"the tokenizer does not give back {corpus.lost:,} bytes of the held-out text, so "
            "nothing can be said in bits a byte; give another, or none"
        )
    corpus.begin(0, asked.context)  # long enough to train on?
    pieces, _ = reported_text(corpus, asked)
    if not len(pieces):
        raise RunError(
            f"the held-out text has no {LONG * asked.context:,} tokens after the part that is for "
            f"tuning, {LONG} times --context; give more texts or a smaller --context"
        )


def tuning_bytes(corpus: Corpus, size: Size) -> int:
    """Held-out bytes of the evaluations during training, by which learning rates are chosen: a
    third at most, as the others are for the result."""
    return max(1, min(size.tuning_bytes, corpus.info["held_out"]["bytes"] // 3))


def tuning_text(corpus: Corpus, size: Size) -> tuple[Tensor, bytes]:
    """Its tokens, and the bytes that they encode."""
    return corpus.held_out(tuning_bytes(corpus, size))


def reported_text(corpus: Corpus, asked: Asked) -> tuple[Tensor, float]:
    """Pieces of the held-out text after the tuning text, evenly spread over all of it: tokens
    (pieces, LONG times the context, and one before them that is not predicted); and how many bytes
    a token there encodes, the mean. No pieces where the text is too short for one."""
    tuning, read = tuning_text(corpus, asked.sized)
    whole, raw = corpus.held_out(corpus.info["held_out"]["bytes"])
    rest, window = whole[len(tuning) - 1 :], LONG * asked.context
    bytes_per_token = (len(raw) - len(read)) / max(1, len(rest) - 1)
    fit = (len(rest) - 1) // window
    count = min(fit, max(1, round(asked.sized.reported_bytes / (bytes_per_token * window))))
    starts = torch.linspace(0, len(rest) - 1 - window, count).long()
    pieces = [rest[start : start + window + 1] for start in starts]
    return torch.stack(pieces) if pieces else rest.new_empty(0, window + 1), bytes_per_token


def steps_that_fit(seconds: float, measured: Mapping[str, Row], trainings: int, most: int) -> int:
    """Steps of every training, the same for all models, at most `most`. `measured` has "step_s" of
    a step and "beside_s" of all that a training takes besides. RunError when they are too few."""
    steps = sum(row["step_s"] for row in measured.values()) * trainings
    beside = sum(row["beside_s"] for row in measured.values()) * trainings
    found = min(most, int((seconds - beside) / steps))
    if found < FEWEST_STEPS:
        wanted = (beside + FEWEST_STEPS * steps) / 60
        raise RunError(
            f"--minutes is too short for {trainings} trainings of each model: they take "
            f"{wanted:.1f} minutes at least; give more, or fewer --rates and --seeds"
        )
    return found


def plan_of(study: LanguageStudy, corpus: Corpus, measured: dict[str, Row], threads: int) -> Plan:
    """As many steps as were asked for, or fit into what is left of the minutes."""
    asked = study.asked
    if asked.steps is not None:
        return Plan(asked.steps, threads, measured)
    left = USED * (60 * asked.minutes - (time.time() - study.began))
    most = MOST_EPOCHS * len(corpus.train) // (asked.context * asked.batch)
    steps = steps_that_fit(left, measured, asked.trainings, max(FEWEST_STEPS, most))
    return Plan(steps, threads, measured)


def load_result(folder: Path) -> Row | None:
    """What a training came to, once it is over."""
    path = folder / "result.json"
    return json.loads(path.read_text("utf-8")) if files.is_regular(path) else None


def save_result(folder: Path, result: Row) -> None:
    """Write what a training came to; ``load_result`` reads it."""
    _write(folder / "result.json", result)


def chosen(rows: Sequence[Row], name: str) -> list[Row]:
    """Of the rows of a result those of a model at its best learning rate, one a seed."""
    mine = [r for r in rows if r["implementation"] == name and is_trained(r)]
    swept = [row for row in mine if row["swept"]]
    if not swept:
        return []
    lr = min(swept, key=lambda row: row["curve"][-1])["lr"]
    return [row for row in mine if row["lr"] == lr]


def is_trained(row: Row) -> bool:
    """Is it the row of a training that came to its end?"""
    return row["kind"] == "language" and row["status"] == "ok"


def _plain(asked: Asked) -> dict[str, Any]:
    """As JSON holds it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(asked)))


def _write(path: Path, content: Any) -> None:
    files.write(path, (json.dumps(content, indent=1) + "\n").encode(), _is_study)


def _is_study(path: Path) -> bool:
    """Whether `open_study` has written this file: the one of a study that was not planned gives way
    to another's."""
    try:
        return {"asked", "fingerprint"} == json.loads(path.read_text("utf-8")).keys()
    except (ValueError, AttributeError, RecursionError):
        return False
