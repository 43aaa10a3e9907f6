"""Files and folders that tfla writes, replaces, removes and locks: never what another has written.

All that removes or replaces goes through this file, and proves first that tfla wrote what will be
gone: by what is in it (the caller's `proof`), or, for a folder that is not finished, by a marker
that holds the folder's own name. Links are neither followed nor removed. What cannot be proven
stays where it is, and a RunError says so.

A folder or file is written in a folder of its own beside its final place, whose name begins with a
dot and ends with .tmp, flushed to the disk and renamed: a process killed at any moment leaves what
was there before, and a folder with a marker that `sweep` removes.
"""

import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from tfla.errors import RunError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# From a folder to the names of its files if tfla has written all that is in it, else to None.
FolderProof = Callable[[Path], set[str] | None]
FileProof = Callable[[Path], bool]

MARKER = ".tfla-partial"
MARK = "tfla is writing this folder, or was when it was killed; a later run may remove it: "
PART = "content.part"
# Every name that tfla gives to a file while it writes a folder.
NAMES = re.compile(
    rf"{re.escape(MARKER)}|{re.escape(PART)}|(checkpoint|corpus|tokenizer)\.json"
    r"|((tokenizer|generation)_)?config\.json"
    r"|(train|heldout)\.bin|heldout\.raw|model\.safetensors\.index\.json"
    r"|(shard-\d+-)?(model|optimizer)(-\d+)?(-of-\d+)?\.safetensors"
)
LOCK = ".tfla-lock"


def nobodys(path: Path) -> Any:
    """The proof for what is never replaced."""
    return None


def regular_files(folder: Path) -> set[str] | None:
    """The names of the files in `folder`; None if it is a link, no folder, or holds anything but
    regular files."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    return set(found) if all(found.values()) else None


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file itself: no link, device or pipe."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_folder(target: Path, proof: FolderProof = nobodys) -> None:
    """RunError unless `target` is absent, an empty folder, or one that tfla has written."""
    if not os.path.lexists(target):
        return
    names = regular_files(target)
    if names is None or (names and proof(target) is None):
        raise RunError(
            f"{target} is not a folder that tfla wrote, so it is left as it is; move it away, or "
            "take another --out"
        )


def check_file(target: Path, proof: FileProof = nobodys) -> None:
    """RunError unless `target` is absent, an empty file, or one that tfla has written."""
    if not os.path.lexists(target):
        return
    if not is_regular(target) or (target.stat().st_size and not proof(target)):
        raise RunError(
            f"{target} is not a file that tfla wrote, so it is left as it is; move it away, or "
            "take another --out"
        )


@contextmanager
def atomic_folder(target: Path, proof: FolderProof = nobodys) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends, or vanishes when it raises.

    RunError unless `target` may be replaced, see `check_folder`.
    """
    check_folder(target, proof)
    temporary = partial_folder(_hidden(target))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            _give_mode(path)
            flush(path)
        flush(temporary)
        check_folder(target, proof)
        discard(target, proof)
        if target.exists():
            target.rmdir()  # it is empty, or this raises
        temporary.rename(target)
        (target / MARKER).unlink()
        flush(target.parent)
    except BaseException:
        remove_partial(temporary)
        raise


@contextmanager
def atomic_file(target: Path, proof: FileProof) -> Iterator[Path]:
    """A file to write that becomes `target` when the block ends, or vanishes when it raises.

    RunError unless `target` may be replaced, see `check_file`.
    """
    check_file(target, proof)
    temporary = partial_folder(_hidden(target))
    try:
        yield temporary / PART
        _give_mode(temporary / PART)
        flush(temporary / PART)
        check_file(target, proof)
        os.replace(temporary / PART, target)
        flush(target.parent)
    finally:
        remove_partial(temporary)


def _give_mode(path: Path) -> None:
    """Give a file the mode that the umask says, whatever library has written it: safetensors makes
    its own readable for their owner alone. The marker beside it, which was opened plainly, has that
    mode; to ask for the umask one would have to change it, for all threads."""
    path.chmod(stat.S_IMODE((path.parent / MARKER).stat().st_mode))


def write(target: Path, content: bytes, proof: FileProof) -> None:
    """Write a whole file; see `atomic_file`."""
    with atomic_file(target, proof) as part:
        part.write_bytes(content)


