"""Checkpoints: folders of safetensors and JSON, whole or absent, and checked when read.

    RUN/checkpoints/step-00000100/
        checkpoint.json         the run and where it stands; size and SHA-256 of every other file
        model.safetensors       the parameters by name
        optimizer.safetensors   AdamW's moments by parameter name, states of random generators
        tokenizer.json          only when the run has a tokenizer

Of many ranks each writes the rows that it holds, to model-00000.safetensors and so on. No pickle is
written or read, so a checkpoint from a stranger can hold wrong numbers but no code. Only the files
that checkpoint.json lists are read, under plain names, regular files all, and each is looked at
before the first is opened. How a folder appears whole and when it is removed: files.py.
"""

import hashlib
import json
import os
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfla.errors import RunError
from tfla.xlstm import files
from tfla.xlstm.config import XLSTMConfig

FORMAT = 1
STEP = re.compile(r"step-(\d{8,})")
PLAIN = re.compile(r"\w[\w.-]*", re.ASCII)  # a file's name: no separators, no dot in front
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of 8 bits: no arithmetic
Seal = dict[str, Any]
Shapes = Mapping[str, tuple[torch.Size, torch.dtype | None]]  # dtype None: any of FLOATS


class WeightsWarning(UserWarning):
    """Weights were loaded that are NaN or infinite."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found whole.

    Example:
        checkpoint = load(Path("runs/train"))       # the last one; or name a step-... folder
        checkpoint.meta["step"], checkpoint.tensors("model")["embedding.weight"].shape
    """

    path: Path
    meta: dict[str, Any]

    def parts(self, name: str) -> list[Path]:
        """`name`.safetensors, or its shards in the order of their ranks."""
        form = re.compile(rf"{name}(-\d+)?\.safetensors")
        return [self.path / part for part in sorted(self.meta["files"]) if form.fullmatch(part)]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of `name`.safetensors or of its shards, in whole, on the CPU. RunError when
        one cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file

        found: dict[str, list[Tensor]] = {}
        for file in self.parts(name):
            try:
                utf8 = os.fsencode(file) == str(file).encode("utf-8", "replace")
                # load_file takes no other path, but would not copy what it reads.
                read = load_file(file) if utf8 else load(file.read_bytes())
                for key, x in read.items():
                    found.setdefault(key, []).append(x)
            except (OSError, SafetensorError) as error:
                way = _way_out(self.path)
                raise RunError(f"{file} cannot be read ({error}); {way}") from error
        whole = {}
        for key, shards in found.items():
            try:  # ranks hold rows in their order
                whole[key] = shards[0] if len(shards) == 1 else torch.cat(shards)
            except (RuntimeError, TypeError) as error:
                raise RunError(
                    f"{self.path}: the shards of {key} do not fit together; {_way_out(self.path)}"
                ) from error
        return whole

    def text(self, name: str) -> str | None:
        """The text of a further file of the checkpoint, None when it has none of that name."""
        if name not in self.meta["files"]:
            return None
        try:
            return (self.path / name).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise RunError(f"{self.path / name} is no UTF-8; {_way_out(self.path)}") from error

    def config(self) -> XLSTMConfig:
        """The model's shape. RunError when there is no such model, or when its parameters cannot
        be in the checkpoint's files: then nothing of that size has been allocated."""
        where = self.path / "checkpoint.json"
        try:
            config = XLSTMConfig.from_dict(self.meta["config"])
            claimed = config.num_parameters()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RunError(f"{where} describes no model: {_first_line(error)}") from error
        held = sum(part.stat().st_size for part in self.parts("model"))
        if held < 2 * claimed:  # a parameter takes two bytes at least
            raise RunError(
                f"{where} claims a model of {claimed:,} parameters, its files have {held:,} bytes; "
                f"{_way_out(self.path)}"
            )
        return config

    def position(self) -> tuple[int, float]:
        """The step and the seconds of training after which it was written."""
        step: Any = self.meta.get("step")
        elapsed: Any = self.meta.get("elapsed")
        if type(step) is not int or not 0 <= step < 2**63:
            raise RunError(
                f"{self.path}/checkpoint.json has step {reprlib.repr(step)}; "
                "it must be a whole number"
            )
        # A bound, for an int of JSON may have 400 digits, which no float holds.
        if type(elapsed) not in (int, float) or not 0 <= elapsed < 1e300:
            raise RunError(
                f"{self.path}/checkpoint.json has elapsed {reprlib.repr(elapsed)}; "
                "it must be seconds"
            )
        return step, float(elapsed)

    def end(self) -> int | None:
        """The id that ends a document, where it is one of the tokenizer's own."""
        end: Any = self.meta.get("end")
        if end is not None and not (type(end) is int and 0 <= end < 2**31):
            raise RunError(
                f"{self.path}/checkpoint.json has end {reprlib.repr(end)}; "
                "it must be the id of a token"
            )
        return end

    def init(self) -> str | None:
        """The model that the run began with, as it was named; None: it was drawn."""
        init = self.meta.get("init")
        if init is not None and not isinstance(init, str):
            raise RunError(
                f"{self.path}/checkpoint.json has init {reprlib.repr(init)}; it must be a path"
            )
        return init

    def best(self) -> dict[str, Any] | None:
        """The best evaluation on held-out text up to here, with the "step" of its checkpoint."""
        return _best(self.meta)

    def restore(self, module: nn.Module) -> None:
        """Copy the parameters into `module`; RunError when names or shapes are not its own, a
        warning when numbers are not finite."""
        saved, own = self.tensors("model"), dict(module.named_parameters())
        check_tensors(self.path, {n: (p.shape, None) for n, p in own.items()}, shapes(saved))
        warn_unless_finite(self.path, saved.items())
        for name, tensor in saved.items():
            own[name].data.copy_(tensor)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """What `check_tensors` compares."""
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def check_tensors(
    path: Path, wanted: Shapes, found: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> None:
    """RunError, which names the tensor, unless names, shapes and dtypes are those wanted."""
    for name in sorted(found.keys() ^ wanted.keys()):
        lacks = "the checkpoint lacks" if name in wanted else "the model does not have"
        raise RunError(f"{path}: {lacks} {name}; it is of another model")
    for name, (shape, dtype) in wanted.items():
        has, of = found[name]
        if has != shape:
            raise RunError(
                f"{path}: {name} is {tuple(has)}; the model needs {tuple(shape)}; it is of another "
                "model"
            )
        if of != dtype if dtype is not None else of not in FLOATS:
            kind = str(dtype).removeprefix("torch.") if dtype else "a floating dtype of 16 bits up"
            raise RunError(
                f"{path}: {name} is {str(of).removeprefix('torch.')}; the model needs {kind}; it "
                "is of another model"
            )


def warn_unless_finite(path: Path, named: Iterable[tuple[str, Tensor]]) -> None:
    """Warn of weights, or of their moments, that are NaN or infinite."""
    broken = [
        name for name, x in named if x.is_floating_point() and not bool(torch.isfinite(x).all())
    ]
    if broken:
        more = f" and {len(broken) - 1} further tensors" if broken[1:] else ""
        message = f"{path}: {broken[0]}{more} hold numbers that are not finite"
        warnings.warn(WeightsWarning(message), stacklevel=3)


def save(
    run: Path,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    keep: int = 2,
    shards: Mapping[Path, Seal] | None = None,
) -> Path:
    """Write the checkpoint of step meta["step"] under `run`, drop all but the last `keep` and the
    one of step meta["best"]["step"].

    `tensors` become files of their name, `texts` files with that content, `shards` are files that
    move in, with what `seal` says of them. Returns the folder. RunError when another's folder
    stands in its place, or when it cannot be written, a full disk for one: then nothing is left of
    it, and those before it stay.
    """
    from safetensors import SafetensorError

    try:
        return _save(run, meta, tensors, texts, keep, shards or {})
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or _first_line(error)
        last = next(reversed(_steps(run / "checkpoints")), None)
        goes_on = f"the run is as it was at {last.name}" if last else "the run has none"
        raise RunError(
            f"{run}/checkpoints: the checkpoint of step {meta['step']:,} cannot be written "
            f"({why}); {goes_on}; make room and go on with --resume"
        ) from error


def _save(
    run: Path,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    keep: int,
    shards: Mapping[Path, Seal],
) -> Path:
    from safetensors.torch import save_file

    folder = own_folder(run)
    target = folder / _name(meta["step"])
    with files.atomic_folder(target, written_files) as temporary:
        listed = {}
        for name, group in tensors.items():
            flat = {key: value.detach().contiguous().cpu() for key, value in group.items()}
            save_file(flat, temporary / f"{name}.safetensors")
            listed[f"{name}.safetensors"] = seal(temporary / f"{name}.safetensors")
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
            listed[name] = seal(temporary / name)
        for path, known in shards.items():
            listed[path.name] = known
            path.rename(temporary / path.name)
        body = {"format": FORMAT, **meta, "files": listed}
        body["checksum"] = _checksum(body)
        (temporary / "checkpoint.json").write_text(json.dumps(body, indent=1), "utf-8")
    best = _best(meta)
    for old in _steps(folder)[:-keep]:
        if best is None or old.name != _name(best["step"]):
            files.discard(old, written_files)
    return target


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _best(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    best = meta.get("best")
    whole = isinstance(best, dict) and type(best.get("step")) is int and best["step"] >= 0
    return best if whole else None


def own_folder(run: Path) -> Path:
    """The folder of checkpoints to write to; RunError when it is a link, through which folders
    outside of the run would be removed."""
    folder = run / "checkpoints"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunError(
            f"{folder} is not a folder of this run itself; move it away, put the folder that it "
            "may link to in its place, or take another --out"
        )
    return folder


def written_files(folder: Path) -> set[str] | None:
    """The files of a checkpoint folder if `save` has written all that is in it, else None."""
    names = files.regular_files(folder)
    if names is None or "checkpoint.json" not in names:
        return None
    try:
        meta = _read(folder)
        _check_files(folder, meta)
    except RunError:
        return None
    return names if names - {files.MARKER, "checkpoint.json"} == meta["files"].keys() else None


def exists(run: Path) -> bool:
    """Whether `run` holds a checkpoint."""
    return bool(_steps(run / "checkpoints"))


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`, or the last one of the run in `path`, after reading and checking
    every byte of it.

    Raises RunError, which names the file, when there is none, when a file is missing, cut short or
    altered, has no plain name or is no regular file, and when it was written by a later version.
    """
    if not path.exists():
        raise RunError(f"{path} does not exist; name the folder that `tfla train --out` wrote")
    if not os.path.lexists(path / "checkpoint.json") and not STEP.fullmatch(path.name):
        steps = _steps(path / "checkpoints")
        if not steps:
            raise RunError(
                f"{path} holds no checkpoint; name the folder that `tfla train --out` wrote"
            )
        path = steps[-1]
    meta = _read(path)
    _check_files(path, meta)
    for name, stated in meta["files"].items():
        if seal(path / name) != stated:
            raise RunError(f"{path / name} is damaged: its SHA-256 is wrong; {_way_out(path)}")
    return Checkpoint(path, meta)


def opened(path: Path, meta: dict[str, Any]) -> Checkpoint:
    """The checkpoint in `path` that another rank has read and checked: here its files are looked
    at, names, kinds and sizes, but not read again."""
    _check_files(path, meta)
    return Checkpoint(path, meta)


def _read(path: Path) -> dict[str, Any]:
    """What checkpoint.json says, once its checksum is found right."""
    file = path / "checkpoint.json"
    why = "it is missing"
    try:
        if os.path.lexists(file):
            why = "it is not what was written"
            if not files.is_regular(file):
                raise ValueError("it is no regular file")
        meta = json.loads(file.read_text("utf-8"))
        stated = meta.pop("checksum")
        if stated != _checksum(meta):
            raise ValueError("its checksum is wrong")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {why}; {_way_out(path)}") from error
    if meta.get("format") != FORMAT:
        raise RunError(
            f"{file} has format {meta.get('format')!r}, this tfla reads {FORMAT}; upgrade tfla"
        )
    if not isinstance(meta.get("files"), dict):
        raise RunError(f"{file} is damaged: it lists no files; {_way_out(path)}")
    return meta


def _check_files(path: Path, meta: dict[str, Any]) -> None:
    """RunError unless all files that `meta` lists are regular files of their sizes, under plain
    names; none of them is opened."""
    for name, stated in meta["files"].items():
        part = path / name
        if not PLAIN.fullmatch(name) or name == "checkpoint.json":
            raise RunError(
                f"{path}/checkpoint.json lists {name!r}, which is not the plain name of a file in "
                f"its folder; {_way_out(path)}"
            )
        if not isinstance(stated, dict) or stated.keys() != {"bytes", "sha256"}:
            raise RunError(
                f"{path}/checkpoint.json does not say what {name} holds; {_way_out(path)}"
            )
        if not os.path.lexists(part):
            raise RunError(f"{part} is missing; {_way_out(path)}")
        if not files.is_regular(part):
            raise RunError(f"{part} is no regular file; {_way_out(path)}")
        if part.stat().st_size != stated["bytes"]:
            raise RunError(
                f"{part} is damaged: {part.stat().st_size} of {stated['bytes']} bytes; "
                f"{_way_out(path)}"
            )


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written under `run`; call it with the run's lock."""
    files.sweep(run)
    files.sweep(run / "checkpoints")


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(path: Path) -> Seal:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _steps(folder: Path) -> list[Path]:
    """The folders of checkpoints in the order of their steps; links and other names are none."""
    found = {
        path: int(match[1])
        for path in folder.glob("step-*")
        if (match := STEP.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return sorted(found, key=found.__getitem__)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _way_out(path: Path) -> str:
    steps = _steps(path.parent)
    before = steps[: steps.index(path)] if path in steps else []
    if before:
        return f"delete {path} to go back to {before[-1].name}"
    return f"delete {path} and train again, or restore it from a copy"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
