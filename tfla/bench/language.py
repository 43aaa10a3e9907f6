"""Language models of one size that differ in the mixer of tokens: the tasks "language_plan" and
"language" of `runs`, which `tfla bench language` puts together.

A training is one of `tfla.xlstm`: the same windows of text in the same order for all models of a
seed, and its checkpoints, so that what was cut goes on and comes to the same result.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfla.bench import measure
from tfla.bench.cases import DTYPES
from tfla.bench.language_study import (
    EVALUATIONS,
    LONG,
    SAME_SIZE,
    Asked,
    LanguageStudy,
    Training,
    load_result,
    plan_of,
    reported_text,
    save_result,
    tuning_bytes,
    tuning_text,
)
from tfla.bench.models import LOGITS_BOUND
from tfla.bench.runs import Row, Task, Tell, reason_of
from tfla.errors import RunError
from tfla.threads import Threads
from tfla.xlstm import checkpoint, files
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.data import Codec, Corpus
from tfla.xlstm.generate import sample
from tfla.xlstm.metrics import Record, read_metrics
from tfla.xlstm.model import XLSTM
from tfla.xlstm.run import METRICS, TrainOptions, resume, start
from tfla.xlstm.train import Placement, autocast, evaluate, token_nats, train

TIMED = 12  # steps of the training by which the speed is measured
PROFILED = 2  # of them the one whose memory is counted, which takes longer
SAMPLE = 200  # tokens
TEMPERATURE = 0.8
FIRST_POSITIONS = 8  # tokens of the first range of positions
CHECKED = 64  # tokens whose logits are held against fp64
NOT_PLANNED = "it has no plan; why is said above it, or was when the study began"


class Mixing(Placement):
    """Builds the model with the mixer of `name`, and keeps hold of it. The best checkpoint is not
    kept: the last one is judged."""

    keep_best = False
    model: XLSTM

    def __init__(self, device: torch.device, asked: Asked, name: str) -> None:
        super().__init__(device)
        self.size = asked.sized
        self.mixer, self.config = self.size.mixer(name), self.size.config(name)

    def build(self, config: XLSTMConfig, precision: str, weights: Path | None = None) -> nn.Module:
        assert weights is None, "a study begins with a seed"
        with torch.device("cpu"):
            self.model = XLSTM(config, self.mixer).to(self.device)
        return self.model


class Timed(Mixing):
    """Measures the steps: the seconds of each, and the memory of one."""

    def __init__(self, device: torch.device, asked: Asked, name: str) -> None:
        super().__init__(device, asked, name)
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self.around_step = self._measured

    @contextmanager
    def _measured(self) -> Iterator[None]:
        began = time.perf_counter()
        if len(self.seconds) == PROFILED:
            with measure.peak(self.device) as found:
                yield
            self.peak_bytes = found.bytes
        else:
            yield
        measure.synchronize(self.device)
        self.seconds.append(time.perf_counter() - began)


def plan(task: Task, device: torch.device, tell: Tell) -> None:
    """A row a model: what a step of it takes. Of these the plan of the study is made; that of a
    study which is resumed is read."""
    study = task.work
    assert isinstance(study, LanguageStudy)
    found = study.plan()
    if found is None:
        corpus, measured = study.corpus(), {}
        for name in task.names:
            tell("begin", name, "measuring its speed")
            try:
                for _ in range(1 if device.type == "cpu" else 2):  # the first compiles kernels
                    measured[name] = _measured(study.asked, corpus, name, device)
            except Exception as error:
                measured[name] = {"status": "failed", "reason": reason_of(error)}
        good = {name: row for name, row in measured.items() if row["status"] == "ok"}
        if not good:
            raise RunError(f"no model could be timed: {measured[task.names[0]]['reason']}")
        check_sizes({name: row["parameters"] for name, row in good.items()})
        found = plan_of(study, corpus, good, torch.get_num_threads())
        study.save_plan(found)
    else:
        measured = found.measured
    for name in task.names:
        row = measured.get(name, {"status": "failed", "reason": NOT_PLANNED})
        tell("row", task.row(name, ours=name.startswith("tfla"), steps=found.steps) | row)


def check_sizes(parameters: Mapping[str, int]) -> None:
    """RunError unless all models have as many parameters, to within SAME_SIZE."""
    least, most = min(parameters.values(), default=1), max(parameters.values(), default=1)
    if most > (1 + SAME_SIZE) * least:
        raise RunError(f"the models differ by more than {SAME_SIZE:.0%} in size: {parameters}")


def _measured(asked: Asked, corpus: Corpus, name: str, device: torch.device) -> Row:
    placement = Timed(device, asked, name)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in _train(
            Path(folder) / "run", corpus, placement, asked.options(TIMED, asked.rates[0], 0)
        ):
            pass
    judged(placement.model, corpus, asked, device)
    measure.synchronize(device)
    beside = time.perf_counter() - began - sum(placement.seconds)
    steps = placement.seconds[PROFILED + 1 :]
    tuning, raw = tuning_text(corpus, asked.sized)
    began = time.perf_counter()
    evaluate(placement.model, tuning, len(raw), TrainOptions(**asked.options(1, 1.0, 0)), device)
    evaluations = EVALUATIONS * (time.perf_counter() - began)
    row: Row = {
        "status": "ok",
        "parameters": sum(p.numel() for p in placement.model.parameters()),
        "samples_ms": [1e3 * seconds for seconds in steps],
        "step_s": statistics.median(steps),
        "beside_s": beside + evaluations,
        "peak_bytes": placement.peak_bytes,
    }
    error = logits_error(placement.model, tuning[None, :CHECKED].to(device), asked.precision)
    row["errors"] = {"logits": error}
    if not error <= LOGITS_BOUND[DTYPES[asked.precision]]:
        row |= {"status": "WRONG", "reason": f"logits are off by {error:.1e} from fp64"}
    return row


@torch.no_grad()
def logits_error(model: XLSTM, tokens: Tensor, precision: str) -> float:
    """Relative error of the logits of tokens (B, T) against the same model in fp64 on the CPU."""
    with autocast(precision, tokens.device):
        found, _ = model(tokens)
    truth, _ = copy.deepcopy(model).cpu().double()(tokens.cpu())
    return ((found.cpu() - truth).norm() / truth.norm()).item()


def _train(
    folder: Path, corpus: Corpus, placement: Mixing, options: Mapping[str, Any]
) -> Iterator[Record]:
    """A training in `folder`, from its start or from where it was cut; what `train` yields."""
    size = placement.size
    values = {**placement.config, **options, "eval_bytes": tuning_bytes(corpus, size)}
    take_up = resume if checkpoint.exists(folder) else start
    yield from train(take_up(folder, values, corpus=corpus), placement)


def language(task: Task, device: torch.device, tell: Tell) -> None:
    """A row: a training and what its model is worth, or of one that is over what that was."""
    training, [name] = task.work, task.names
    assert isinstance(training, Training)
    study = training.study
    row = task.row(name, ours=name.startswith("tfla"))
    try:
        found = study.plan()
        if found is None or name not in found.measured:
            raise RunError(NOT_PLANNED)
        if device.type == "cpu":
            Threads(found.threads).set()  # another number would round otherwise
        lr = training.lr if training.lr is not None else study.best_rate(name)
        folder = study.training_folder(name, lr, training.seed)
        row |= {"lr": lr, "steps": found.steps}
        row |= {key: found.measured[name][key] for key in ("parameters", "peak_bytes")}
        result = load_result(folder)
        if result is None:
            corpus, placement = study.corpus(), Mixing(device, study.asked, name)
            options = study.asked.options(found.steps, lr, training.seed)
            where = f"learning rate {lr:g}, seed {training.seed}"
            for record in _train(folder, corpus, placement, options):
                tell("begin", name, f"{where}, step {record['step']}")
            tell("begin", name, f"{where}, reading the held-out text")
            result = course(read_metrics(folder / METRICS), study.asked)
            result |= judged(placement.model, corpus, study.asked, device)
            save_result(folder, result)
        for path in (folder / "checkpoints").iterdir():  # no use any more, and large
            files.discard(path, checkpoint.written_files)
        row |= result
    except Exception as error:
        row |= {"status": "failed", "reason": reason_of(error)}
    tell("row", row)


def course(records: Sequence[Record], asked: Asked) -> Row:
    """How a training went: bits a byte of the tuning text ("curve") over the tokens and the seconds
    of training before each evaluation, and the milliseconds of its steps."""
    size = asked.context * asked.batch
    seconds, before = 0.0, 0
    row: Row = {"tokens": [], "seconds": [], "curve": [], "samples_ms": []}
    for record in records:
        if record["event"] == "train":
            step_s = size / record["tokens_per_second"]
            seconds += (record["step"] - before) * step_s
            before = record["step"]
            row["samples_ms"].append(1e3 * step_s)
        else:
            row["tokens"].append(record["step"] * size)
            row["seconds"].append(seconds)
            row["curve"].append(record["bits_per_byte"])
    return row


def judged(model: XLSTM, corpus: Corpus, asked: Asked, device: torch.device) -> Row:
    """What a trained model is worth on the reported text: bits a byte in windows of the context and
    of LONG times it, the same by position in the long ones; and a text that it writes."""
    pieces, bytes_per_token = reported_text(corpus, asked)
    short, long = (
        torch.cat([token_nats(model, piece, window, asked.precision, device) for piece in pieces])
        for window in (asked.context, LONG * asked.context)
    )
    edges = position_edges(asked.context)
    bits, bits_long = (
        x.mean(dtype=torch.float64).item() / math.log(2) / bytes_per_token for x in (short, long)
    )
    return {
        "reported_bytes": round(long.numel() * bytes_per_token),
        "bits": bits,
        "bits_long": bits_long,
        "positions": edges,
        "by_position": [x / bytes_per_token for x in bits_by_position(long, edges)],
        "sample": written(model, corpus.codec, SAMPLE, asked.precision, device),
    }


def position_edges(context: int) -> list[int]:
    """Ranges of positions in a window of LONG times the context: half octaves, which end there and
    at the context; and all that is before FIRST_POSITIONS as one."""
    last = LONG * context
    count = math.floor(2 * math.log2(last / min(FIRST_POSITIONS, context)))
    inner = {round(last / 2 ** (number / 2)) for number in range(count + 1)}
    return sorted({0} | inner)


def bits_by_position(nats: Tensor, edges: Sequence[int]) -> list[float]:
    """Bits a token of each range of positions, the mean over windows (windows, positions)."""
    bits = nats.double().mean(0) / math.log(2)
    return [bits[begin:end].mean().item() for begin, end in pairwise(edges)]


@torch.no_grad()
def written(model: XLSTM, codec: Codec, count: int, precision: str, device: torch.device) -> str:
    """The beginning of a document, at most `count` tokens. All that is written is read anew for
    each token, by every model, as attention keeps no state here."""
    generator = torch.Generator().manual_seed(0)
    tokens, decoder, text = [codec.end], codec.decoder(), ""
    while len(tokens) <= count:
        with autocast(precision, device):
            x, _ = model.hidden(torch.tensor([tokens], device=device))
            logits = model.logits(x[:, -1]).cpu()
        token = int(sample(logits, TEMPERATURE, generator=generator))
        if token == codec.end:
            break
        tokens.append(token)
        text += decoder.next(token)
    return text + decoder.rest()
