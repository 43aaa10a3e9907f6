"""Checkpoints that say something else than was saved, under seals and a checksum that are right."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tfla.xlstm import checkpoint

Meta = dict[str, Any]


def checksum(meta: Mapping[str, Any]) -> str:
    """That of what checkpoint.json says, as its format has it."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def change_meta(path: Path, change: Callable[[Meta], object]) -> None:
    """Change what a checkpoint's checkpoint.json says, and make its checksum right."""
    meta = json.loads((path / "checkpoint.json").read_text())
    meta.pop("checksum", None)
    change(meta)
    (path / "checkpoint.json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))


def seal_files(path: Path) -> None:
    """Make the seals right of all files that a checkpoint lists and that are there."""

    def seal(meta: Meta) -> None:
        meta["files"] = {
            name: checkpoint.seal(path / name) if (path / name).is_file() else stated
            for name, stated in meta["files"].items()
        }

    change_meta(path, seal)
