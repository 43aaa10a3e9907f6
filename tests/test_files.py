"""What another has written is never removed or overwritten, and one process at a time writes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tfla.xlstm import data, files
from tfla.xlstm.files import Lock, RunError


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """All that is in a folder: bytes of files, where links lead, None for other things."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def all_of(path: Path) -> set[str] | None:
    return files.regular_files(path) if (path / "checkpoint.json").exists() else None


# ------------------------------------------------------------------------------- folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with files.atomic_folder(target) as folder:
        (folder / "train.bin").write_text("x")
        assert not target.exists()
    assert snapshot(tmp_path) == {"target": None, "target/train.bin": b"x"}
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path / "other") as folder:
        (folder / "train.bin").write_text("x")
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == {"target": None, "target/train.bin": b"x"}


def test_what_was_written_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for text in ("one", "two"):
        with files.atomic_folder(target, all_of) as folder:
            (folder / "checkpoint.json").write_text(text)
    assert snapshot(tmp_path) == {"target": None, "target/checkpoint.json": b"two"}
    (target / "thesis.tex").write_text("years of work")
    (target / "checkpoint.json").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="target is not a folder that tfla wrote"):
        with files.atomic_folder(target, all_of):
            raise AssertionError("nothing may be written before")
    assert snapshot(tmp_path) == before


def make_user_file(path: Path) -> None:
    path.write_text("mine")


def make_user_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def make_link_outside(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("mine")
    path.symlink_to(outside)


def make_broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


OTHERS = [make_user_file, make_user_folder, make_link_outside, make_broken_link, make_pipe]


@pytest.mark.parametrize("make", OTHERS)
def test_another_kind_of_thing_in_the_place_of_a_folder_stays(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "data")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="data is not a folder that tfla wrote"):
        data.prepare([], tmp_path / "run" / "data")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("make", OTHERS)
def test_another_kind_of_thing_in_the_place_of_a_file_stays(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "loss.png")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=r"loss\.png is not a file that tfla wrote"):
        files.write(tmp_path / "run" / "loss.png", b"new", lambda path: path.read_bytes() == b"old")
    assert snapshot(tmp_path) == before


def fake_names(folder: Path) -> None:
    """Names of ours without a marker."""
    for name in (".x.tmp", ".step-00000030.4711.tmp", ".shards-00000030.tmp", ".data.1.tmp"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("mine")


def copied_marker(folder: Path) -> None:
    """A marker of another folder."""
    kept = files.partial_folder(folder / ".data.1.tmp")
    kept.rename(folder / ".backup.tmp")


def added_file(folder: Path) -> None:
    """A file of another in a folder of ours."""
    (files.partial_folder(folder / ".data.1.tmp") / "thesis.tex").write_text("mine")


def added_link(folder: Path) -> None:
    """A link in a folder of ours, under a name of ours."""
    (folder / "precious").write_text("mine")
    (files.partial_folder(folder / ".data.1.tmp") / "train.bin").symlink_to(folder / "precious")


def added_folder(folder: Path) -> None:
    (files.partial_folder(folder / ".data.1.tmp") / "train.bin").mkdir()


def link_to_marked(folder: Path) -> None:
    """A link whose name and target are as ours."""
    outside = files.partial_folder(folder / "outside" / ".data.1.tmp")
    (folder / ".data.1.tmp").symlink_to(outside)


def plain_file(folder: Path) -> None:
    (folder / ".x.tmp").write_text("mine")


@pytest.mark.parametrize(
    "make",
    [fake_names, copied_marker, added_file, added_link, added_folder, link_to_marked, plain_file],
)
def test_only_folders_of_ours_are_swept(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    before = snapshot(tmp_path)
    torn = files.partial_folder(tmp_path / ".step-00000001.abc.tmp")
    (torn / "model.safetensors").write_bytes(b"half")
    files.sweep(tmp_path)
    assert snapshot(tmp_path) == before


def test_nothing_is_swept_through_a_link(tmp_path: Path) -> None:
    files.partial_folder(tmp_path / "outside" / ".data.1.tmp")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "outside")
    before = snapshot(tmp_path)
    files.sweep(tmp_path / "checkpoints")
    assert snapshot(tmp_path) == before


def test_a_discard_that_was_killed_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "step-00000001"
    old.mkdir()
    for name in ("checkpoint.json", "model.safetensors"):
        (old / name).write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove_partial", lambda folder: False)  # dies here
        files.discard(old, all_of)
    assert not old.exists()
    files.sweep(tmp_path)
    assert snapshot(tmp_path) == {}


# ------------------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from tfla.xlstm.files import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["flock", "exclusive"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "exclusive":
        monkeypatch.setattr(files, "fcntl", None)
    return request.param


def holder(folder: Path, kind: str) -> "subprocess.Popen[str]":
    code = HOLD if kind == "flock" else f"import tfla.xlstm.files as f; f.fcntl = None\n{HOLD}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_writes(tmp_path: Path, kind: str) -> None:
    process = holder(tmp_path / "run", kind)
    try:
        with pytest.raises(RunError) as refused:
            Lock(tmp_path / "run")
        message = str(refused.value)
        assert f"in use by process {process.pid} on {os.uname().nodename} since 20" in message
        assert "\n" not in message
    finally:
        process.kill()
        process.communicate()
    with Lock(tmp_path / "run") as lock:  # what a killed process left is no obstacle
        assert json.loads(lock.file.read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / files.LOCK).exists()


def test_the_same_process_is_no_exception(tmp_path: Path, kind: str) -> None:
    lock = Lock(tmp_path)
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        Lock(tmp_path)
    with lock, lock:
        pass
    Lock(tmp_path).release()


def test_one_of_many_threads_gets_it(tmp_path: Path, kind: str) -> None:
    held: list[Lock] = []
    together = threading.Barrier(8)

    def attempt() -> None:
        together.wait()
        try:
            held.append(Lock(tmp_path))
        except RunError:
            pass

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1


def test_a_fork_does_not_give_it_back(tmp_path: Path, kind: str) -> None:
    lock = Lock(tmp_path)
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(RunError, match="in use"):
        Lock(tmp_path)


@pytest.mark.parametrize("make", OTHERS)
def test_another_file_in_its_place_stays(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / files.LOCK)
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="is not a file that tfla wrote"):
        Lock(tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_folders_made_for_the_lock_alone_go_with_it(tmp_path: Path, kind: str) -> None:
    Lock(tmp_path / "a" / "b").release()
    assert snapshot(tmp_path) == {}
    lock = Lock(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "result").touch()
    lock.release()
    assert snapshot(tmp_path) == {"a": None, "a/b": None, "a/b/result": b""}


def test_the_lock_of_another_is_not_removed(tmp_path: Path) -> None:
    """The folder was removed and made again while the run went on."""
    lock = Lock(tmp_path / "run")
    (tmp_path / "run" / files.LOCK).unlink()
    other = Lock(tmp_path / "run")
    lock.release()
    with pytest.raises(RunError, match="in use"):
        Lock(tmp_path / "run")
    other.release()


def test_a_dead_process_of_another_host_is_not_guessed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    said = {"tfla": "x", "pid": 2**22 + 1, "host": "elsewhere", "since": "today"}
    (tmp_path / files.LOCK).write_text(json.dumps(said))
    with pytest.raises(RunError, match=r"on elsewhere since today.*delete .*\.tfla-lock"):
        Lock(tmp_path)
