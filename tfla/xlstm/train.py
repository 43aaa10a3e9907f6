"""Training of the xLSTM language model: AdamW, and a run that survives kill -9.

`train` is a generator of records; whoever consumes it prints. It writes to the run's folder:

    RUN/data/            the corpus (data.py)
    RUN/checkpoints/     the last two checkpoints, and the best on held-out text (checkpoint.py)
    RUN/metrics.jsonl    the records, one JSON object a line

With `steps` everything that a step does follows from the seed and the checkpoint, so on a CPU
(and as many threads) a resumed run continues to the same bits. With `seconds` the schedule follows
the clock. `Placement` is the seam to many devices: the loop and the model know nothing of ranks.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import tfla
from tfla.signals import Interrupted
from tfla.xlstm import checkpoint
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.data import Corpus, Position
from tfla.xlstm.metrics import MetricsLog, Record, is_number
from tfla.xlstm.metrics import read_metrics as read_metrics
from tfla.xlstm.model import XLSTM
from tfla.xlstm.run import METRICS, Run, TrainOptions
from tfla.xlstm.writer import load

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
PIECE = 16384  # tokens whose logits are made at once


class Placement:
    """Where a run computes: here in one process on one device; `tfla.xlstm.parallel` spreads it.

    `main`: does this process write metrics? `row` of `rows` says which rows of a batch are its own,
    `part` which of so many equal parts of their tokens. All ranks call all methods.
    """

    main = True
    keep_best = True  # is there a checkpoint after every evaluation that is the best so far?
    row, rows = 0, 1
    part = (0, 1)
    # Entered around every step: whoever starts a run may time its steps, or choose threads.
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext
    # The number of a signal that asks this process to end, or 0; looked at after every step.
    signalled: Callable[[], int] = staticmethod(lambda: 0)
    # The seconds by which checkpoints are spaced.
    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, device: torch.device | str, compile: bool = False) -> None:
        self.device, self.compile = torch.device(device), compile

    def share(self, make: Callable[[], Run]) -> Run:
        """The run that `make` starts or takes up again, once, for all ranks."""
        return make()

    def together(self) -> AbstractContextManager[Any]:
        """In it the ranks depend on each other."""
        return nullcontext()

    def build(self, config: XLSTMConfig, precision: str, weights: Path | None = None) -> nn.Module:
        """The model as it is trained, on its device, with parameters from torch's generator or
        those in `weights`, as ``load`` reads them."""
        model = initial(config, weights).to(self.device)
        if self.compile:  # one graph, which all blocks share
            for block in model.blocks:
                block.compile()
        return model

    def elapsed(self, seconds: float) -> float:
        """What the clock of the run says, when this process's says `seconds`."""
        return seconds

    def largest(self, values: list[int]) -> list[int]:
        """The largest of each number over all ranks, which so decide alike."""
        return values

    def own(self, x: Tensor) -> Tensor:
        """The part of a parameter or of its gradient that this process updates."""
        return x

    def clip(self, state: "TrainState", loss: Tensor, largest: float) -> Tensor:
        """Scale the gradients down to norm `largest`; returns the mean of the loss over all ranks
        and the norm that they had, as (2,): nothing waits for the device."""
        norm = nn.utils.clip_grad_norm_(state.parameters.values(), largest)
        return torch.stack([loss, norm])

    def save(self, run: Path, meta: Record, state: "TrainState", texts: dict[str, str]) -> None:
        """Write a checkpoint; it may be whole only once `finish` has been called."""
        tensors: Any = {"model": dict(state.parameters), "optimizer": state.moments()}
        checkpoint.save(run, meta, tensors, texts)

    def load(self, saved: checkpoint.Checkpoint, state: "TrainState") -> None:
        """Read one back."""
        saved.restore(state.model)
        moments = saved.tensors("optimizer")
        wanted = {name: (p.shape, p.dtype) for name, p in state.parameters.items()}
        check_moments(saved, wanted, checkpoint.shapes(moments))
        checkpoint.warn_unless_finite(saved.path, moments.items())
        state.restore_moments(saved, moments)

    def finish(self) -> None:
        """Wait for what is still being written."""


