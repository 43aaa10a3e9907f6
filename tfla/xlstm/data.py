"""The corpus: any files, written once as two memory-mapped streams of tokens.

    RUN/data/
        corpus.json     what is in it, and its fingerprint
        train.bin       [end] document [end] ... [end], as uint16, or uint32 for a large vocabulary
        heldout.bin     the same for the documents that are never trained on
        heldout.raw     their bytes as they were, to hold other compressors against
        tokenizer.json  only when one was given

Documents are held out whole, chosen by the SHA-256 of their names: the same ones in every run and
on every machine. Identical documents are kept once, or the held-out ones would not be unseen.
What is read is a function of a `Position` alone, which a checkpoint keeps, so a resumed run reads
what the unbroken one would have read, each window once, also with another --batch or --context.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tfla.signals import Interrupted
from tfla.xlstm import files
from tfla.xlstm.checkpoint import RunError, sha256

# A piece is encoded by itself and cut after a line: a document of any size fits into memory.
PIECE = 1 << 16
HELD_OUT = 0.05  # share of the bytes
MOST_IDS = 2**31  # of a tokenizer: no model has so many rows
FILES = {"corpus.json", "train.bin", "heldout.bin", "heldout.raw", "tokenizer.json"}
# Bytes that are no control characters, and the control characters that stand in texts.
_TEXT = bytes([*range(32, 127), *range(128, 256), *b"\b\t\n\f\r\x1b"])
# Folders of the standard library whose text is not its sources: tests, what was installed later.
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Codec:
    """Bytes to token ids and back: one id a byte, or a `tokenizers` file.

    `end` is the id that ends a document: one beyond all others, unless another is named, which may
    be one of the tokenizer's own.

    Example:
        codec = Codec()                             # vocab_size 257, end 256
        codec = Codec(Path("tokenizer.json").read_text())
        codec.encode(b"import os").tolist()
    """

    def __init__(self, tokenizer: str | None = None, end: int | None = None) -> None:
        self.source, self.named_end = tokenizer, end
        self._tokenizer: Any = None
        if tokenizer is None:
            self.end = 256
        else:
            from tokenizers import Tokenizer

            with _library_errors(
                "the tokenizer cannot be read", "give a tokenizer.json of the tokenizers library"
            ):
                self._tokenizer = Tokenizer.from_str(tokenizer)
                self._tokenizer.no_padding()  # with either on, text is lost or tokens are added
                self._tokenizer.no_truncation()
                ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
            if not ids:
                raise RunError("the tokenizer has no tokens; give one that was trained")
            self.end = max(ids) + 1  # ids may have gaps, so their number says nothing
            if self.end > MOST_IDS:
                raise RunError(
                    f"the tokenizer has the id {self.end - 1:,}; a model has a row for each id up "
                    f"to the largest, give one with ids below {MOST_IDS:,}"
                )
        self.vocab_size = self.end + 1
        if end is not None:
            self.vocab_size, self.end = max(self.end, end + 1), end
        self.dtype = np.min_scalar_type(max(self.end, 1 << 15))  # uint16, uint32 or uint64

    def encode(self, text: bytes) -> np.ndarray:
        """(tokens,) ids; a tokenizer reads UTF-8 with what is not UTF-8 replaced by U+FFFD."""
        if self._tokenizer is None:
            return np.frombuffer(text, np.uint8).astype(self.dtype)
        words = text.decode("utf-8", "replace")
        with _library_errors(
            "the tokenizer cannot encode this text",
            "give one that knows every character, or has an unknown token",
        ):
            ids = self._tokenizer.encode(words, add_special_tokens=False).ids
        return np.asarray(ids, self.dtype)

    def lost(self, text: bytes, ids: np.ndarray) -> int:
        """How many bytes of `text` are missing in what its `ids` say: 0 only if they say it all.

        Of a text that does not come back these are the characters that it has more of than what
        comes back, without the tokens that stand for unknown ones; but one at least.
        """
        if self._tokenizer is None:
            return 0
        with _library_errors("the tokenizer cannot decode", "give one that has a decoder"):
            numbers = ids.tolist()
            if self._tokenizer.decode(numbers, skip_special_tokens=False).encode() == text:
                return 0
            back = self._tokenizer.decode(numbers, skip_special_tokens=True)
        missing = Counter(text.decode("utf-8", "surrogateescape")) - Counter(back)
        bad = missing.items()
        return max(1, sum(n * len(c.encode("utf-8", "surrogateescape")) for c, n in bad))

    def decoder(self, begun: bytes = b"") -> "Decoder":
        """The way back, id by id; `begun` are the first bytes of a character, see `unfinished`."""
        if self._tokenizer is None:
            return ByteDecoder(self.end, begun)
        return TokenDecoder(self._tokenizer, self.end)

    def unfinished(self, text: bytes) -> bytes:
        """The bytes at the end of `text` that begin a character which its next token may complete;
        a tokenizer has read them as U+FFFD."""
        if self._tokenizer is not None:
            return b""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(text[-4:])
        return decoder.getstate()[0]


class Decoder(Protocol):
    """From token ids, one after the other, to the text that they say."""

    def next(self, token: int) -> str:
        """The text that is certain with this id; "" within a character."""

    def rest(self) -> str:
        """What no further id completes, with U+FFFD in place of a character that is cut."""


class ByteDecoder:
    """One id a byte; the text is UTF-8, and what is not is U+FFFD."""

    def __init__(self, end: int, begun: bytes) -> None:
        self._end = end
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._decode(begun)

    def next(self, token: int) -> str:
        return "" if token == self._end else self._decode(bytes([token]))

    def rest(self) -> str:
        return self._decode(b"", final=True)


class TokenDecoder:
    """The ids of a `tokenizers` tokenizer."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._end = tokenizer, end
        # Special tokens in a text were written there; the end of a document is none of theirs.
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []  # ids whose text was not certain

    def next(self, token: int) -> str:
        if token == self._end or self._tokenizer.id_to_token(token) is None:  # a gap
            return ""
        with _library_errors("the tokenizer cannot decode", "give one that has a decoder"):
            text = self._stream.step(self._tokenizer, token) or ""
        self._held = [] if text else [*self._held, token]
        return text

    def rest(self) -> str:
        held, self._held = self._held, []
        with _library_errors("the tokenizer cannot decode", "give one that has a decoder"):
            return self._tokenizer.decode(held, skip_special_tokens=False) if held else ""


