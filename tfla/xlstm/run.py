"""What a run is: its options, its folder, and how it is started and taken up again."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfla.xlstm import checkpoint
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.data import HELD_OUT, Corpus, open_corpus, prepare, read_tokenizer


@dataclass(frozen=True)
class TrainOptions:
    """How a run is trained. RunError at construction names the option that is out of range.

    Example:
        TrainOptions(steps=500, context=256, batch=16)      # 16 windows of 256 tokens a step
        TrainOptions(seconds=600)                           # as many steps as ten minutes hold
    """

    context: int = 256  # tokens in a window
    batch: int = 8  # windows in one forward pass
    accumulate: int = 1  # forward passes a step
    steps: int | None = None
    seconds: float | None = None
    lr: float = 2.5e-3  # at its peak
    warmup: float = 0.05  # share of the run
    final_lr: float = 0.1  # share of the peak that is left at the end
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    eval_every: int = 100  # steps
    eval_bytes: int = 65536
    save_every: int = 100  # steps
    log_every: int = 10  # steps
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else fp32

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise RunError("neither --steps nor --seconds is given; give one of them")
        rules: list[tuple[str, str, Callable[[Any], bool]]] = [
            ("context batch accumulate", "at least 1", lambda x: x >= 1),
            ("eval_every eval_bytes save_every log_every", "at least 1", lambda x: x >= 1),
            ("steps seconds lr clip", "above 0", lambda x: x is None or 0 < x < math.inf),
            ("warmup final_lr", "from 0 to 1", lambda x: 0 <= x <= 1),
            ("weight_decay", "0 or more", lambda x: 0 <= x < math.inf),
            ("seed", "from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63),
            ("precision", "auto, fp32 or bf16", lambda x: x in ("auto", "fp32", "bf16")),
        ]
        for names, wanted, holds in rules:
            for name in names.split():
                value = getattr(self, name)
                if not holds(value):
                    raise RunError(f"--{name.replace('_', '-')} is {value}, wanted {wanted}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update learns from, on all ranks together."""
        return self.context * self.batch * self.accumulate

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the run that is done, in [0, 1], after `step` steps and `elapsed` seconds."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_clock))

    def lr_at(self, progress: float) -> float:
        """Linear warm-up from 1% of the peak, then a cosine down to `final_lr` of it."""
        if progress < self.warmup:
            return self.lr * max(0.01, progress / self.warmup)
        rest = (progress - self.warmup) / max(1e-9, 1 - self.warmup)
        return self.lr * (
            self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * rest))
        )


@dataclass(frozen=True)
class Run:
    """What `start` and `resume` make, and `train` carries on."""

    folder: Path
    corpus: Corpus
    config: XLSTMConfig
    options: TrainOptions
    saved: checkpoint.Checkpoint | None = None


def start(folder: Path, values: Mapping[str, Any]) -> Run:
    """A new run in `folder`.

    `values` may hold paths, tokenizer and held_out as `prepare` takes them, fields of XLSTMConfig
    but for vocab_size, and fields of TrainOptions; others are ignored. RunError when `folder` holds
    a run already, or a value is out of range.

    Example:
        model = {"hidden_size": 64, "num_layers": 2, "num_heads": 2}
        run = start(Path("runs/small"), model | {"steps": 100})
        for record in train(run, Placement("cpu")):
            print(record)
    """
    if checkpoint.exists(folder):
        raise RunError(
            f"{folder} holds a run already; add --resume to go on with it, or take another --out"
        )
    checkpoint.sweep(folder)
    options = TrainOptions(**_fields(TrainOptions, values))
    model = _fields(XLSTMConfig, values)
    try:  # before the corpus is read, which may take long
        XLSTMConfig(**(model | {"vocab_size": 1}))
    except (TypeError, ValueError) as error:
        message = str(error).rstrip(".")
        for name in model:
            message = message.replace(name, f"--{name.replace('_', '-')}")
        raise RunError(message) from error
    corpus = prepare(
        values.get("paths") or [],
        folder / "data",
        tokenizer=values.get("tokenizer"),
        held_out=values.get("held_out", HELD_OUT),
    )
    corpus.windows(options.seed, 0, 1, options.context)  # too small? Before there is a checkpoint.
    return Run(
        folder, corpus, XLSTMConfig(**(model | {"vocab_size": corpus.codec.vocab_size})), options
    )


def resume(folder: Path, changes: Mapping[str, Any]) -> Run:
    """The run in `folder` at its last checkpoint.

    `changes` may replace fields of TrainOptions; giving steps or seconds replaces both. RunError
    when something else in it is not as the run has it.
    """
    checkpoint.sweep(folder)
    saved = checkpoint.load(folder)
    corpus = open_corpus(folder / "data", saved.meta["data"])
    options, config = dict(saved.meta["options"]), saved.meta["config"]
    if changes.keys() & {"steps", "seconds"}:
        options |= {"steps": None, "seconds": None}
    options |= _fields(TrainOptions, changes)
    given = dict(changes)
    if "paths" in given:
        given["paths"] = [str(path) for path in given["paths"]]
    if given.get("tokenizer"):
        given["tokenizer"] = read_tokenizer(given["tokenizer"])
    has = config | corpus.info["origin"] | {"tokenizer": corpus.codec.source}
    for name in sorted(has.keys() & given.keys()):
        if given[name] != has[name]:
            raise RunError(
                f"--{name.replace('_', '-')} is not what the run in {folder} was started with; "
                "leave it out, or start another run with another --out"
            )
    return Run(folder, corpus, XLSTMConfig.from_dict(config), TrainOptions(**options), saved)


def _fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}
