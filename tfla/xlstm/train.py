"""Training of the xLSTM language model: AdamW, one warm-up, one cosine, and a run that survives
kill -9.

`train` is a generator of records; whoever consumes it prints. It writes to the run's folder:

    RUN/data/            the corpus (data.py)
    RUN/checkpoints/     the last two checkpoints (checkpoint.py)
    RUN/metrics.jsonl    the records, one JSON object a line

With `steps` everything that a step does follows from (seed, step) and the checkpoint, so on a CPU
(and as many threads) a resumed run continues to the same bits. With `seconds` the schedule follows
the clock. `Placement` is the seam to many devices: the loop and the model know nothing of ranks.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfla
from tfla.xlstm import checkpoint
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.data import HELD_OUT, Corpus, open_corpus, prepare, read_tokenizer
from tfla.xlstm.model import XLSTM

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainOptions:
    """How a run is trained. RunError at construction names the option that is out of range.

    Example:
        TrainOptions(steps=500, context=256, batch=16)      # 16 windows of 256 tokens a step
        TrainOptions(seconds=600)                           # ten minutes, however many steps that
        gives
    """

    context: int = 512  # tokens in a window
    batch: int = 8  # windows in one forward pass
    accumulate: int = 1  # forward passes a step
    steps: int | None = None
    seconds: float | None = None
    lr: float = 3e-3  # at its peak
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
        for name in (
            "context",
            "batch",
            "accumulate",
            "eval_every",
            "eval_bytes",
            "save_every",
            "log_every",
        ):
            _demand(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "seconds", "lr", "clip"):
            value = getattr(self, name)
            _demand(name, value, value is None or 0 < value < math.inf, "above 0")
        for name in ("warmup", "final_lr"):
            _demand(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        _demand("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _demand("seed", self.seed, self.seed >= 0, "0 or more")
        _demand(
            "precision",
            self.precision,
            self.precision in ("auto", "fp32", "bf16"),
            "auto, fp32 or bf16",
        )

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
    """A new run. `values` may hold paths, tokenizer and held_out (as `prepare`), fields of
    XLSTMConfig and of
    TrainOptions; others are ignored. RunError when `folder` holds a run already or a value is out
    of range."""
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
        raise RunError(str(error).rstrip(".")) from error
    corpus = prepare(
        values.get("paths") or [],
        folder / "data",
        tokenizer=values.get("tokenizer"),
        held_out=values.get("held_out", HELD_OUT),
    )
    return Run(
        folder, corpus, XLSTMConfig(**(model | {"vocab_size": corpus.codec.vocab_size})), options
    )


def resume(folder: Path, changes: Mapping[str, Any]) -> Run:
    """The run in `folder` at its last checkpoint. `changes` may replace fields of TrainOptions
    (giving steps or seconds
    replaces both); RunError for anything else in it that is not as the run has it."""
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


class Placement:
    """Where a run computes. This one: a single process on one device; a subclass may spread it over
    many.

    `rank` of `world` says which rows of a batch are this process's own. Only `main` writes to the
    run's folder and yields records that are printed.
    """

    rank, world, main = 0, 1, True

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def place(self, model: nn.Module) -> nn.Module:
        """The model as it is trained, on its device."""
        return model.to(self.device)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all ranks."""
        return value

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradients down to norm `largest`; returns the norm that they had."""
        return nn.utils.clip_grad_norm_(parameters, largest)

    def save(self, run: Path, meta: Record, state: "TrainState", texts: dict[str, str]) -> None:
        """Write a checkpoint."""
        checkpoint.save(
            run,
            meta,
            {"model": dict(state.model.named_parameters()), "optimizer": state.moments()},
            texts,
        )

    def load(self, saved: checkpoint.Checkpoint, state: "TrainState") -> None:
        """Read one back."""
        saved.restore(state.model)
        state.restore_moments(saved.tensors("optimizer"))


class TrainState:
    """Model and optimizer. Matrices decay; norms, biases, gates and embeddings do not."""

    def __init__(self, model: nn.Module, options: TrainOptions) -> None:
        self.model = model
        decayed = [p for name, p in model.named_parameters() if _decays(name, p)]
        rest = [p for name, p in model.named_parameters() if not _decays(name, p)]
        self.names = [name for name, p in model.named_parameters() if _decays(name, p)]
        self.names += [name for name, p in model.named_parameters() if not _decays(name, p)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=options.lr,
            betas=(0.9, 0.95),
            fused=True,
        )

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by parameter name, and the states of torch's random generators."""
        state = self.optimizer.state_dict()["state"]
        out = {
            f"{self.names[index]}/{key}": x
            for index, group in state.items()
            for key, x in group.items()
        }
        out["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            out["random/cuda"] = torch.cuda.get_rng_state()
        return out

    def restore_moments(self, saved: dict[str, Tensor]) -> None:
        """The inverse of `moments`."""
        torch.set_rng_state(saved.pop("random/cpu"))
        random = saved.pop("random/cuda", None)
        if random is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(random)
        index = {name: number for number, name in enumerate(self.names)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.items():
            name, _, field = key.rpartition("/")
            state.setdefault(index[name], {})[field] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def train(run: Run, placement: Placement) -> Iterator[Record]:
    """Train to the end of the run's options, from its checkpoint or from the seed, and yield what
    happens.

    Records are dictionaries with "event" ("train": loss in nats a token, lr, tokens_per_second;
    "eval": held-out bits_per_byte; "save"), "step", "progress" in [0, 1] and "elapsed" seconds.
    RunError when the corpus is too small for one window or the loss is no longer a number.
    """
    corpus, config, options = run.corpus, run.config, run.options
    torch.manual_seed(options.seed)
    state = TrainState(placement.place(XLSTM(config)), options)
    step, elapsed = 0, 0.0
    if run.saved is not None:
        placement.load(run.saved, state)
        step, elapsed = run.saved.meta["step"], run.saved.meta["elapsed"]
    texts = {} if corpus.codec.source is None else {"tokenizer.json": corpus.codec.source}
    held_out, raw = corpus.held_out(options.eval_bytes)
    log = MetricsLog(run.folder / "metrics.jsonl", step) if placement.main else None
    logged_at, busy = step, 0.0
    began = time.monotonic() - elapsed

    def record(event: str, **values: Any) -> Record:
        line = {"event": event, "step": step, "progress": options.progress(step, elapsed)}
        line |= {"elapsed": round(elapsed, 3), **values}
        if log is not None and event != "save":
            log.write(line)
        return line

    def save() -> Record:
        meta = {
            "tfla": tfla.__version__,
            "step": step,
            "elapsed": elapsed,
            "tokens": step * options.tokens_per_step,
            "config": config.to_dict(),
            "options": dataclasses.asdict(options),
            "data": corpus.fingerprint,
        }
        placement.save(run.folder, meta, state, texts)
        return record("save")

    if run.saved is None:
        yield save()
    while not (done := options.progress(step, elapsed) >= 1.0):
        started = time.monotonic()
        lr = options.lr_at(options.progress(step, elapsed))
        loss = _step(state, corpus, options, placement, step, lr)
        step += 1
        elapsed = time.monotonic() - began
        busy += time.monotonic() - started
        done = options.progress(step, elapsed) >= 1.0
        if step % options.log_every == 0 or done:
            speed = (step - logged_at) * options.tokens_per_step / max(busy, 1e-9)
            yield record("train", loss=loss, lr=lr, tokens_per_second=round(speed, 1))
            logged_at, busy = step, 0.0
        if step % options.eval_every == 0 or done:
            bits = evaluate(state.model, held_out, len(raw), options, placement.device)
            yield record("eval", bits_per_byte=bits)
        elapsed = time.monotonic() - began
        if step % options.save_every == 0 or done:
            yield save()


def evaluate(
    model: nn.Module, stream: Tensor, size: int, options: TrainOptions, device: torch.device
) -> float:
    """Bits a byte that the model needs for `stream` (tokens,), which encodes `size` bytes.

    The stream is read in windows of the training context from an empty state, so a window's first
    tokens are the dear ones: sum over all tokens but the first of -log2 p(token | its window), over
    `size`.
    """
    rows = torch.split(stream[:-1], options.context), torch.split(stream[1:], options.context)
    inputs = nn.utils.rnn.pad_sequence(list(rows[0]), batch_first=True)
    targets = nn.utils.rnn.pad_sequence(list(rows[1]), batch_first=True, padding_value=-100)
    nats = 0.0
    with torch.no_grad(), autocast(options.precision, device):
        for begin in range(0, len(inputs), options.batch):
            part = slice(begin, begin + options.batch)
            logits, _ = model(inputs[part].to(device))
            nats += _nats(logits, targets[part].to(device), "sum").item()
    return nats / math.log(2) / size


class MetricsLog:
    """The records as JSON lines; those after `step`, of a run that died later, are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        whole = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(whole, "utf-8")
        temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, line: Record) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


def read_metrics(path: Path) -> list[Record]:
    """The records of a run, without a last line that a kill cut short; none without the file."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where asked for, or where `precision` is "auto" and the device is a GPU that has it."""
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported()
    on = precision == "bf16" or (precision == "auto" and cuda)
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def _step(
    state: TrainState,
    corpus: Corpus,
    options: TrainOptions,
    placement: Placement,
    step: int,
    lr: float,
) -> float:
    """One update; returns the mean loss of its tokens in nats."""
    rows = options.batch * options.accumulate
    windows = corpus.windows(options.seed, step, rows, options.context)
    total = torch.zeros((), device=placement.device)
    for number in range(options.accumulate):
        micro = windows[number * options.batch : (number + 1) * options.batch]
        own = micro.tensor_split(placement.world)[placement.rank].to(placement.device)
        with autocast(options.precision, placement.device):
            logits, _ = state.model(own[:, :-1])
            loss = _nats(logits, own[:, 1:], "mean") / options.accumulate
        loss.backward()
        total += loss.detach()
    norm = placement.clip(state.model.parameters(), options.clip)
    value = placement.mean(total).item()
    if not (math.isfinite(value) and math.isfinite(norm.item())):
        raise RunError(
            f"the loss is {value} and the gradient's norm {norm.item()} at step {step + 1}; "
            "resume with a smaller --lr"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return value


def _nats(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and "gate" not in name and "embedding" not in name


def _fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _demand(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise RunError(f"--{name.replace('_', '-')} is {value}, wanted {wanted}")