def partial_folder(path: Path) -> Path:
    """Make the folder `path`, which must be absent, with the marker that lets `sweep` remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        raise RunError(f"{path} is there already and is left as it is; move it away") from None
    try:
        (path / MARKER).write_text(MARK + path.name, "utf-8")
    except BaseException:  # a full disk: without a whole marker nothing would remove it later
        with suppress(OSError):
            (path / MARKER).unlink(missing_ok=True)
            path.rmdir()
        raise
    return path


def remove_partial(folder: Path) -> bool:
    """Remove a folder that `partial_folder` made, unless it holds what tfla does not write."""
    names = regular_files(folder)
    if names is None or not all(map(NAMES.fullmatch, names)) or MARKER not in names:
        return False
    with suppress(OSError, UnicodeDecodeError):
        if (folder / MARKER).read_text("utf-8") == MARK + folder.name:
            for name in (*sorted(names - {MARKER}), MARKER):  # the marker last
                (folder / name).unlink()
            folder.rmdir()
            return True
    return False


def sweep(parent: Path) -> None:
    """Remove the folders in `parent` that a killed process left half-written."""
    if not parent.is_symlink():
        for torn in parent.glob(".*.tmp"):
            remove_partial(torn)


def discard(folder: Path, proof: FolderProof) -> bool:
    """Remove a folder if tfla has written all that is in it; else return False."""
    names = regular_files(folder)
    if not names or proof(folder) is None or not all(map(NAMES.fullmatch, names)):
        return False
    marker, hidden = folder / MARKER, _hidden(folder)
    if MARKER in names:
        mark = marker.read_bytes()
        if not (mark.startswith(MARK.encode()) or MARK.encode().startswith(mark)):
            return False  # a beginning of it is what a full disk leaves
    marker.write_text(MARK + hidden.name, "utf-8")
    folder.rename(hidden)  # so a process that is killed from here on leaves no half of it
    return remove_partial(hidden)


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows has no handle to flush a folder through
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


# ------------------------------------------------------------------------------- the lock


class Lock:
    """The right to write to a folder, which one process has at a time, from construction on.

    RunError says who has it. `with lock:` gives it back when the outermost block ends, as does
    `release`, and the end of the process, however it ends. The file system's own lock is used where
    it has one; else a file that only one process can create, with the number of that process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / LOCK
        self._handle: int | None = None
        self._depth = 0
        self._made: list[Path] = []
        self._acquire()

    def __enter__(self) -> "Lock":
        if self._handle is None:
            self._acquire()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.release()

    def __del__(self) -> None:
        with suppress(Exception):
            self.release()

    def release(self) -> None:
        """Let others write; folders that were made for the lock alone go with it."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if os.getpid() != self._owner:  # a fork of the process that has it
            os.close(handle)
            return
        with suppress(OSError):
            mine = os.path.samestat(os.fstat(handle), self.file.lstat())
            if os.name != "posix":  # Windows removes no file that is open
                os.close(handle)
            if mine:
                self.file.unlink()
        if os.name == "posix":
            os.close(handle)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def _acquire(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made, self._owner = missing, os.getpid()
        try:
            handle = self._locked() if fcntl is not None else None
            self._handle = self._created() if handle is None else handle
        except BaseException:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()
            raise
        holder = {
            "tfla": "is writing to this folder",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        }
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, json.dumps(holder).encode())

    def _locked(self) -> int | None:
        """An open file that this process has locked; None where the file system has no locks."""
        assert fcntl is not None
        while True:
            self._check()
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before may have removed the file between our open and our lock.
                if os.path.samestat(os.fstat(handle), self.file.lstat()):
                    self._check()
                    return handle
            except BlockingIOError:
                os.close(handle)
                raise self._refusal() from None
            except FileNotFoundError:
                pass
            except OSError:  # a file system without locks
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _created(self) -> int:
        """A file that only this process has created."""
        for _ in range(2):
            self._check()
            try:
                return os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if not self._is_stale():
                    hint = f"; if that process has ended, delete {self.file}"
                    raise self._refusal(hint) from None
                try:
                    self.file.unlink(missing_ok=True)
                except PermissionError:  # on Windows it is open, so its process is alive
                    raise self._refusal() from None
        raise self._refusal()

    def _is_stale(self) -> bool:
        holder = self._holder()
        if os.name != "posix":
            return True
        if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
            return False  # nobody can know from here
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def _check(self) -> None:
        """RunError when what stands in the lock's place is another's."""
        check_file(self.file, lambda _: bool(self._holder()))

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self.file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return holder if isinstance(holder, dict) and {"tfla", "pid"} <= holder.keys() else {}

    def _refusal(self, hint: str = "") -> RunError:
        holder = self._holder()
        who = "another process"
        if holder:
            who = f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"
        return RunError(
            f"{self.folder} is in use by {who}; wait for its end, or take another --out{hint}"
        )
