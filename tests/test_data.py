"""The corpus: what is held out is unseen, what is read is a function of (seed, step)."""

import errno
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tfla
from tfla.xlstm import checkpoint, data, save_state
from tfla.xlstm.checkpoint import RunError, sha256
from tfla.xlstm.data import (
    PIECE,
    Codec,
    Corpus,
    Document,
    find_documents,
    open_corpus,
    prepare,
    standard_library,
)

END = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 files of 0 to 2,000 random characters at several depths; four of them twice."""
    source = tmp_path / "source"
    draw = random.Random(0)
    for number in range(60):
        path = source / f"part{number % 3}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(draw.choices(range(32, 256), k=draw.randrange(2000))))
        if number % 15 == 7:
            (source / f"copy{number}").write_bytes(path.read_bytes())
    return source


def documents(stream: np.ndarray) -> list[bytes]:
    """The documents of a stream of byte tokens."""
    assert stream[0] == END and stream[-1] == END
    ends = np.flatnonzero(stream == END)
    return [bytes(stream[a + 1 : b].tolist()) for a, b in zip(ends, ends[1:], strict=False)]


def held_stream(corpus: Corpus) -> np.ndarray:
    return np.fromfile(corpus.folder / "heldout.bin", corpus.codec.dtype)


def test_each_document_is_on_one_side_once(folder: Path, tmp_path: Path) -> None:
    corpus = prepare([folder], tmp_path / "data", held_out=0.2)
    train, held = documents(corpus.train), documents(held_stream(corpus))
    contents = {path.read_bytes() for path in folder.rglob("*") if path.is_file()} - {b""}
    assert not set(train) & set(held)
    assert set(train) | set(held) == contents
    assert len(train) + len(held) == len(contents)
    share = sum(map(len, held)) / sum(map(len, contents))
    assert 0.2 <= share < 0.25
    assert b"".join(held) == (corpus.folder / "heldout.raw").read_bytes()


def test_the_corpus_does_not_depend_on_the_order_of_files(folder: Path, tmp_path: Path) -> None:
    parts = sorted(folder.rglob("*.bin"))
    one = prepare(parts, tmp_path / "one")
    other = prepare(parts[::-1], tmp_path / "two")
    for name in ("train.bin", "heldout.bin", "heldout.raw"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    text = random.Random(1).randbytes(3 * PIECE + 5)
    (tmp_path / "only").write_bytes(text)
    corpus = prepare([tmp_path / "only"], tmp_path / "data", held_out=0.1)
    [train], [held] = documents(corpus.train), documents(held_stream(corpus))
    assert train + held == text
    assert len(held) == int(0.1 * len(text))


@pytest.mark.parametrize("number", [12, 30, 79])
def test_of_documents_of_one_size_whole_ones_are_held_out(tmp_path: Path, number: int) -> None:
    for name in range(number):
        content = random.Random(name).choices(range(32, 127), k=100)
        (tmp_path / f"{name:02}").write_bytes(bytes(content))
    corpus = prepare([tmp_path], tmp_path / "data", held_out=0.1)
    train, held = documents(corpus.train), documents(held_stream(corpus))
    assert sorted(map(len, (*train, *held))) == [100] * number or number == 12
    assert sum(map(len, held)) >= 0.1 * 100 * number - 1
    assert sum(map(len, (*train, *held))) == 100 * number


def test_hidden_files_and_other_runs_are_left_out(folder: Path) -> None:
    names = {document.name for document in find_documents([folder]).documents}
    for hidden in (folder / ".git" / "index", folder / ".hidden", folder / "out" / "loss.png"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_text("x")
    (folder / "old" / "data").mkdir(parents=True)
    (folder / "old" / "data" / "corpus.json").write_text("{}")
    (folder / "old" / "data" / "train.bin").write_text("x")
    assert {d.name for d in find_documents([folder], skip=folder / "out").documents} == names


def test_a_run_within_its_own_text_does_not_read_what_it_writes(folder: Path) -> None:
    names = {document.name for document in find_documents([folder], skip=folder).documents}
    prepare([folder], folder / "data")
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name in ("checkpoints/step-00000001/model.safetensors", "metrics.jsonl", "loss.png"):
        (folder / name).write_text("x")
    assert {document.name for document in find_documents([folder], skip=folder).documents} == names


def test_the_default_is_the_sources_of_the_standard_library() -> None:
    names = {document.name for document in standard_library()}
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert not [n for n in names if not n.endswith(".py") or "site-packages" in n or "/test/" in n]


@pytest.mark.parametrize("line", [0, 70, PIECE + 100])
def test_pieces_are_whole_characters_and_lose_nothing(tmp_path: Path, line: int) -> None:
    draw = random.Random(line)
    letters = "aé漢😀"
    text = "".join(
        draw.choice(letters) if not line or n % line else "\n" for n in range(PIECE // 2 * 3)
    )
    path = tmp_path / "text"
    path.write_text(text, "utf-8")
    pieces = list(Document("text", path, path.stat().st_size).pieces())
    assert b"".join(pieces).decode() == text
    assert len(pieces) > 2 and max(map(len, pieces)) <= PIECE
    assert "".join(piece.decode() for piece in pieces) == text
    if line == 70:
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])


def test_an_epoch_reads_every_window_once(folder: Path, tmp_path: Path) -> None:
    corpus = prepare([folder], tmp_path / "data")
    context, rows = 50, 5
    number = (len(corpus.train) - context) // context
    assert number % rows  # the epoch does not end with a step
    steps = 2 * number // rows
    at = corpus.begin(3, context)
    read = [
        corpus.windows(corpus.advance(at, n * rows, 3, context), rows, context)
        for n in range(steps)
    ]
    windows, targets = (torch.cat(x) for x in zip(*read, strict=True))
    assert windows.dtype == torch.int64 and windows.shape == (steps * rows, context)
    assert torch.equal(windows[:, 1:], targets[:, :-1])
    text = np.asarray(corpus.train).astype(np.uint16).tobytes()

    def place(window: torch.Tensor) -> int:
        at = text.find(window.numpy().astype(np.uint16).tobytes())
        assert at >= 0
        return at // 2

    for epoch in (windows[:number], windows[number:]):
        starts = sorted(place(window) for window in epoch)
        assert len(set(starts)) == len(starts)
        gaps = {b - a for a, b in zip(starts, starts[1:], strict=False)}
        assert gaps == {context} if len(epoch) == number else all(g % context == 0 for g in gaps)
    assert place(windows[0]) != place(windows[number])


def test_windows_follow_from_seed_and_position(folder: Path, tmp_path: Path) -> None:
    corpus = prepare([folder], tmp_path / "data")
    again = open_corpus(tmp_path / "data", corpus.fingerprint)

    def read(corpus: Corpus, seed: int, windows: int, rows: int) -> torch.Tensor:
        return torch.cat(corpus.windows(corpus.begin(seed, 32, windows), rows, 32), 1)

    ahead = read(corpus, 1, 36, 4)
    assert torch.equal(read(again, 1, 36, 4), ahead)
    assert not torch.equal(read(again, 2, 36, 4), ahead)
    assert not torch.equal(read(again, 1, 32, 4), ahead)
    assert torch.equal(torch.cat([read(again, 1, 36, 2), read(again, 1, 38, 2)]), ahead)


def test_held_out_bytes_are_those_that_the_tokens_encode(folder: Path, tmp_path: Path) -> None:
    corpus = prepare([folder], tmp_path / "data", held_out=0.4)
    for limit in (0, 1500, 10**9):
        stream, raw = corpus.held_out(limit)
        assert stream[0] == END
        assert bytes(token for token in stream.tolist() if token != END) == raw
        assert len(raw) <= limit or limit == 0
    assert raw == (corpus.folder / "heldout.raw").read_bytes()


# ------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A small byte-level BPE, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Path(json.__file__).read_text()], trainer)
    path = tmp_path / "tokenizer.json"
    bpe.save(str(path))
    return path


def test_a_tokenizer_shortens_the_stream_and_decodes_it(tokenizer: Path, tmp_path: Path) -> None:
    source = sorted(Path(json.__file__).parent.glob("*.py"))
    corpus = prepare(source, tmp_path / "data", tokenizer=tokenizer)
    plain = prepare(source, tmp_path / "plain")
    assert len(corpus.train) < 0.6 * len(plain.train)
    assert corpus.codec.vocab_size == 401
    assert corpus.info["held_out"]["bytes"] == plain.info["held_out"]["bytes"]
    stream, raw = corpus.held_out(10**9)
    decoder = corpus.codec.decoder()
    assert "".join(map(decoder.next, stream.tolist())) + decoder.rest() == raw.decode()
    again = open_corpus(tmp_path / "data", corpus.fingerprint)
    assert again.codec.vocab_size == 401


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_streamed_text_comes_in_whole_characters(kind: str, tokenizer: Path) -> None:
    codec = Codec(tokenizer.read_text() if kind == "tokenizer" else None)
    text = "naïve 漢字 😀 end"
    ids = codec.encode(text.encode()).tolist()
    assert len(ids) > len(text) or kind == "tokenizer"
    decoder = codec.decoder()
    pieces = [decoder.next(token) for token in [*ids, codec.end]]
    assert "".join(pieces) == text and decoder.rest() == ""
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_text_that_ends_within_a_character_keeps_its_last_bytes(kind: str, tokenizer: Path) -> None:
    """They are no character, but something stood there."""
    codec = Codec(tokenizer.read_text() if kind == "tokenizer" else None)
    ids = codec.encode("end \U0001f600".encode()).tolist()
    assert len(ids) > 3  # the character is several tokens
    for cut in range(1, 4):
        decoder = codec.decoder()
        text = "".join(map(decoder.next, ids[:-cut]))
        assert text == "end " and set(decoder.rest()) == {"\ufffd"} and decoder.rest() == ""


def test_a_character_that_a_prompt_begins_is_completed() -> None:
    codec = Codec()
    whole = "é漢\U0001f600".encode()
    for size in range(len(whole) + 1):
        begun = codec.unfinished(whole[:size])
        decoder = codec.decoder(begun)
        text = whole[: size - len(begun)].decode()
        assert text + "".join(map(decoder.next, whole[size:])) == whole.decode()
        assert not decoder.rest()
    assert codec.unfinished(b"\xff\xfe") == b"" and codec.unfinished(b"") == b""


# ------------------------------------------------------------------------------- errors


def test_errors_name_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    target, empty = tmp_path / "data", tmp_path / "empty"
    empty.mkdir()
    (empty / "nothing").touch()
    with pytest.raises(RunError, match=f"{tmp_path}/absent does not exist"):
        prepare([tmp_path / "absent"], target)
    with pytest.raises(RunError, match=f"the corpus is empty: no bytes in {empty}"):
        prepare([empty], target)
    with pytest.raises(RunError, match="--held-out is 0.9; it must be above 0 and at most 0.5"):
        prepare([folder], target, held_out=0.9)
    with pytest.raises(RunError, match="no.json cannot be read"):
        prepare([folder], target, tokenizer=tmp_path / "no.json")
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(RunError, match="the tokenizer cannot be read"):
        prepare([folder], target, tokenizer=tmp_path / "bad.json")
    assert not target.exists()
    corpus = prepare([folder], target)
    with pytest.raises(RunError, match="give more files or a smaller --context"):
        corpus.begin(0, len(corpus.train))


def test_an_unreadable_file_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        if path.name == "copy7":  # chmod would not stop root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sha256(path)

    monkeypatch.setattr(data, "sha256", refuse)
    with pytest.raises(RunError, match="copy7 cannot be read"):
        prepare([folder], tmp_path / "data")


@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "heldout.raw", "corpus.json"])
def test_an_altered_corpus_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    corpus = prepare([folder], tmp_path / "data")
    assert open_corpus(corpus.folder, corpus.fingerprint).info == corpus.info
    content = bytearray((corpus.folder / name).read_bytes())
    content[100] ^= 1
    for altered in (content, b"1"):
        (corpus.folder / name).write_bytes(altered)
        with pytest.raises(RunError, match=f"{corpus.folder}.*; restore"):
            open_corpus(corpus.folder, corpus.fingerprint)
    with pytest.raises(RunError, match="cannot be read"):
        open_corpus(tmp_path / "absent", corpus.fingerprint)


def test_binary_files_in_folders_are_left_out_and_counted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = {
        "utf8.txt": "żółć, ÿ und \u4e2d\n".encode() * 40,
        "latin.txt": "ÄÖÜ größer\r\n\tfür".encode("latin-1") * 40,
        "coloured.log": b"\x1b[1mbold\x1b[0m\n" * 40,
        "page.txt": b"a page\f\nand another\n" * 40,
    }
    draw = random.Random(1).randbytes(5000)
    binaries = {"picture.png": b"\x89PNG\r\n\x1a\n\0\0" + draw, "utf16": "text".encode("utf-16")}
    binaries["packed.gz"] = draw.replace(b"\0", b"\1")
    for name, content in (texts | binaries).items():
        (source / name).write_bytes(content)
    corpus = prepare([source], tmp_path / "data", held_out=0.2)
    assert {document.name for document in find_documents([source]).documents} == set(texts)
    assert corpus.info["left_out"] == {"binary": 3}
    # One that is named by itself is meant.
    named = prepare([source / "picture.png"], tmp_path / "other")
    assert named.info["left_out"] == {"binary": 0}
    parts = documents(named.train) + documents(held_stream(named))
    assert b"".join(parts) == binaries["picture.png"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x").write_bytes(draw)
    with pytest.raises(RunError, match="no bytes in .*only but 1 binary files"):
        prepare([tmp_path / "only"], tmp_path / "third")


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    for path in (source / "b" / "own.txt", outside / "deep" / "far.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("text " * 20)
    (source / "a").symlink_to(source / "b")  # comes before what it links to
    (source / "link").symlink_to(outside)
    (source / "link2").symlink_to(outside / "deep")
    (source / "b" / "up").symlink_to(source)  # a loop
    (outside / "deep" / "loop").symlink_to(outside)
    (source / "broken").symlink_to(tmp_path / "nowhere")
    (source / ".hidden").symlink_to(outside)
    names = [document.name for document in find_documents([source]).documents]
    assert sorted(names) == ["b/own.txt", "link/deep/far.txt"]


def test_include_picks_files_by_name_or_path(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "src/c.py", "src/d.md", "src/deep/e.py"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 20)

    def names(*include: str) -> set[str]:
        found = find_documents([tmp_path / "source"], include=include).documents
        return {document.name for document in found}

    assert names("*.py") == {"a.py", "src/c.py", "src/deep/e.py"}
    assert names("*.md", "b.*") == {"src/d.md", "b.txt"}
    assert names("src/*") == {"src/c.py", "src/d.md", "src/deep/e.py"}
    with pytest.raises(RunError, match=r"that --include \*\.rs fits"):
        prepare([tmp_path / "source"], tmp_path / "data", include=["*.rs"])
    with pytest.raises(RunError, match="name the folders too"):
        prepare([], tmp_path / "data", include=["*.py"])


@pytest.mark.skipif(os.name != "posix", reason="modes")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_have_the_mode_that_the_umask_says(umask: int, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words and words " * 200)
    (tmp_path / "text.txt").chmod(0o600)
    before = os.umask(umask)
    try:
        prepare([tmp_path / "text.txt"], tmp_path / "run" / "data")
        tensors = {"model": {"w": torch.ones(3)}}
        checkpoint.save(tmp_path / "run", {"step": 1}, tensors, {"tokenizer.json": "{}"})
        state = (tfla.State(torch.ones(1, 1, 2, 2), None, None),)
        save_state(state, tmp_path / "run" / "state.safetensors")
    finally:
        os.umask(before)
    found = [path for path in (tmp_path / "run").rglob("*")]
    modes = {path.name: path.stat().st_mode & 0o777 for path in found if path.is_file()}
    assert set(modes.values()) == {0o666 & ~umask} and "model.safetensors" in modes, modes
    assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o777 & ~umask}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names that are no UTF-8")
def test_file_names_need_not_be_utf8(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"s\xff")
    source.mkdir()
    for number in range(8):
        (source / os.fsdecode(b"%d\xfe.txt" % number)).write_text(f"text {number} " * 50)
    corpus = prepare([source], tmp_path / "data", held_out=0.3)
    again = open_corpus(tmp_path / "data", corpus.fingerprint)
    assert again.info == corpus.info and again.info["origin"]["paths"] == [str(source)]
    assert len(documents(again.train)) + len(documents(held_stream(again))) == 8
    again.name.encode()
