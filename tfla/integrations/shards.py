"""A folder of safetensors as transformers lays it out: one file, or several and an index of them.

model.safetensors
model-00001-of-00002.safetensors, ..., model.safetensors.index.json    {"weight_map": {name: file}}
model_0.safetensors, model_1.safetensors, ...                          only read: the scaling laws'
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERED = re.compile(r"model_(0|[1-9]\d*)\.safetensors")


class Tensors:
    """The tensors of such a folder by name, read one at a time. A context manager.

    Raises FileNotFoundError or ValueError, naming the file and the tensor: when made, for a file
    that is missing, cut short or not safetensors, and for a tensor that is not where the index
    says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        try:
            self._where = self._find()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._where[name]].get_tensor(name)

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.stat().st_size for file in self._open)

    def file(self, name: str) -> Path:
        """The file that holds `name`; for a tensor that none holds, the file that should say so."""
        default = self.folder / INDEX if len(self._open) > 1 else next(iter(self._open))
        return self._where.get(name, default)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError unless the folder holds these names in these shapes, as floating point, and
        nothing else. Only headers are read."""
        for name in wanted:
            if name not in self:
                raise ValueError(
                    f"{self.file(name)} lacks {name}, which the model of config.json needs."
                )
        for name, file in self._where.items():
            if name not in wanted:
                raise ValueError(
                    f"{file} holds {name}, for which the model of config.json has no place."
                )
            header = self._open[file].get_slice(name)
            shape, kind = tuple(header.get_shape()), header.get_dtype()
            if shape != wanted[name] or kind not in ("F16", "BF16", "F32", "F64"):
                raise ValueError(
                    f"{file}: {name} is {shape} {kind}; the model of config.json needs "
                    f"{wanted[name]} in F16, BF16, F32 or F64."
                )

    def _find(self) -> dict[str, Path]:
        """The file of each tensor."""
        whole, index = self.folder / WHOLE, self.folder / INDEX
        if whole.is_file():
            return dict.fromkeys(self._opened(whole).keys(), whole)
        if not index.is_file() and (files := self._numbered()):
            return self._joined(files)
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.folder} has neither {WHOLE} nor {INDEX}; only safetensors are read "
                "(what transformers' save_pretrained writes)."
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map, which names the file of each tensor.")
        where = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(
                    f"{index}: {name} is in {file!r}; it must be in a file of the same folder."
                )
            where[name] = self.folder / file
            if not where[name].is_file():
                raise FileNotFoundError(
                    f"{where[name]} is missing; {index.name} says it holds {name}."
                )
        held = {file: set(self._opened(file).keys()) for file in set(where.values())}
        for name, file in where.items():
            if name not in held[file]:
                raise ValueError(f"{file} lacks {name}, which {index.name} says it holds.")
        return where

    def _numbered(self) -> list[Path]:
        """model_0.safetensors and so on, without an index."""
        found = [NUMBERED.fullmatch(file.name) for file in self.folder.iterdir()]
        numbers = sorted(int(match[1]) for match in found if match)
        files = [self.folder / f"model_{n}.safetensors" for n in range(len(numbers))]
        for n, file in enumerate(files):
            if numbers[n] != n:
                raise FileNotFoundError(
                    f"{file} is missing; model_{numbers[-1]}.safetensors is there."
                )
        return files

    def _joined(self, files: list[Path]) -> dict[str, Path]:
        where: dict[str, Path] = {}
        for file in files:
            for name in self._opened(file).keys():
                if name in where:
                    raise ValueError(f"{file} holds {name}, and so does {where[name]}.")
                where[name] = file
        return where

    def _opened(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {_damage(file) or error}") from error
        return self._open[file]


def write(
    folder: Path,
    sizes: Mapping[str, int],
    get: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write the tensors `get(name)`, of `sizes` bytes, in that order, as one file or several."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = (
        [WHOLE]
        if count == 1
        else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    )
    for file, names in zip(files, shards, strict=True):
        tensors = {name: get(name).detach().contiguous().cpu() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; FileNotFoundError or ValueError that names it."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(value).__name__}.")
    return value


def _damage(file: Path) -> str | None:
    """What is missing of a truncated safetensors file: its first tensor that is not whole.

    Layout: 8 bytes with the length of the header, the header (JSON), the data it points into.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return (
                f"its {size} bytes do not hold the header that names its tensors; it is truncated, "
                "or something else under that name. Fetch it again."
            )
        try:
            header = json.loads(stream.read(length))
            ends = {
                name: 8 + length + entry["data_offsets"][1]
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if not all(type(end) is int for end in ends.values()):
            return None
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            return (
                f"it is truncated: {name} ends at byte {end}, the file at {size}. Fetch it again."
            )
    return None
