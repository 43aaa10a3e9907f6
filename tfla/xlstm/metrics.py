"""RUN/metrics.jsonl: the records of a training run, one JSON object a line.

    {"event": "train", "step": 10, "progress": 0.1, "elapsed": 3.2,
     "loss": 4.1, "lr": 0.002, "tokens_per_second": 9000.0}
    {"event": "eval", "step": 100, "progress": 1.0, "elapsed": 30.1, "bits_per_byte": 2.9}

An evaluation has "bits_per_token" instead where the tokenizer does not give the text back.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfla.xlstm import files

Record = dict[str, Any]
COMMON = ("step", "progress", "elapsed")
FIELDS = {"train": ("loss", "lr", "tokens_per_second"), "eval": ()}
UNITS = {"bits_per_byte": "bits per byte", "bits_per_token": "bits per token"}


class MetricsLog:
    """The records as JSON lines; those after `step`, of a run that died later, are dropped.
    RunError where the file is of another."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        whole = "".join(json.dumps(line) + "\n" for line in kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, whole.encode(), is_metrics)
        self.path = path

    def write(self, line: Record) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[Record]:
    """The records of a run; none without the file. A line that is none, cut short by a kill or
    damaged since, is passed over: nothing that is computed depends on it."""
    records = []
    for line in path.read_bytes().split(b"\n") if files.is_regular(path) else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if _is_record(record):
                records.append(record)
    return records


def is_metrics(path: Path) -> bool:
    """Whether a run has written this file: it holds a record, or the beginning of the first."""
    return bool(read_metrics(path)) or path.read_bytes().startswith(b'{"event": "')


def unit_of(record: Mapping[str, Any]) -> str | None:
    """In which unit an evaluation is stated, bits_per_byte or bits_per_token."""
    return next((unit for unit in UNITS if is_number(record.get(unit))), None)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("event") not in FIELDS:
        return False
    event = record["event"]
    numbers = all(is_number(record.get(name)) for name in (*COMMON, *FIELDS[event]))
    return numbers and (event == "train" or unit_of(record) is not None)


def is_number(x: Any) -> bool:
    """Whether what JSON held is a number that a float holds: 400 digits are none."""
    try:
        return type(x) in (int, float) and math.isfinite(x)
    except OverflowError:
        return False