class TrainState:
    """Model and optimizer. Matrices decay; norms, biases, gates and embeddings do not."""

    def __init__(self, model: nn.Module, options: TrainOptions, placement: Placement) -> None:
        self.model = model
        named = sorted(model.named_parameters(), key=lambda pair: not _decays(*pair))
        self.parameters = dict(named)  # those that decay first
        own = {name: placement.own(p) for name, p in named}
        self.own = {name: x for name, x in own.items() if x.numel()}
        decayed = [x for name, x in self.own.items() if _decays(name, self.parameters[name])]
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": list(self.own.values())[len(decayed) :], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)

    def step(self, lr: float) -> None:
        """One update, after which there are no gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for x in (*self.own.values(), *self.parameters.values()):
            x.grad = None

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by parameter name, and the states of torch's random generators."""
        state = self.optimizer.state
        out = {f"{n}/{key}": x for n, p in self.own.items() for key, x in state[p].items()}
        out["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            out["random/cuda"] = torch.cuda.get_rng_state()
        return out

    def restore_moments(self, saved: checkpoint.Checkpoint, moments: dict[str, Tensor]) -> None:
        """The inverse of `moments`, of what `check_moments` has looked at."""
        random = {key: moments.pop(key) for key in sorted(moments) if key.startswith("random/")}
        try:
            torch.set_rng_state(random["random/cpu"])
            if "random/cuda" in random and torch.cuda.is_available():
                torch.cuda.set_rng_state(random["random/cuda"])
        except (RuntimeError, TypeError) as error:
            raise RunError(f"{saved.path} holds no state of a random generator: {error}") from error
        step = saved.meta["step"]
        for key, value in moments.items():
            name, _, field = key.rpartition("/")
            if field == "step" and value.item() != min(step, 2**24):  # where fp32 stops counting
                raise RunError(f"{saved.path}: {key} is {value.item():g}, the run is at {step}")
            if name in self.own:
                own = self.own[name]
                if field != "step" and value.shape != own.shape:  # the kernel would not look
                    raise RunError(
                        f"{saved.path}: {key} is {tuple(value.shape)}; "
                        f"it must be {tuple(own.shape)}"
                    )
                self.optimizer.state[own][field] = value.to(own.device)


def initial(config: XLSTMConfig, weights: Path | None, device: torch.device | str = "cpu") -> XLSTM:
    """A model before its first step, in fp32: drawn from torch's generator on `device` (the CPU's
    numbers are the same wherever it is trained), or read from `weights`."""
    needed = 4 * config.num_parameters()
    if needed > (there := _physical_memory()):  # before as many layers are made as fit into it
        raise RunError(
            f"a model of {config.num_parameters():,} parameters takes {needed / 1e9:,.0f} GB, this "
            f"machine has {there / 1e9:,.0f} GB of memory; take a smaller model"
        )
    if weights is not None:
        return load(weights, device, torch.float32).train()
    with torch.device(device):  # torch's default one may be another
        return XLSTM(config)


def _physical_memory() -> float:
    """Bytes of memory of this machine; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return math.inf


def check_moments(
    saved: checkpoint.Checkpoint,
    parameters: Mapping[str, tuple[torch.Size, torch.dtype]],
    found: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> None:
    """RunError unless a checkpoint's optimizer holds the moments of these parameters and no other:
    fused AdamW reads as far as the parameters go, whatever the moments are."""
    wanted = {"random/cpu": (torch.get_rng_state().shape, torch.uint8)}
    if "random/cuda" in found:
        wanted["random/cuda"] = (found["random/cuda"][0], torch.uint8)
    if saved.meta["step"]:  # before the first step there are none
        for name, own in parameters.items():
            wanted[f"{name}/step"] = (torch.Size(), torch.float32)
            wanted |= {f"{name}/{moment}": own for moment in MOMENTS[1:]}
    checkpoint.check_tensors(saved.path, wanted, found)


def train(run: Run, placement: Placement) -> Iterator[Record]:
    """Train to the end of the run's options, from its checkpoint or its seed; yields what happens.

    Records are dictionaries with "event" ("train": loss in nats a token, lr, tokens_per_second, on
    a CPU threads; "eval": held-out bits_per_byte, or bits_per_token where the tokens do not give
    the text back; "save"), "step", "progress" in [0, 1] and "elapsed" seconds. RunError when the
    corpus is too small for one window, the loss is no longer a number, or a checkpoint cannot be
    written. Interrupted, after a checkpoint, when `placement.signalled` says so. The run's lock is
    given back at the end.
    """
    with run.lock or nullcontext():
        yield from _train(run, placement)


def _train(run: Run, placement: Placement) -> Iterator[Record]:
    corpus, config, options = run.corpus, run.config, run.options
    torch.manual_seed(options.seed)
    model = placement.build(config, options.precision, run.weights)
    state = TrainState(model, options, placement)
    step, elapsed = 0, 0.0
    position = run.position or corpus.begin(options.seed, options.context)
    if run.saved is not None:
        step, elapsed = run.saved.position()
        placement.load(run.saved, state)
    texts = {} if corpus.codec.source is None else {"tokenizer.json": corpus.codec.source}
    held_out, raw = corpus.held_out(options.eval_bytes)
    unit, size = "bits_per_byte", len(raw)
    if corpus.lost:
        unit, size = "bits_per_token", len(held_out) - 1
    log = MetricsLog(run.folder / METRICS, step) if placement.main else None
    logged_at, busy = step, 0.0
    told: list[Tensor] = []  # by steps whose loss nobody has looked at: a look waits for the device
    began = time.monotonic() - elapsed
    best = _best(run, unit)
    saved_at = placement.clock()

    def record(event: str, **values: Any) -> Record:
        line = {"event": event, "step": step, "progress": options.progress(step, elapsed)}
        line |= {"elapsed": round(elapsed, 3), **values}
        if log is not None and event != "save":
            log.write(line)
        return line

    def clock() -> float:
        seconds = time.monotonic() - began
        return placement.elapsed(seconds) if options.seconds else seconds

    def look() -> float:
        """The loss of the last step, once all since the last look are found to be numbers."""
        values = torch.stack(told).tolist()
        for number, (loss, norm) in enumerate(values, step - len(told) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise RunError(
                    f"the loss is {loss} and the gradient's norm {norm} at step {number}; "
                    "resume with a smaller --lr"
                )
        told[:-1] = []
        return values[-1][0]

    def save() -> Record:
        nonlocal saved_at
        if told:
            look()
        meta = {
            "tfla": tfla.__version__,
            "step": step,
            "elapsed": elapsed,
            "config": config.to_dict(),
            "options": dataclasses.asdict(options),
            "data": corpus.fingerprint,
            "position": dataclasses.asdict(position),
            "best": best,
        }
        if run.init is not None:
            meta["init"] = run.init
        if corpus.codec.named_end is not None:
            meta["end"] = corpus.codec.named_end
        if placement.device.type == "cpu":
            meta["threads"] = torch.get_num_threads()
        placement.save(run.folder, meta, state, texts)
        saved_at = placement.clock()
        return record("save")

    if run.saved is None:
        yield save()
    done = options.progress(step, elapsed) >= 1.0
    while not done:
        started = time.monotonic()
        lr = options.lr_at(options.progress(step, elapsed))
        with placement.around_step():
            told.append(_step(state, corpus, options, placement, position, lr))
        rows = options.batch * options.accumulate
        position = corpus.advance(position, rows, options.seed, options.context)
        step += 1
        if step % options.log_every == 0:
            look()
        elapsed = clock()
        busy += time.monotonic() - started
        done = options.progress(step, elapsed) >= 1.0
        late = placement.clock() - saved_at >= options.save_every_seconds
        signal, due = placement.largest([placement.signalled(), int(late)])
        if signal and not done:
            yield save()
            placement.finish()
            raise Interrupted(signal)
        if step % options.log_every == 0 or done:
            speed = (step - logged_at) * options.tokens_per_step / max(busy, 1e-9)
            on = {"threads": torch.get_num_threads()} if placement.device.type == "cpu" else {}
            yield record("train", loss=look(), lr=lr, tokens_per_second=round(speed, 1), **on)
            logged_at, busy = step, 0.0
        if step % options.eval_every == 0 or done:
            bits = evaluate(state.model, held_out, size, options, placement.device)
            if best is None or bits < best[unit]:
                best = {"step": step, unit: bits, **_judged(options)}
            yield record("eval", **{unit: bits})
        elapsed = clock()
        is_best = placement.keep_best and best is not None and best["step"] == step
        if step % options.save_every == 0 or due or is_best or done:
            yield save()
    placement.finish()


def _judged(options: TrainOptions) -> Record:
    """The options by which the held-out bits of two evaluations are of one kind."""
    return {name: getattr(options, name) for name in ("eval_bytes", "context", "precision")}


def _best(run: Run, unit: str) -> Record | None:
    """What a checkpoint says of the best evaluation before it; None: nothing of this kind."""
    best = run.saved and run.saved.best()
    if not best or not is_number(best.get(unit)):
        return None
    return best if best.items() >= _judged(run.options).items() else None


def evaluate(
    model: nn.Module,
    stream: Tensor,
    size: int,
    options: TrainOptions,
    device: torch.device,
    window: int | None = None,
) -> float:
    """Bits a byte that the model needs for `stream` (tokens,), which encodes `size` bytes; or bits
    a token, where `size` is the number of tokens but the first.

    The stream is read in windows, by default of the training context, from an empty state, so a
    window's first tokens cost most: sum over all tokens but the first of
    -log2 p(token | its window), over `size`.
    """
    nats = total_nats(model, stream, window or options.context, options.precision, device)
    return nats / math.log(2) / size


def total_nats(
    model: nn.Module, stream: Tensor, window: int, precision: str, device: torch.device
) -> float:
    """The sum of ``token_nats``."""
    nats = token_nats(model, stream, window, precision, device)
    return nats.sum(dtype=torch.float64).item()


@torch.no_grad()
def token_nats(
    model: nn.Module, stream: Tensor, window: int, precision: str, device: torch.device
) -> Tensor:
    """-log p(token | its window), in nats, of every token of `stream` (tokens,) but the first:
    (windows, window) fp32 on the CPU, with zeros after the last token. Every window begins with an
    empty state."""
    rows = torch.split(stream[:-1], window), torch.split(stream[1:], window)
    inputs = nn.utils.rnn.pad_sequence(list(rows[0]), batch_first=True)
    targets = nn.utils.rnn.pad_sequence(list(rows[1]), batch_first=True, padding_value=-100)
    found = []
    with autocast(precision, device):
        for part in torch.arange(len(inputs), device="cpu").split(max(1, 4096 // window)):
            logits, _ = model(inputs[part].to(device))
            nats = _nats(logits, targets[part].to(device), "none")
            found.append(nats.view(len(part), -1).cpu())
    return torch.cat(found)


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
    position: Position,
    lr: float,
) -> Tensor:
    """One update; returns the mean loss of its tokens in nats and the gradient's norm, (2,)."""
    rows = options.batch * options.accumulate
    own = np.arange(rows).reshape(options.accumulate, placement.rows, -1)[:, placement.row]
    windows = corpus.windows(
        position, rows, options.context, options.seed, own.flatten().tolist(), placement.part
    )
    parts = (x.to(placement.device).chunk(options.accumulate) for x in windows)
    total = torch.zeros((), device=placement.device)
    for inputs, targets in zip(*parts, strict=True):
        with autocast(options.precision, placement.device):
            loss = mean_nats(state.model, inputs, targets) / options.accumulate
        loss.backward()
        total += loss.detach()
    found = placement.clip(state, total, options.clip)
    state.step(lr)
    return found


def mean_nats(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of tokens (B, T) and their successors, in nats. Of many tokens the logits are
    made in pieces, and again for the backward pass: those of 131,072 tokens and 50,304 words take
    26 GB."""
    if targets.numel() <= PIECE:
        return _nats(model(inputs)[0], targets, "mean")
    x, _ = model.hidden(inputs)  # type: ignore[operator]

    def nats(x: Tensor, targets: Tensor) -> Tensor:
        return _nats(model.logits(x), targets, "sum")  # type: ignore[operator]

    pieces = zip(x.flatten(0, 1)[None].split(PIECE, 1), targets.flatten().split(PIECE), strict=True)
    parts = [recompute(nats, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(parts).sum() / targets.numel()


def _nats(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and "gate" not in name and "embedding" not in name
