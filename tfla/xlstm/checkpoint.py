"""Checkpoints: folders of safetensors and JSON, whole or absent, and checked when read.

    RUN/checkpoints/step-00000100/
        checkpoint.json         the run and where it stands; size and SHA-256 of every other file
        model.safetensors       the parameters by name
        optimizer.safetensors   AdamW's moments by parameter name, states of random generators
        tokenizer.json          only when the run has a tokenizer

Of many ranks each writes the rows that it holds, to model-00000.safetensors and so on. No pickle is
written or read, so a checkpoint from a stranger can hold wrong numbers but no code. A folder is
written beside its final place, flushed to the disk, and renamed: a process killed at any moment
leaves the previous checkpoint as the last one and `.tmp` folders that nobody reads and the next run
removes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfla.errors import RunError

FORMAT = 1
Seal = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found whole.

    Example:
        checkpoint = load(Path("runs/train"))       # the last one; or name a step-... folder
        checkpoint.meta["step"], checkpoint.tensors("model")["embedding.weight"].shape
    """

    path: Path
    meta: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of `name`.safetensors or of its shards, in whole, on the CPU. RunError when
        one cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found: dict[str, list[Tensor]] = {}
        for file in (self.path / part for part in sorted(self.meta["files"])):
            if re.fullmatch(rf"{name}(-\d+)?\.safetensors", file.name):
                try:
                    for key, x in load_file(file).items():
                        found.setdefault(key, []).append(x)
                except (OSError, SafetensorError) as error:
                    way = _way_out(self.path)
                    raise RunError(f"{file} cannot be read ({error}); {way}") from error
        # Ranks hold rows in their order.
        return {n: x[0] if len(x) == 1 else torch.cat(x) for n, x in found.items()}

    def text(self, name: str) -> str | None:
        """The text of a further file of the checkpoint, None when it has none of that name."""
        return (self.path / name).read_text("utf-8") if name in self.meta["files"] else None

    def restore(self, module: nn.Module) -> None:
        """Copy the parameters into `module`; RunError when names or shapes are not its own."""
        saved, own = self.tensors("model"), dict(module.named_parameters())
        for name in sorted(saved.keys() ^ own.keys()):
            lacks = "the checkpoint lacks" if name in own else "the model does not have"
            raise RunError(f"{self.path}: {lacks} {name}; it is of another model")
        for name, tensor in saved.items():
            want = own[name]
            if tensor.shape != want.shape:
                raise RunError(
                    f"{self.path}: {name} is {tuple(tensor.shape)}, "
                    f"the model wants {tuple(want.shape)}; it is of another model"
                )
            want.data.copy_(tensor)


def save(
    run: Path,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    keep: int = 2,
    shards: Mapping[Path, Seal] | None = None,
) -> Path:
    """Write the checkpoint of step meta["step"] under `run`, drop all but the last `keep`.

    `tensors` become files of their name, `texts` files with that content, `shards` are files that
    move in, with what `seal` says of them. Returns the folder.
    """
    from safetensors.torch import save_file

    folder = _folder(run)
    target = folder / f"step-{meta['step']:08d}"
    with atomic_folder(target) as temporary:
        for name, group in tensors.items():
            flat = {key: value.detach().contiguous().cpu() for key, value in group.items()}
            save_file(flat, temporary / f"{name}.safetensors")
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
        files = {path.name: seal(path) for path in sorted(temporary.iterdir())}
        for path, known in (shards or {}).items():
            files[path.name] = known
            path.rename(temporary / path.name)
        body = {"format": FORMAT, **meta, "files": files}
        body["checksum"] = _checksum(body)
        (temporary / "checkpoint.json").write_text(json.dumps(body, indent=1), "utf-8")
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def exists(run: Path) -> bool:
    """Whether `run` holds a checkpoint."""
    return bool(_steps(_folder(run)))


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`, or the last one of the run in `path`, after reading and checking
    every byte of it.

    Raises RunError, which names the file, when there is none, when a file is missing, cut short or
    altered, and when it was written by a later version.
    """
    if not path.exists():
        raise RunError(f"{path} does not exist; name the folder that `tfla train --out` wrote")
    if not (path / "checkpoint.json").exists() and not path.name.startswith("step-"):
        steps = _steps(_folder(path))
        if not steps:
            raise RunError(
                f"{path} holds no checkpoint; name the folder that `tfla train --out` wrote"
            )
        path = steps[-1]
    file = path / "checkpoint.json"
    try:
        meta = json.loads(file.read_text("utf-8"))
        stated = meta.pop("checksum")
        if stated != _checksum(meta):
            raise ValueError("its checksum is wrong")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        why = (
            "it is missing"
            if isinstance(error, FileNotFoundError)
            else "it is not what was written"
        )
        raise RunError(f"{file} is damaged: {why}; {_way_out(path)}") from error
    if meta["format"] != FORMAT:
        raise RunError(
            f"{file} has format {meta['format']}, this tfla reads {FORMAT}; upgrade tfla"
        )
    for name, stated in meta["files"].items():
        part = path / name
        if not part.exists():
            raise RunError(f"{part} is missing; {_way_out(path)}")
        if part.stat().st_size != stated["bytes"]:
            raise RunError(
                f"{part} is damaged: {part.stat().st_size} of {stated['bytes']} bytes; "
                f"{_way_out(path)}"
            )
        if seal(part) != stated:
            raise RunError(f"{part} is damaged: its SHA-256 is wrong; {_way_out(path)}")
    return Checkpoint(path, meta)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends, or vanishes when it raises."""
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*sorted(temporary.iterdir()), temporary):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written under `run`."""
    for folder in (run, _folder(run)):
        for torn in folder.glob(".*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder(run: Path) -> Path:
    return run / "checkpoints"


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def seal(path: Path) -> Seal:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _way_out(path: Path) -> str:
    before = [other for other in _steps(path.parent) if other.name < path.name]
    if before:
        return f"delete {path} to go back to {before[-1].name}"
    return f"delete {path} and train again, or restore it from a copy"


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows has no handle to flush a folder through
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
