"""How well a trained model expects a text: `tfla eval`."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.data import Corpus, Document
from tfla.xlstm.train import total_nats
from tfla.xlstm.writer import Writer

ROWS = 4096  # tokens that are read at once


@dataclass(frozen=True)
class Score:
    """What a text costs with a model.

    Attributes:
        name: of the text.
        bytes: its length.
        tokens: those that were predicted: all but the first, which nothing precedes.
        bits: the sum of -log2 p over them.
        lost: bytes that the tokens do not give back.
    """

    name: str
    bytes: int
    tokens: int
    bits: float
    lost: int = 0

    @property
    def bits_per_byte(self) -> float | None:
        """bits / bytes; None where the tokens do not give all bytes back."""
        return None if self.lost or not self.bytes else self.bits / self.bytes

    @property
    def bits_per_token(self) -> float:
        """bits / tokens."""
        return self.bits / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """Of a token: 2^bits_per_token, the number of equally likely ones that are as hard."""
        return 2.0**self.bits_per_token if self.bits_per_token < 1024 else math.inf

    @classmethod
    def total(cls, scores: Iterable["Score"]) -> "Score":
        """All of them as one text."""
        parts = list(scores)
        return cls(
            "all",
            sum(x.bytes for x in parts),
            sum(x.tokens for x in parts),
            math.fsum(x.bits for x in parts),
            sum(x.lost for x in parts),
        )


def score_documents(
    writer: Writer,
    name: str,
    documents: Iterable[Document],
    context: int,
    precision: str = "auto",
    read: Callable[[int], object] = lambda size: None,
) -> Score:
    """The score of documents, one after the other, each behind the id that ends one.

    The stream is read as in training, in windows of `context` tokens, each from an empty state, so
    the first tokens of a window cost most. `read` is called with the bytes as they are read.

    Example:
        writer = load_writer(Path("runs/train"))
        found = find_documents([Path("texts")]).documents
        score_documents(writer, "texts", found, context=256).bits_per_byte
    """
    size = lost = 0
    begin, end = writer.begin, writer.stop[:1]

    def blocks() -> Iterator[np.ndarray]:
        nonlocal size, lost
        yield np.asarray(begin, np.int64)
        for document in documents:
            for piece in document.pieces():
                ids = writer.codec.encode(piece)
                size += len(piece)
                lost += writer.codec.lost(piece, ids)
                yield ids.astype(np.int64)
                read(len(piece))
            yield np.asarray(end, np.int64)

    tokens, bits = _bits(writer, blocks(), context, precision)
    return Score(name, size, tokens, bits, lost)


def score_held_out(
    writer: Writer,
    corpus: Corpus,
    context: int,
    precision: str = "auto",
    read: Callable[[int], object] = lambda size: None,
) -> Score:
    """The score of all the held-out text of a run; see `score_documents`."""
    if corpus.codec.source != writer.codec.source:
        raise RunError(f"{corpus.folder} was made with another tokenizer than the model's")
    stream = np.memmap(corpus.folder / "heldout.bin", corpus.codec.dtype, "r")
    said = corpus.info["held_out"]

    def blocks() -> Iterator[np.ndarray]:
        for begin in range(0, len(stream), 2**16):
            block = stream[begin : begin + 2**16]
            yield block.astype(np.int64)
            read(len(block) * said["bytes"] // len(stream))

    tokens, bits = _bits(writer, blocks(), context, precision)
    return Score("held-out text", said["bytes"], tokens, bits, corpus.lost)


def _bits(
    writer: Writer, blocks: Iterable[np.ndarray], context: int, precision: str
) -> tuple[int, float]:
    """(tokens, sum of their -log2 p) of a stream of ids, without its first."""
    size = max(1, ROWS // context) * context  # whole windows
    device = writer.model.embedding.weight.device
    nats, tokens, rest = 0.0, 0, np.empty(0, np.int64)

    def read(ids: np.ndarray) -> None:
        nonlocal nats, tokens
        stream = torch.from_numpy(ids)
        nats += total_nats(writer.model, stream, context, precision, device)
        tokens += len(ids) - 1

    for block in _grouped(blocks, size):
        rest = np.concatenate((rest, block))
        while len(rest) > size:
            read(rest[: size + 1])
            rest = rest[size:]  # the last id that was a target is read now
    if len(rest) > 1:
        read(rest)
    if not math.isfinite(nats):
        raise RunError("the loss on this text is not a number; the model's weights are damaged")
    return tokens, nats / math.log(2)


def _grouped(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same ids in blocks of `size` or more: those of short documents are many."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count >= size:
            yield np.concatenate(held)
            held, count = [], 0
    if held:
        yield np.concatenate(held)
