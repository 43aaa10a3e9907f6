"""A checkpoint is whole or absent, and every byte of it counts."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from seals import change_meta, seal_files
from torch import nn

from tfla.xlstm import checkpoint, files
from tfla.xlstm.checkpoint import RunError, load, save


def write(run: Path, step: int, text: str = "words") -> Path:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"weight": torch.randn(3, 5, generator=generator)},
        "optimizer": {
            "weight/exp_avg": torch.randn(3, 5, generator=generator).bfloat16(),
            "random/cpu": generator.get_state(),
        },
    }
    return save(run, {"step": step, "config": {}}, tensors, {"tokenizer.json": text})


def test_round_trip_is_exact(tmp_path: Path) -> None:
    write(tmp_path, 7, "mots")
    saved = load(tmp_path)
    assert saved.meta["step"] == 7
    assert saved.text("tokenizer.json") == "mots"
    assert saved.text("other.json") is None
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(3, 5, generator=generator)
    moments = torch.randn(3, 5, generator=generator).bfloat16()
    assert torch.equal(saved.tensors("model")["weight"], weight)
    optimizer = saved.tensors("optimizer")
    assert optimizer["weight/exp_avg"].dtype == torch.bfloat16
    assert torch.equal(optimizer["weight/exp_avg"], moments)
    assert torch.equal(optimizer["random/cpu"], generator.get_state())


def test_the_last_of_two_is_found_and_older_ones_go(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (5, 100, 20_000, 300_000_000)]
    assert load(tmp_path).path == paths[-1]
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert load(paths[-2]).meta["step"] == 20_000


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink], ids=["flip", "cut", "remove"])
@pytest.mark.parametrize(
    "name", ["checkpoint.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"]
)
def test_any_damage_is_one_line_with_the_file_and_the_way_out(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    write(tmp_path, 1)
    last = write(tmp_path, 2)
    harm(last / name)
    with pytest.raises(RunError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert str(last / name) in message
    assert f"delete {last} to go back to step-00000001" in message
    assert "\n" not in message


def test_every_bit_of_the_description_is_checked(tmp_path: Path) -> None:
    """A flipped bit in the JSON may leave valid JSON: a step of 1 that reads 3, say."""
    file = write(tmp_path, 1) / "checkpoint.json"
    whole = file.read_bytes()
    unchanged = json.loads(whole)
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
        try:
            meta = load(tmp_path).meta
        except RunError:
            continue
        unchanged.pop("checksum", None)
        assert meta == unchanged  # white space alone


def test_an_interrupted_write_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path, 1)

    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2)
    assert load(tmp_path).path == first
    assert list((tmp_path / "checkpoints").iterdir()) == [first]


def test_what_a_killed_process_left_is_ignored_and_swept(tmp_path: Path) -> None:
    first = write(tmp_path, 1)
    torn = files.partial_folder(tmp_path / "checkpoints" / ".step-00000002.4711.tmp")
    (torn / "model.safetensors").write_bytes(b"half")
    assert load(tmp_path).path == first
    checkpoint.sweep(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [first]


class Trap:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return (Path(self.where).touch, ())  # type: ignore[return-value]

    def __init__(self, where: Path) -> None:
        self.where = str(where)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """Sealed as it should be, so that nothing but the reader itself stands in the way."""
    path = write(tmp_path / "run", 1)
    sprung = tmp_path / "sprung"
    data = pickle.dumps(Trap(sprung))
    pickle.loads(data)
    assert sprung.exists()
    sprung.unlink()
    (path / "model.safetensors").write_bytes(data)
    seal_files(path)
    saved = load(path)
    with pytest.raises(RunError, match="model.safetensors cannot be read"):
        saved.tensors("model")
    assert not sprung.exists()


def test_a_checkpoint_of_another_model_names_the_tensor(tmp_path: Path) -> None:
    write(tmp_path, 1)
    saved = load(tmp_path)
    module = nn.Linear(5, 3, bias=False)
    saved.restore(module)
    assert torch.equal(module.weight, saved.tensors("model")["weight"])
    with pytest.raises(RunError, match=r"weight is \(3, 5\); the model needs \(4, 5\)"):
        saved.restore(nn.Linear(5, 4, bias=False))
    with pytest.raises(RunError, match="the checkpoint lacks bias"):
        saved.restore(nn.Linear(5, 3))


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        write(tmp_path, 1)
    with pytest.raises(RunError, match="upgrade tfla"):
        load(tmp_path)


def test_where_there_is_none_it_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist; name the folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(RunError, match="holds no checkpoint; name the folder"):
        load(tmp_path)


# ------------------------------------------------------------------------------- what is listed


@pytest.mark.parametrize(
    "name",
    [
        "/dev/zero",
        "../../x",
        "..",
        ".",
        "",
        "sub/x",
        "sub\\x",
        "/etc/passwd",
        "a\0b",
        "x\ny",
        ".hidden",
        "checkpoint.json",
        "é.json",
        "C:x",
    ],
)
def test_only_plain_names_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("outside")
    path = write(tmp_path / "run", 1)
    (path / "sub").mkdir()
    (path / "sub" / "x").write_text("x")

    def change(meta: dict) -> None:
        meta["files"][name] = {"bytes": 0, "sha256": "0" * 64}

    change_meta(path, change)
    with pytest.raises(RunError, match="which is not the plain name of a file"):
        load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json", "extra.bin"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe would never end, and a link leads anywhere."""
    path = write(tmp_path / "run", 1)
    file = path / name
    whole = file.read_bytes() if file.exists() else b"x"
    if name == "extra.bin":
        change_meta(path, lambda meta: meta["files"].update({name: {"bytes": 0, "sha256": ""}}))
    file.unlink(missing_ok=True)
    (tmp_path / "copy").write_bytes(whole)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else tmp_path / "copy")
    with pytest.raises(RunError, match="is no regular file|is damaged: it is not what was written"):
        load(path)


