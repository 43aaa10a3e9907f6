"""How early training goes with other biases of the input gate: the task "bias" of `runs`.

The same small model from the same seed on the same tokens; only the bias differs, and the gate.
What is recorded of each step is its loss and the norm of all gradients before they are clipped.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfla.bench.runs import Row, Task, Tell, reason_of
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.files import RunError
from tfla.xlstm.run import TrainOptions, start
from tfla.xlstm.train import Placement, TrainState, train

NAMES = {"tfla exp": "exp", "tfla sigmoid": "sigmoid"}


@dataclass(frozen=True)
class BiasStudy:
    """What `tfla.xlstm.run.start` takes of a run (`paths`, `model`, `options`), and the bias."""

    paths: tuple[Path, ...]
    model: dict[str, Any]
    options: dict[str, Any]
    bias: float

    def describe(self) -> Row:
        return {"model": self.model, "options": self.options, "bias": self.bias}


def check_options(model: dict[str, Any], options: dict[str, Any]) -> None:
    """RunError in one line, before anything is measured."""
    TrainOptions(**options)
    try:
        XLSTMConfig(vocab_size=1, **model)
    except (TypeError, ValueError) as error:
        raise RunError(str(error).rstrip(".")) from error


class Watched(Placement):
    """Starts with a bias of its own, and keeps the loss and the gradient's norm of each step."""

    def __init__(self, device: torch.device, bias: float) -> None:
        super().__init__(device)
        self.bias = bias
        self.told: list[Tensor] = []
        self.times: list[float] = []

    def build(self, config: XLSTMConfig, precision: str, weights: Path | None = None) -> nn.Module:
        model: Any = super().build(config, precision, weights)
        with torch.no_grad():
            for block in model.blocks:
                block.mlstm.gates.bias[: config.num_heads] = self.bias  # rows: i, then f
        return model

    def clip(self, state: TrainState, loss: Tensor, largest: float) -> Tensor:
        found = super().clip(state, loss, largest)
        self.told.append(found)
        self.times.append(time.perf_counter())
        return found


def bias(task: Task, device: torch.device, tell: Tell) -> None:
    """A row a gate: a training with the study's bias."""
    study = task.work
    assert isinstance(study, BiasStudy)
    for name in task.names:
        row = task.row(name, ours=True)
        placement = Watched(device, study.bias)
        try:
            tell("begin", name, "reading the texts")
            with tempfile.TemporaryDirectory() as folder:
                gate = {"input_gate": NAMES[name]}
                values = {**study.model, **study.options, **gate, "paths": list(study.paths)}
                run = start(Path(folder) / "run", values)
                row["parameters"] = run.config.num_parameters()
                for record in train(run, placement):
                    tell("begin", name, f"step {record['step']} with bias {study.bias:g}")
                    row |= {k: v for k, v in record.items() if k.startswith("bits_per_")}
        except Exception as error:
            row |= {"status": "failed", "reason": reason_of(error)}
        pairs = [x.tolist() for x in placement.told]
        row["loss"] = [float(f"{loss:.5g}") for loss, _ in pairs]
        row["gradient_norm"] = [float(f"{norm:.5g}") for _, norm in pairs]
        times = placement.times
        row["samples_ms"] = [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
        tell("row", row)