@contextmanager
def _library_errors(what: str, hint: str) -> Iterator[None]:
    """A RunError for whatever the tokenizers library raises: Exception itself, or the panic of its
    Rust, which is none."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted, SystemExit, GeneratorExit, MemoryError, RunError):
        raise
    except BaseException as error:
        raise RunError(f"{what} ({_first_line(error)}); {hint}") from error


@dataclass(frozen=True)
class Position:
    """How far the training text has been read: all but the seed and the text that decides what
    comes next.

    An epoch reads the units of `unit` tokens that it is cut into, each once, in an order drawn from
    (seed, epoch); laid end to end they are its stream, of which the windows of training are
    consecutive cuts. So long as --context is `unit`, a window is a unit. When it changes, the epoch
    is read to its end in windows of the new length, which are joined from units; the next one has
    units of the new length. A window that begins in one epoch and ends in the next takes the first
    `lead` tokens of the next one's last unit, whose rest ends that epoch; so all windows between
    are units again.
    """

    seed: int
    epoch: int
    unit: int  # tokens
    lead: int = 0  # tokens
    offset: int = 0  # tokens of the epoch's stream that have been read

    @classmethod
    def from_dict(cls, fields: Any) -> "Position":
        """What `dataclasses.asdict` made; RunError when it is anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or fields.keys() != names:
            raise RunError(f"the position in the data is {fields!r}; it must have {sorted(names)}")
        if any(type(x) is not int or not 0 <= x < 2**63 for x in fields.values()):
            raise RunError(f"the position in the data is {fields!r}; it must be whole numbers")
        if not fields["lead"] < fields["unit"]:
            raise RunError(f"the position in the data is {fields!r}; lead must be below unit")
        return cls(**fields)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus; `open_corpus` and `prepare` make it."""

    folder: Path
    codec: Codec
    info: dict[str, Any]
    train: np.ndarray  # memory-mapped

    @property
    def name(self) -> str:
        """What the corpus was made of, for titles: three paths at most, the others as a number."""
        paths = self.info["origin"]["paths"]
        more = [f"{len(paths) - 2:,} more"] if len(paths) > 3 else paths[2:]
        named = ", ".join([*paths[:2], *more]) or "the Python standard library"
        return named.encode("utf-8", "replace").decode()  # a name need not be UTF-8

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text a training token stands for."""
        return self.info["train"]["bytes"] / self.info["train"]["tokens"]

    @property
    def lost(self) -> int:
        """Bytes of the held-out text that its tokens do not give back: unless it is 0, nothing can
        be said in bits per byte."""
        return self.info["held_out"]["lost"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that is in the folder."""
        return self.info["fingerprint"]

    def begin(self, seed: int, context: int, windows: int = 0, epoch: int = 0) -> Position:
        """The position `windows` windows after the beginning of an epoch, all of one length."""
        more, index = divmod(windows, self._units(context))
        return Position(seed, epoch + more, context, 0, index * context)

    def check(self, at: Position) -> None:
        """RunError unless there is such a position in this corpus."""
        size = self._units(at.unit) * at.unit
        if at.offset >= size:
            raise RunError(f"the position {at.offset:,} in the data is beyond its {size:,} tokens")

    def advance(self, at: Position, windows: int, seed: int, context: int) -> Position:
        """The position once `windows` further windows of `context` tokens have been read.

        `seed` and `context` are those of the epochs that begin on the way.
        """
        while True:
            left = self._units(at.unit) * at.unit - at.offset
            whole, rest = divmod(left, context)
            if windows < whole or (windows == whole and rest):
                return dataclasses.replace(at, offset=at.offset + windows * context)
            if rest and windows > whole:  # one window takes the rest, and the lead of the next
                at = Position(seed, at.epoch + 1, context, context - rest, context - rest)
                windows -= whole + 1
            else:
                at = Position(seed, at.epoch + 1, context)
                windows -= whole

    def windows(
        self,
        at: Position,
        rows: int,
        context: int,
        seed: int | None = None,
        own: Sequence[int] | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> tuple[Tensor, Tensor]:
        """The next `rows` windows: tokens (rows, context) int64, and the successor of each.

        Only the rows `own` are read, and of them only part[0] of part[1] equal parts. `seed` is
        that of epochs which begin among these rows, by default that of `at`.
        """
        self._units(context)
        own, length = range(rows) if own is None else own, context // part[1]
        seed, begin = at.seed if seed is None else seed, part[0] * length
        inputs, targets = np.empty((2, len(own), length), np.int64)
        for place, row in enumerate(own):
            filled, skip = 0, begin
            for start, size in self._slices(self.advance(at, row, seed, context), seed, context):
                taken = min(size - skip, length - filled)
                if taken > 0:
                    first = start + skip
                    end = filled + taken
                    inputs[place, filled:end] = self.train[first : first + taken]
                    targets[place, filled:end] = self.train[first + 1 : first + taken + 1]
                    filled = end
                skip = max(0, skip - size)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _units(self, unit: int) -> int:
        """How many units an epoch has; RunError when not even one."""
        if len(self.train) <= unit:
            raise RunError(
                f"the corpus has {len(self.train):,} tokens to train on, one window takes "
                f"{unit + 1:,}; give more files or a smaller --context"
            )
        return max(1, (len(self.train) - unit) // unit)

    def _slices(self, at: Position, seed: int, context: int) -> Iterator[tuple[int, int]]:
        """(first token, number of tokens) of what makes up the window at this position."""
        left = context
        while left:
            number, unit, lead = self._units(at.unit), at.unit, at.lead
            order, luck = _order(at.seed, at.epoch, number)
            # The stream is `lead` tokens of the last unit, the other units, the rest of the last.
            others, room = (number - 1) * unit, lead - at.offset
            place = others + at.offset
            if room <= 0:
                place = at.offset if at.offset - lead >= others else at.offset - lead
                room = unit - place % unit
            phase = int(luck * (len(self.train) - number * unit))
            size = min(room, left)
            yield phase + int(order[place // unit]) * unit + place % unit, size
            left -= size
            if at.offset + size < number * unit:
                at = dataclasses.replace(at, offset=at.offset + size)
            else:
                at = Position(seed, at.epoch + 1, context, lead=left)

    def held_out(self, limit: int) -> tuple[Tensor, bytes]:
        """Whole pieces of the held-out documents, at least one and else at most `limit` bytes of
        them.

        Returns the stream, which starts with `end`, as (tokens,) int64, and the bytes it encodes.
        """
        tokens = size = 0
        for piece_tokens, piece_size in self.info["held_out_pieces"]:
            if tokens and size + piece_size > limit:
                break
            tokens, size = tokens + piece_tokens, size + piece_size
        stream = np.memmap(self.folder / "heldout.bin", self.codec.dtype, "r")[:tokens]
        with (self.folder / "heldout.raw").open("rb") as raw:
            return torch.from_numpy(stream.astype(np.int64)), raw.read(size)


@dataclass(frozen=True)
class Document:
    """A file, or `size` bytes of it from `begin` on."""

    name: str
    path: Path
    size: int
    begin: int = 0

    def pieces(self) -> Iterator[bytes]:
        """Its bytes in blocks of at most PIECE, cut at the ends of lines where there are any."""
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            left, rest = self.size, b""
            while left or rest:
                block = rest + stream.read(min(left, PIECE - len(rest)))
                if len(block) == len(rest):  # the file has shrunk since it was listed
                    left = 0
                left -= len(block) - len(rest)
                if not block:
                    return
                cut = len(block) if not left else block.rfind(b"\n") + 1 or _character(block)
                yield block[:cut]
                rest = block[cut:]


def standard_library() -> list[Document]:
    """The sources of the Python that runs this, without tests and installed packages."""
    top = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in _NOT_SOURCES]
        for path in (Path(folder) / name for name in names if name.endswith(".py")):
            found.append(Document(path.relative_to(top).as_posix(), path, path.stat().st_size))
    if not found:
        raise RunError(f"{top} holds no Python sources; name files or folders to train on")
    return found


@dataclass(frozen=True)
class Found:
    """What is in folders: the documents to read, and how many files are left out as binary."""

    documents: list[Document]
    binary: int = 0


def find_documents(
    paths: Sequence[Path], skip: Path | None = None, include: Sequence[str] = ()
) -> Found:
    """Every file of text in `paths`, folders searched to the bottom, those behind links too, each
    folder once.

    include: patterns of names, `*.py`, or of paths below the folder that is named, `src/*.py`; in
    folders only files that one of them fits are read. Left out: binary files (see `is_binary`) but
    for those in `paths` themselves, names that start with a dot, the folders of other runs, and
    `skip`, the folder of this one; where it is among `paths` itself, what a run writes to it.
    """
    found, binary, seen = [], 0, set[tuple[int, int]]()
    for path in paths:
        if not path.exists():
            raise RunError(f"{path} does not exist; name files or folders to train on")
        if path.is_file():
            found.append(Document(path.name, path, path.stat().st_size))
            continue
        linked = [path]  # folders behind links, after those that are in the folder itself
        while linked:
            for folder, folders, names in os.walk(linked.pop(0)):
                here = Path(folder)
                status = here.stat()
                if (status.st_dev, status.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                if skip is not None and here.resolve() == skip.resolve():
                    folders[:] = [name for name in folders if name not in ("data", "checkpoints")]
                    names = [name for name in names if name not in ("metrics.jsonl", "loss.png")]
                folders[:] = sorted(
                    name
                    for name in folders
                    if not name.startswith(".")
                    and not (here / name / "data" / "corpus.json").exists()
                    and (skip is None or (here / name).resolve() != skip.resolve())
                )
                linked += [here / name for name in folders if (here / name).is_symlink()]
                for file in (here / name for name in sorted(names) if not name.startswith(".")):
                    name = file.relative_to(path).as_posix()
                    fits = any(fnmatchcase(x, y) for x in (file.name, name) for y in include)
                    if (include and not fits) or not file.is_file():
                        continue
                    if is_binary(file):
                        binary += 1
                    else:
                        found.append(Document(name, file, file.stat().st_size))
    return Found(found, binary)


def is_binary(path: Path) -> bool:
    """Whether the first 8 KiB of a file are no text in any encoding of one byte or UTF-8: a NUL is
    among them, or more than one in twenty is a control character, as in what is compressed."""
    with _readable(path), path.open("rb") as stream:
        block = stream.read(8192)
    return b"\0" in block or 20 * len(block.translate(None, _TEXT)) > len(block)


def prepare(
    paths: Sequence[Path],
    folder: Path,
    *,
    tokenizer: Path | None = None,
    codec: Codec | None = None,
    held_out: float = HELD_OUT,
    include: Sequence[str] = (),
) -> Corpus:
    """Write the corpus of `paths` (none: the standard library's sources) to `folder` and open it.

    `codec` takes the place of one made of `tokenizer`. `include`: see `find_documents`.
    `held_out` is the share of the bytes, in (0, 0.5], that is kept from training. RunError, which
    names the file: nothing there, nothing in it, unreadable, not a tokenizer; or a `folder` that
    holds what this function has not written.
    """
    if not 0 < held_out <= 0.5:
        raise RunError(f"--held-out is {held_out}; it must be above 0 and at most 0.5")
    files.check_folder(folder, written_files)
    codec = codec or Codec(read_tokenizer(tokenizer) if tokenizer else None)
    if include and not paths:
        raise RunError("--include is for the files of folders; name the folders too")
    found = find_documents(paths, folder.parent, include) if paths else Found(standard_library())
    documents = _unique(found.documents)
    if not documents:
        where = ", ".join(map(str, paths))
        but = f" but {found.binary:,} binary files" if found.binary else ""
        only = f" that --include {' '.join(include)} fits" if include else ""
        raise RunError(
            f"the corpus is empty: no bytes in {where}{only}{but}; name files with text in them"
        )
    train, held = _split(documents, held_out)
    with files.atomic_folder(folder, written_files) as temporary:
        pieces = _write(held, codec, temporary / "heldout.bin", temporary / "heldout.raw")
        trained = _write(train, codec, temporary / "train.bin", None)
        if codec.source is not None:
            (temporary / "tokenizer.json").write_text(codec.source, "utf-8")
        info = {
            "origin": {
                "paths": [str(path) for path in paths],
                "held_out": held_out,
                "include": list(include),
            },
            "left_out": {"binary": found.binary},
            "train": _totals(train, trained),
            "held_out": _totals(held, pieces) | {"lost": _lost(temporary, codec, pieces)},
            "held_out_pieces": pieces,
            "held_out_documents": [document.name for document in held],
        }
        if codec.named_end is not None:
            info["end"] = codec.named_end
        info["fingerprint"] = _fingerprint(temporary, info)
        (temporary / "corpus.json").write_text(json.dumps(info, indent=1), "utf-8")
    return Corpus(folder, codec, info, np.memmap(folder / "train.bin", codec.dtype, "r"))


def open_corpus(folder: Path, fingerprint: str) -> Corpus:
    """The corpus in `folder`; RunError unless every byte of it is what `fingerprint` states."""
    folder = folder.resolve() if folder.is_symlink() else folder  # to read from a link is no harm
    hint = "restore the folder from a copy, or train again in another --out"
    try:
        info = _read_info(folder)
        if not _fingerprint(folder, info) == info["fingerprint"] == fingerprint:
            raise RunError(f"{folder} is not the corpus that this run was trained on; {hint}")
        if not is_end(info.get("end")):
            raise ValueError("it has no id that ends a document")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{folder}/corpus.json cannot be read ({_first_line(error)}); {hint}"
        ) from error
    tokenizer = folder / "tokenizer.json"
    codec = Codec(read_tokenizer(tokenizer) if tokenizer.exists() else None, info.get("end"))
    if wrong := _what_is_wrong(folder, info, codec):
        raise RunError(f"{folder}/corpus.json cannot be right: {wrong}; {hint}")
    if "lost" not in info["held_out"]:  # of a corpus from before this was looked at
        info["held_out"]["lost"] = _lost(folder, codec, info["held_out_pieces"])
    return Corpus(folder, codec, info, np.memmap(folder / "train.bin", codec.dtype, "r"))


def bytes_per_token(folder: Path) -> float | None:
    """Mean bytes of text that a training token of the corpus in `folder` stands for; None where its
    tokens do not give the text back, or where corpus.json does not say. Nothing is verified: it is
    for a plot."""
    try:
        info = _read_info(folder)
        if info["held_out"].get("lost", 0):
            return None
        found = info["train"]["bytes"] / info["train"]["tokens"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return None
    except RecursionError:
        return None
    return found if isinstance(found, float) and 0 < found < 1e6 else None


def is_end(x: Any) -> bool:
    """Whether what a file names as the id that ends a document can be one; None: it names none."""
    return x is None or (type(x) is int and 0 <= x < MOST_IDS)


def _what_is_wrong(folder: Path, info: dict[str, Any], codec: Codec) -> str:
    """What corpus.json says that is of another kind than `prepare` writes, or that is not so; ""
    when all is well. Checksums do not tell this: whoever writes another file can make them."""

    def whole(x: Any) -> bool:
        return type(x) is int and 0 <= x < 2**63

    def words(x: Any) -> bool:
        return isinstance(x, list) and all(isinstance(word, str) for word in x)

    origin = info.get("origin")
    if not isinstance(origin, dict) or not words(origin.get("paths")):
        return "it does not say what the corpus was made of"
    if not words(origin.get("include", [])) or type(origin.get("held_out")) is not float:
        return "it does not say how the corpus was made"
    left_out = info.get("left_out", {"binary": 0})
    if not isinstance(left_out, dict) or not whole(left_out.get("binary")):
        return "it does not say what was left out"
    for name in ("train", "held_out"):
        said, counts = info.get(name), ("documents", "bytes", "tokens")
        if not isinstance(said, dict) or not all(whole(said.get(count)) for count in counts):
            return f"it does not say what {name} holds"
    if not whole(info["held_out"].get("lost", 0)):
        return "it does not say what the tokens lose"
    pieces = info.get("held_out_pieces")
    if not isinstance(pieces, list) or not pieces:
        return "it lists no held-out text"
    if not all(isinstance(x, list) and len(x) == 2 and all(map(whole, x)) for x in pieces):
        return "its list of held-out text holds something else"
    held = info["held_out"]
    tokens, size = (sum(column) for column in zip(*pieces, strict=True))
    if (tokens + 1, size) != (held["tokens"], held["bytes"]):
        return "its list of held-out text does not sum to what it says"
    if not pieces[0][1] or not info["train"]["bytes"]:
        return "it says that there is no text"
    sizes = {
        "train.bin": info["train"]["tokens"] * codec.dtype.itemsize,
        "heldout.bin": held["tokens"] * codec.dtype.itemsize,
        "heldout.raw": held["bytes"],
    }
    for name, size in sizes.items():
        if not files.is_regular(folder / name) or (folder / name).stat().st_size != size:
            return f"{name} should have {size:,} bytes"
        if name != "heldout.raw":
            stream = np.memmap(folder / name, codec.dtype, "r")
            if any(
                block.max() >= codec.vocab_size
                for block in np.array_split(stream, 1 + size // 2**24)
            ):
                return f"{name} holds ids beyond those of the tokenizer"
    return ""


def written_files(folder: Path) -> set[str] | None:
    """The files of a corpus if `prepare` has written all that is in the folder, else None."""
    names = files.regular_files(folder)
    if names is None or not names - {files.MARKER} <= FILES or "corpus.json" not in names:
        return None
    try:
        info = _read_info(folder)
        return names if _fingerprint(folder, info) == info["fingerprint"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read_info(folder: Path) -> dict[str, Any]:
    """What corpus.json says. ValueError when the folder holds anything but regular files, before
    one is opened: a pipe would never end."""
    if files.regular_files(folder) is None:
        raise ValueError("it is no folder of regular files")
    return json.loads((folder / "corpus.json").read_text("utf-8"))


def _fingerprint(folder: Path, info: dict[str, Any]) -> str:
    """SHA-256 over the files and over what is said of them."""
    said = {key: value for key, value in info.items() if key != "fingerprint"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted((files.regular_files(folder) or set()) - {"corpus.json", files.MARKER}):
        digest.update(f"{name} {sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _lost(folder: Path, codec: Codec, pieces: list[list[int]]) -> int:
    """How many bytes of the held-out text its tokens do not give back."""
    if codec.source is None:
        return 0
    stream, begin, lost = np.memmap(folder / "heldout.bin", codec.dtype, "r"), 0, 0
    with (folder / "heldout.raw").open("rb") as raw:
        for tokens, size in pieces:
            ids = np.asarray(stream[begin : begin + tokens])
            lost += codec.lost(raw.read(size), ids[ids != codec.end])
            begin += tokens
    return lost


def read_tokenizer(path: Path) -> str:
    """The text of a tokenizer.json."""
    if path.exists() and not path.is_file():  # a device may have no end, a pipe no writer
        raise RunError(f"{path} is not a file; give a tokenizer.json")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path} cannot be read ({_first_line(error)}); give a tokenizer.json"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A RunError when `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); make it readable or leave it out"
        ) from error


def _unique(documents: list[Document]) -> list[Document]:
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda document: document.name):
        if document.size == 0:
            continue
        with _readable(document.path):
            content = sha256(document.path)
        if content not in seen:
            seen.add(content)
            kept.append(document)
    return kept


def _split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(trained on, held out): those first by their names' SHA-256 are held out, up to `share`.

    Documents that alone are a quarter of it are passed over, so that what is held out is varied.
    """
    target = share * sum(document.size for document in documents)
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest())
    longest = max(documents, key=lambda document: document.size)
    # Of many documents of one size even the longest may be less than the share, and all of them
    # more than a quarter of it.
    largest = target / 4 if longest.size >= int(target) else longest.size
    held: list[Document] = []
    taken = 0
    for document in by_hash:
        if taken < target and document.size <= largest:
            held.append(document)
            taken += document.size
    if held:
        names = {id(document) for document in held}
        return [document for document in documents if id(document) not in names], held
    # Too few documents to choose from: the end of the longest one is held out.
    cut = longest.size - max(1, int(target))
    head = Document(longest.name, longest.path, cut)
    tail = Document(longest.name, longest.path, longest.size - cut, cut)
    train = [head if document is longest else document for document in documents]
    return [document for document in train if document.size], [tail]


def _write(
    documents: list[Document], codec: Codec, tokens: Path, raw: Path | None
) -> list[list[int]]:
    """Write the stream. Returns (tokens, bytes) of each piece; a document's first has its `end`."""
    end = np.asarray([codec.end], codec.dtype)
    pieces = []
    with tokens.open("wb") as stream, open(raw or os.devnull, "wb") as copy:
        for document in documents:
            lead = end
            for piece in document.pieces():
                ids = np.concatenate((lead, codec.encode(piece)))
                stream.write(ids.tobytes())
                copy.write(piece)
                pieces.append([len(ids), len(piece)])
                lead = end[:0]
        stream.write(end.tobytes())
    return pieces


def _totals(documents: list[Document], pieces: list[list[int]]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "bytes": sum(size for _, size in pieces),
        "tokens": sum(tokens for tokens, _ in pieces) + 1,
    }


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, number: int) -> tuple[np.ndarray, float]:
    random = np.random.default_rng((seed, epoch))
    return random.permutation(number), random.random()


def _character(block: bytes) -> int:
    """Where to cut a block without a line end: before an unfinished UTF-8 character."""
    for back in range(1, min(4, len(block) - 1) + 1):
        if block[-back] >= 0xC0:
            return len(block) - back
        if block[-back] < 0x80:
            break
    return len(block)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
