"""The corpus: any files, written once as two memory-mapped streams of tokens.

    RUN/data/
        corpus.json     what is in it, and its fingerprint
        train.bin       [end] document [end] document ... [end], as uint16, or uint32 for a large
        vocabulary heldout.bin     the same for the documents that are never trained on heldout.raw
        their bytes as they were, to hold other compressors against tokenizer.json  only when one
        was given

Documents are held out whole, chosen by the SHA-256 of their names: the same ones in every run and
on every machine. Identical documents are kept once, or the held-out ones would not be unseen.
Training windows of a step are a function of (seed, step) alone, so a resumed run reads what the
unbroken one would have read.
"""

import codecs
import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfla.xlstm.checkpoint import RunError, atomic_folder, sha256

# A piece is encoded by itself and cut after a line, so that a document of any size fits into
# memory.
PIECE = 1 << 16
HELD_OUT = 0.05  # share of the bytes
# Folders of the standard library whose text is not its sources: tests, and what was installed
# later.
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Codec:
    """Bytes to token ids and back: one id a byte, or a `tokenizers` file; the last id ends a
    document.

    Example:
        codec = Codec()                             # vocab_size 257, end 256
        codec = Codec(Path("tokenizer.json").read_text())
        codec.encode(b"import os").tolist()
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self.source = tokenizer
        self._tokenizer: Any = None
        if tokenizer is None:
            self.end = 256
        else:
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_str(tokenizer)
            except Exception as error:  # the library raises Exception itself
                raise RunError(
                    f"the tokenizer cannot be read ({_first_line(error)}); give a tokenizer.json "
                    "of the tokenizers library"
                ) from error
            self.end = self._tokenizer.get_vocab_size()
        self.vocab_size = self.end + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: bytes) -> np.ndarray:
        """(tokens,) ids; a tokenizer reads UTF-8 with what is not UTF-8 replaced by U+FFFD."""
        if self._tokenizer is None:
            return np.frombuffer(text, np.uint8).astype(self.dtype)
        encoding = self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)
        return np.asarray(encoding.ids, self.dtype)

    def decoder(self) -> Callable[[int], str]:
        """A function from the next id to the text that is now certain; "" inside a character."""
        if self._tokenizer is None:
            decode = codecs.getincrementaldecoder("utf-8")("replace").decode
            return lambda token: "" if token == self.end else decode(bytes([token]))
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: "" if token == self.end else stream.step(self._tokenizer, token) or ""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus; `open_corpus` and `prepare` make it."""

    folder: Path
    codec: Codec
    info: dict[str, Any]
    train: np.ndarray  # memory-mapped

    @property
    def name(self) -> str:
        """What the corpus was made of, for titles."""
        return ", ".join(self.info["origin"]["paths"]) or "the Python standard library"

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text a training token stands for."""
        return self.info["train"]["bytes"] / self.info["train"]["tokens"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that is in the folder."""
        return self.info["fingerprint"]

    def windows(
        self, seed: int, step: int, rows: int, context: int, own: Sequence[int] | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Tensor:  # fmt: skip
        """(rows, context + 1) int64: the tokens of one step and, one further on, their successors.

        Each window is read once an epoch, in an order and with a phase drawn from (seed, epoch).
        Only the rows `own` are read, and of them only part[0] of part[1] equal parts.
        """
        if len(self.train) <= context:
            raise RunError(
                f"the corpus has {len(self.train):,} tokens to train on, one window takes "
                f"{context + 1:,}; give more files or a smaller --context"
            )
        number = max(1, (len(self.train) - context) // context)
        own, length = range(rows) if own is None else own, context // part[1]
        out = np.empty((len(own), length + 1), np.int64)
        for place, row in enumerate(own):
            epoch, index = divmod(step * rows + row, number)
            order, luck = _order(seed, epoch, number)
            start = int(luck * (len(self.train) - number * context)) + int(order[index]) * context
            start += part[0] * length
            out[place] = self.train[start : start + length + 1]
        return torch.from_numpy(out)

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
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in _NOT_SOURCES]
        for path in (Path(folder) / name for name in files if name.endswith(".py")):
            found.append(Document(path.relative_to(top).as_posix(), path, path.stat().st_size))
    if not found:
        raise RunError(f"{top} holds no Python sources; name files or folders to train on")
    return found


def find_documents(paths: Sequence[Path], skip: Path | None = None) -> list[Document]:
    """Every file in `paths`, folders searched to the bottom.

    Left out: names that start with a dot, `skip`, and the folders of other runs.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise RunError(f"{path} does not exist; name files or folders to train on")
        if path.is_file():
            found.append(Document(path.name, path, path.stat().st_size))
            continue
        for folder, folders, files in os.walk(path):
            here = Path(folder)
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".")
                and not (here / name / "data" / "corpus.json").exists()
                and (skip is None or (here / name).resolve() != skip.resolve())
            ]
            for file in (here / name for name in files if not name.startswith(".")):
                if file.is_file():
                    name = file.relative_to(path).as_posix()
                    found.append(Document(name, file, file.stat().st_size))
    return found


def prepare(
    paths: Sequence[Path],
    folder: Path,
    *,
    tokenizer: Path | None = None,
    held_out: float = HELD_OUT,
) -> Corpus:
    """Write the corpus of `paths` (none: the standard library's sources) to `folder` and open it.

    `held_out` is the share of the bytes, in (0, 0.5], that is kept from training. RunError, which
    names the file: nothing there, nothing in it, unreadable, not a tokenizer.
    """
    if not 0 < held_out <= 0.5:
        raise RunError(f"--held-out is {held_out}, wanted above 0 and at most 0.5")
    codec = Codec(read_tokenizer(tokenizer) if tokenizer else None)
    found = find_documents(paths, folder.parent) if paths else standard_library()
    documents = _unique(found)
    if not documents:
        where = ", ".join(map(str, paths))
        raise RunError(f"the corpus is empty: no bytes in {where}; name files with text in them")
    train, held = _split(documents, held_out)
    with atomic_folder(folder) as temporary:
        pieces = _write(held, codec, temporary / "heldout.bin", temporary / "heldout.raw")
        trained = _write(train, codec, temporary / "train.bin", None)
        if codec.source is not None:
            (temporary / "tokenizer.json").write_text(codec.source, "utf-8")
        info = {
            "origin": {"paths": [str(path) for path in paths], "held_out": held_out},
            "train": _totals(train, trained),
            "held_out": _totals(held, pieces),
            "held_out_pieces": pieces,
            "held_out_documents": [document.name for document in held],
        }
        info["fingerprint"] = _fingerprint(temporary, info)
        (temporary / "corpus.json").write_text(json.dumps(info, indent=1), "utf-8")
    return Corpus(folder, codec, info, np.memmap(folder / "train.bin", codec.dtype, "r"))


def open_corpus(folder: Path, fingerprint: str) -> Corpus:
    """The corpus in `folder`; RunError unless every byte of it is what `fingerprint` states."""
    hint = "restore the folder from a copy, or train again in another --out"
    try:
        info = json.loads((folder / "corpus.json").read_text("utf-8"))
        if not _fingerprint(folder, info) == info["fingerprint"] == fingerprint:
            raise RunError(f"{folder} is not the corpus that this run was trained on; {hint}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder}/corpus.json cannot be read ({_first_line(error)}); {hint}"
        ) from error
    tokenizer = folder / "tokenizer.json"
    codec = Codec(tokenizer.read_text("utf-8") if tokenizer.exists() else None)
    return Corpus(folder, codec, info, np.memmap(folder / "train.bin", codec.dtype, "r"))


def _fingerprint(folder: Path, info: dict[str, Any]) -> str:
    """SHA-256 over the files and over what is said of them."""
    said = {key: value for key, value in info.items() if key != "fingerprint"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for path in sorted(folder.iterdir()):
        if path.name != "corpus.json":
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def read_tokenizer(path: Path) -> str:
    """The text of a tokenizer.json."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path} cannot be read ({_first_line(error)}); give a tokenizer.json"
        ) from error


def _unique(documents: list[Document]) -> list[Document]:
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda document: document.name):
        if document.size == 0:
            continue
        try:
            content = sha256(document.path)
        except OSError as error:
            raise RunError(
                f"{document.path} cannot be read ({error.strerror}); "
                "make it readable or leave it out"
            ) from error
        if content not in seen:
            seen.add(content)
            kept.append(document)
    return kept


def _split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(trained on, held out): those first by their names' SHA-256 are held out, up to `share`.

    Documents that alone are a quarter of it are passed over, so that what is held out is varied.
    """
    target = share * sum(document.size for document in documents)
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    held: list[Document] = []
    taken = 0
    for document in by_hash:
        if taken < target and document.size <= target / 4:
            held.append(document)
            taken += document.size
    if held:
        names = {id(document) for document in held}
        return [document for document in documents if id(document) not in names], held
    # Too few documents to choose from: the end of the longest one is held out.
    longest = max(documents, key=lambda document: document.size)
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


@functools.lru_cache(maxsize=2)
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
