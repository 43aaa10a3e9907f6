"""What a run is: its options, its folder, and how it is started and taken up again."""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfla.xlstm import checkpoint, data, files
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.data import HELD_OUT, Corpus, Position, open_corpus, prepare, read_tokenizer
from tfla.xlstm.metrics import is_metrics

METRICS = "metrics.jsonl"
WHOLE = "context batch accumulate steps seed eval_every eval_bytes save_every log_every".split()
REAL = "seconds lr warmup final_lr weight_decay clip save_every_seconds".split()
Outputs = Mapping[str, files.FileProof]


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
    save_every_seconds: float = 300.0  # after the last one, whatever the step
    log_every: int = 10  # steps
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else fp32

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise RunError("neither --steps nor --seconds is given; give one of them")
        for name in WHOLE:
            value = getattr(self, name)
            if not (value is None and name == "steps") and type(value) is not int:
                raise RunError(
                    f"--{name.replace('_', '-')} is {reprlib.repr(value)}; "
                    "it must be a whole number"
                )
            if value is not None and name != "seed" and abs(value) >= 2**63:
                raise RunError(f"--{name.replace('_', '-')} is 2^63 or more; take a smaller number")
        for name in REAL:
            value = getattr(self, name)
            if value is None and name == "seconds":
                continue
            if type(value) not in (int, float) or 1e300 < abs(value) < math.inf:
                raise RunError(
                    f"--{name.replace('_', '-')} is {reprlib.repr(value)}; it must be a number"
                )
        rules: list[tuple[str, str, Callable[[Any], bool]]] = [
            ("context batch accumulate", "at least 1", lambda x: x >= 1),
            ("eval_every eval_bytes save_every log_every", "at least 1", lambda x: x >= 1),
            ("save_every_seconds", "above 0", lambda x: x > 0),  # inf: by steps alone
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
                    raise RunError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")

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
class Base:
    """A trained model that a run starts from."""

    path: Path  # as its user names it
    weights: Path  # a checkpoint, or a folder in transformers' format
    config: XLSTMConfig
    codec: data.Codec


@dataclass(frozen=True)
class Run:
    """What `start` and `resume` make, and `train` carries on."""

    folder: Path
    corpus: Corpus
    config: XLSTMConfig
    options: TrainOptions
    saved: checkpoint.Checkpoint | None = None
    position: Position | None = None  # in the training text; None: its beginning
    changes: tuple[str, ...] = ()  # what `resume` was told to do otherwise, in words
    init: str | None = None  # the model that it began with; None: its seed
    weights: Path | None = None  # where they are, for the first step
    lock: files.Lock | None = field(default=None, repr=False, compare=False)


def start(
    folder: Path,
    values: Mapping[str, Any],
    outputs: Outputs | None = None,
    base: Base | None = None,
    corpus: Corpus | None = None,
) -> Run:
    """A new run in `folder`, from its seed or from `base`, whose shape and tokenizer it then has.

    `values` may hold paths, tokenizer, held_out and include as `prepare` takes them, fields of
    XLSTMConfig but for vocab_size, and fields of TrainOptions; others are ignored. RunError when
    `folder` holds a run already or is in use, when something of another stands in its way, or when
    a value is out of range. The folder is locked until `train` ends. `outputs` are further files
    that will be written to it, each with the proof that tfla wrote what stands in its place.
    `corpus`, in place of paths, is one that several runs read; it stays where it is.

    Example:
        model = {"hidden_size": 64, "num_layers": 2, "num_heads": 2}
        run = start(Path("runs/small"), model | {"steps": 100})
        for record in train(run, Placement("cpu")):
            print(record)
    """
    options = TrainOptions(**_fields(TrainOptions, values))
    model = _fields(XLSTMConfig, values)
    if base is not None:
        _check_base(base, model, values.get("tokenizer"))
        model = base.config.to_dict()
    try:  # before the corpus is read, which may take long
        XLSTMConfig(**(model | {"vocab_size": 1}))
    except (TypeError, ValueError) as error:
        message = str(error).rstrip(".")
        for name in model:
            message = message.replace(name, f"--{name.replace('_', '-')}")
        raise RunError(message) from error
    lock = files.Lock(folder)
    try:
        if checkpoint.exists(folder):
            raise RunError(
                f"{folder} holds a run already; add --resume to go on with it, or take another "
                "--out"
            )
        _check_room(folder, outputs or {})
        checkpoint.sweep(folder)
        if corpus is None:
            files.check_folder(folder / "data", data.written_files)
            corpus = prepare(
                values.get("paths") or [],
                folder / "data",
                tokenizer=values.get("tokenizer"),
                codec=None if base is None else base.codec,
                held_out=values.get("held_out", HELD_OUT),
                include=values.get("include") or (),
            )
        position = corpus.begin(options.seed, options.context)  # too small? It says so now.
        config = XLSTMConfig(**({"vocab_size": corpus.codec.vocab_size} | model))
        run = Run(folder, corpus, config, options, position=position, lock=lock)
        return dataclasses.replace(run, init=str(base.path), weights=base.weights) if base else run
    except BaseException:
        lock.release()
        raise


def resume(
    folder: Path,
    changes: Mapping[str, Any],
    outputs: Outputs | None = None,
    corpus: Corpus | None = None,
) -> Run:
    """The run in `folder` at its last checkpoint.

    `changes` may replace fields of TrainOptions; giving steps or seconds replaces both. RunError
    when something else in it is not as the run has it, when `folder` is in use, or when a file of
    the run is damaged. The folder is locked until `train` ends. `outputs` and `corpus`: as for
    `start`.
    """
    if not folder.is_dir():
        checkpoint.load(folder)  # which says what is missing, and makes no folder
    lock = files.Lock(folder)
    try:
        _check_room(folder, outputs or {})
        checkpoint.sweep(folder)
        run = _resumed(folder, changes, corpus)
    except BaseException:
        lock.release()
        raise
    return dataclasses.replace(run, lock=lock)


def _check_base(base: Base, model: Mapping[str, Any], tokenizer: Path | None) -> None:
    """RunError when another shape or tokenizer is asked for than a run's base has."""
    other = [name for name, value in model.items() if value != getattr(base.config, name)]
    if tokenizer is not None and read_tokenizer(tokenizer) != base.codec.source:
        other.append("tokenizer")
    for name in other:
        raise RunError(
            f"--{name.replace('_', '-')} is not what {base.path} has, with which --init starts; "
            "leave it out"
        )


def _resumed(folder: Path, changes: Mapping[str, Any], corpus: Corpus | None) -> Run:
    saved = checkpoint.load(folder)
    step, elapsed = saved.position()
    config, before = saved.config(), _options(saved)
    if corpus is None:
        corpus = open_corpus(folder / "data", str(saved.meta.get("data")))
    elif corpus.fingerprint != saved.meta.get("data"):
        raise RunError(f"{corpus.folder} is not the corpus that the run in {folder} was started on")
    check_vocabulary(saved, config, corpus.codec)
    options = dataclasses.asdict(before)
    if changes.keys() & {"steps", "seconds"}:
        options |= {"steps": None, "seconds": None}
    now = TrainOptions(**options | _fields(TrainOptions, changes))
    given = dict(changes)
    if "paths" in given:
        given["paths"] = [str(path) for path in given["paths"]]
    if given.get("tokenizer"):
        given["tokenizer"] = read_tokenizer(given["tokenizer"])
    if "include" in given:
        given["include"] = list(given["include"] or ())
    if "init" in given:
        given["init"] = str(given["init"])
    has = config.to_dict() | {"include": []} | corpus.info["origin"]  # older ones had no --include
    has |= {"tokenizer": corpus.codec.source, "init": saved.init()}
    for name in sorted(has.keys() & given.keys()):
        if given[name] != has[name]:
            what, it = f"--{name.replace('_', '-')} is", "it"
            if name == "paths":  # they are no option
                what, it = "the files to train on are", "them"
            raise RunError(
                f"{what} not what the run in {folder} was started with; leave {it} out, or start "
                "another run with another --out"
            )
    if "position" in saved.meta:
        position = Position.from_dict(saved.meta["position"])
    else:  # of a version that kept none, and read --batch * --accumulate windows in every step
        windows = step * before.batch * before.accumulate
        position = corpus.begin(before.seed, before.context, windows)
    corpus.check(position)
    if position.offset == 0:  # an epoch that has not begun has no order yet
        position = corpus.begin(now.seed, now.context, 0, position.epoch)
    corpus.begin(now.seed, now.context)  # too small for a larger --context? It says so now.
    said = _say_changes(before, now, step, elapsed, position)
    return Run(folder, corpus, config, now, saved, position, said, has["init"])


def _options(saved: checkpoint.Checkpoint) -> TrainOptions:
    """The options of a checkpoint; RunError when they are none."""
    try:
        return TrainOptions(**saved.meta["options"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{saved.path}/checkpoint.json holds no options of a run: {error}"
        ) from error


def check_vocabulary(saved: checkpoint.Checkpoint, config: XLSTMConfig, codec: data.Codec) -> None:
    """RunError unless the model has a row for every id of the codec, and no other; one that came
    with an end of its own may have others."""
    spare = codec.named_end is not None  # models of others may have more rows than are used
    if config.vocab_size < codec.vocab_size or (config.vocab_size > codec.vocab_size and not spare):
        raise RunError(
            f"{saved.path}: the model has {config.vocab_size:,} token ids, its tokenizer needs "
            f"{codec.vocab_size:,}; they do not belong together, train again"
        )


def _check_room(folder: Path, outputs: Outputs) -> None:
    """RunError when something of another stands where a run would write."""
    checkpoint.own_folder(folder)
    for name, proof in {METRICS: is_metrics, **outputs}.items():
        files.check_file(folder / name, proof)


def _say_changes(
    before: TrainOptions, now: TrainOptions, step: int, elapsed: float, position: Position
) -> tuple[str, ...]:
    """What differs between two sets of options, and what follows from it at this step."""
    a, b = dataclasses.asdict(before), dataclasses.asdict(now)
    said = [
        f"--{name.replace('_', '-')}: {_word(a[name])} before, {_word(b[name])} from here on"
        for name in a
        if a[name] != b[name]
    ]
    if (before.context, before.seed) != (now.context, now.seed) and position.offset:
        said.append("the epoch that has begun is read to its end in the order that it has")
    old, new = (x.lr_at(x.progress(step, elapsed)) for x in (before, now))
    if not math.isclose(old, new, rel_tol=1e-6):
        said.append(f"the learning rate goes on at {new:.3g}, it was {old:.3g} at step {step:,}")
    return tuple(said)


def _word(value: Any) -> str:
    return "not given" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}