@pytest.mark.parametrize(
    "stated", [None, 3, [], {}, {"bytes": 0}, {"bytes": 0, "sha256": "", "more": 1}, "x"]
)
def test_a_list_of_another_kind_is_one_line(tmp_path: Path, stated: object) -> None:
    path = write(tmp_path, 1)
    change_meta(path, lambda meta: meta["files"].update({"model.safetensors": stated}))
    with pytest.raises(RunError, match="does not say what model.safetensors holds"):
        load(path)


@pytest.mark.parametrize("listed", [None, 3, [], "x", ["model.safetensors"]])
def test_no_list_is_one_line(tmp_path: Path, listed: object) -> None:
    path = write(tmp_path, 1)
    change_meta(path, lambda meta: meta.update(files=listed))
    with pytest.raises(RunError, match="it lists no files"):
        load(path)


def test_links_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    path = write(tmp_path, 30)
    folder = path.parent
    for name in ("step-30", "step-00000040.bak", "step-0000004x", "step-latest"):
        (folder / name).mkdir()
    (folder / "step-00000050").symlink_to(path)
    assert load(tmp_path).path == path
    for step in (31, 32, 33):
        write(tmp_path, step)
    left = {other.name for other in folder.iterdir()}
    assert left == {
        "step-30",
        "step-00000040.bak",
        "step-0000004x",
        "step-latest",
        "step-00000050",
        "step-00000032",
        "step-00000033",
    }


def test_an_old_checkpoint_with_a_file_of_another_stays(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (1, 2)]
    (paths[0] / "notes.txt").write_text("mine")
    (paths[1] / "model.safetensors").write_bytes(b"mine, under a name of yours")
    write(tmp_path, 3), write(tmp_path, 4), write(tmp_path, 5)
    left = sorted(path.name for path in paths[0].parent.iterdir())
    assert left == [f"step-0000000{step}" for step in (1, 2, 4, 5)]
    assert (paths[0] / "notes.txt").read_text() == "mine" and (
        paths[0] / "model.safetensors"
    ).exists()
    assert (paths[1] / "model.safetensors").read_bytes().startswith(b"mine")


def test_a_folder_of_another_in_the_place_of_a_checkpoint_stays(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoints" / "step-00000007"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="step-00000007 is not a folder that tfla wrote"):
        write(tmp_path, 7)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    write(tmp_path, 8), write(tmp_path, 9), write(tmp_path, 10)
    assert (mine / "thesis.tex").read_text() == "mine"


def test_checkpoints_are_not_written_or_removed_through_a_link(tmp_path: Path) -> None:
    write(tmp_path / "other", 1), write(tmp_path / "other", 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
    with pytest.raises(RunError, match="checkpoints is not a folder of this run"):
        write(tmp_path / "run", 3)
    assert len(list((tmp_path / "other" / "checkpoints").iterdir())) == 2


def test_weights_of_8_bits_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(3, 5, dtype=torch.float8_e4m3fn)
    save(tmp_path, {"step": 1, "config": {}}, {"model": {"weight": weight}}, {})
    with pytest.raises(RunError, match="weight is float8_e4m3fn; the model needs a floating dtype"):
        load(tmp_path).restore(nn.Linear(5, 3, bias=False))


def test_weights_that_are_no_numbers_warn(tmp_path: Path) -> None:
    module = nn.Linear(5, 3, bias=False)
    for bad in (float("nan"), float("inf")):
        weight = torch.zeros(3, 5)
        weight[1, 2] = bad
        save(tmp_path, {"step": 1, "config": {}}, {"model": {"weight": weight}}, {})
        with pytest.warns(UserWarning, match="weight hold numbers that are not finite"):
            load(tmp_path).restore(module)
