"""A disk that is full while a checkpoint is written: one line, and the one before stays good."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tfla import cli
from tfla.errors import RunError
from tfla.xlstm import checkpoint, files
from tfla.xlstm.train import read_metrics

TINY = "--hidden-size 16 --num-layers 1 --context 16 --batch 2 --eval-bytes 500 --device cpu"
TINY += " --steps 4 --save-every 1 --log-every 1 --threads 1"


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for(owner: Any, name: str, wanted: Callable[[Path], bool]) -> Callable[..., Any]:
    """`owner.name`, for which there is no space where `wanted` says so of its path."""
    real = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        paths = [Path(x) for x in args if isinstance(x, (str, os.PathLike))]
        return full() if any(map(wanted, paths)) else real(*args, **options)

    return call


def of_safetensors(*_: Any, **__: Any) -> None:
    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")


def is_step_2(path: Path) -> bool:
    return "step-00000002" in str(path)


# Where it can happen: (what owns the function, its name, the function in its place).
PLACES: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "weights": (safetensors.torch, "save_file", lambda: of_safetensors),
    "weights, of the system": (
        safetensors.torch,
        "save_file",
        lambda: full_for(safetensors.torch, "save_file", is_step_2),
    ),
    "the seal": (checkpoint, "seal", lambda: full_for(checkpoint, "seal", is_step_2)),
    "checkpoint.json": (
        Path,
        "write_text",
        lambda: full_for(Path, "write_text", lambda p: p.name == "checkpoint.json"),
    ),
    "the marker": (
        Path,
        "write_text",
        lambda: full_for(Path, "write_text", lambda p: p.name == files.MARKER),
    ),
    "flushing": (files, "flush", lambda: full_for(files, "flush", is_step_2)),
    "the folder": (Path, "mkdir", lambda: full_for(Path, "mkdir", is_step_2)),
    "renaming": (Path, "rename", lambda: full_for(Path, "rename", is_step_2)),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_last_checkpoint_stays_good(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(step: int) -> None:
        tensors = {"model": {"w": torch.full((3,), float(step))}}
        checkpoint.save(tmp_path, {"step": step}, tensors, {"tokenizer.json": "{}"})

    write(0)
    write(1)
    with monkeypatch.context() as patch:
        owner, name, make = PLACES[place]
        patch.setattr(owner, name, make())
        with pytest.raises(RunError, match="step 2 cannot be written .*[Nn]o space left") as error:
            write(2)
    assert "\n" not in str(error.value)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000000", "step-00000001"]
    assert checkpoint.load(tmp_path).tensors("model")["w"].tolist() == [1.0] * 3
    write(2)  # once there is room
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_that_cannot_be_removed_for_lack_of_space_is_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To be removed a folder gets a marker, which takes space too."""
    for step in range(4):
        checkpoint.save(tmp_path, {"step": step}, {}, {"tokenizer.json": "{}"})
    (tmp_path / "checkpoints" / "step-00000002" / files.MARKER).write_bytes(b"")  # what is left
    checkpoint.save(tmp_path, {"step": 4}, {}, {})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]


def test_the_command_ends_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", str(Path(json.__file__).parent), "--out", str(tmp_path), *TINY.split()]
    with monkeypatch.context() as patch:
        real = safetensors.torch.save_file
        patch.setattr(
            safetensors.torch,
            "save_file",
            lambda x, path: of_safetensors() if is_step_2(Path(path)) else real(x, path),
        )
        assert cli.run_command(words) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "step-00000001" in said
    assert checkpoint.load(tmp_path).meta["step"] == 1
    assert cli.run_command(["train", "--out", str(tmp_path), "--resume"]) == 0
    assert checkpoint.load(tmp_path).meta["step"] == 4


LIMITED = """
import resource, sys
from tfla import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.run_command(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
@pytest.mark.parametrize("limit", [60, 3_000, 25_000, 60_000])
def test_a_limit_of_the_system_itself(limit: int, tmp_path: Path) -> None:
    """No function is replaced here: the kernel refuses to write more, in whatever file."""
    out = tmp_path / "run"
    text = tmp_path / "a.txt"
    text.write_bytes(b"import os\n" * 100)
    words = ["train", str(text), "--out", str(out), *TINY.split(), "--steps", "300"]
    words += ["--save-every", "1", "--log-every", "1"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *words], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("tfla: ") and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    if checkpoint.exists(out):
        assert checkpoint.load(out).meta["step"] <= read_metrics(out / "metrics.jsonl")[-1]["step"]
