"""What a text costs: the sum over its tokens, however it is cut into files and blocks."""

import math
import random
from pathlib import Path

import pytest
import torch
from test_tokenizers import letters, words

from tfla.errors import RunError
from tfla.xlstm import XLSTM, XLSTMConfig, data
from tfla.xlstm.data import Codec, find_documents, prepare
from tfla.xlstm.score import Score, score_documents, score_held_out
from tfla.xlstm.writer import Writer


def writer(codec: Codec) -> Writer:
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = XLSTM(XLSTMConfig(vocab_size=codec.vocab_size, **shape))
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return Writer(model, codec)


@pytest.mark.parametrize("source", [None, letters().to_str()])
@pytest.mark.parametrize("context", [17, 300, 5000])
def test_the_score_is_the_sum_over_all_windows(
    source: str | None, context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PIECE", 1000)  # bytes that are encoded at once
    draw = random.Random(1)
    for number, size in enumerate((1, 700, 5000)):
        text = "".join(draw.choice("abc dé\n") for _ in range(size))
        (tmp_path / f"{number}.txt").write_text(text, "utf-8")
    (tmp_path / "empty").touch()
    one = writer(Codec(source))
    documents = find_documents([tmp_path]).documents
    read = []
    score = score_documents(one, "all", documents, context, read=read.append)
    stream = [one.codec.end]
    for document in documents:
        for piece in document.pieces():
            stream += one.codec.encode(piece).tolist()
        stream.append(one.codec.end)
    ids = torch.tensor(stream)
    bits = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, context):
            window = ids[begin : begin + context + 1]
            logits = one.model(window[None, :-1])[0][0].double()
            found = logits.log_softmax(-1).gather(1, window[1:, None])
            bits -= found.sum().item() / math.log(2)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (score.bytes, score.tokens, score.lost) == (size, len(ids) - 1, 0)
    assert score.bits == pytest.approx(bits, rel=1e-5)
    assert score.bits_per_byte == score.bits / size and sum(read) == size
    assert score.perplexity == pytest.approx(2 ** (score.bits / score.tokens))


def test_equally_likely_tokens_have_the_perplexity_of_their_number(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("any words " * 50)
    one = writer(Codec())
    with torch.no_grad():
        one.model.head.weight.zero_()
    score = score_documents(one, "", find_documents([tmp_path]).documents, 32)
    assert score.perplexity == pytest.approx(257, rel=1e-4)
    assert Score.total([score, score]).bits_per_byte == score.bits_per_byte


def test_nothing_is_said_in_bytes_that_the_tokens_lose(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b zzz a b\n" * 30)
    codec = Codec(words({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]").to_str())
    score = score_documents(writer(codec), "", find_documents([tmp_path]).documents, 32)
    assert score.lost >= 90 and score.bits_per_byte is None and score.bits_per_token > 0


def test_held_out_text_is_scored_whole(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}\n" * 40)
    corpus = prepare([tmp_path], tmp_path / "run" / "data")
    one = writer(corpus.codec)
    score = score_held_out(one, corpus, 64)
    documents = {x.name: x for x in find_documents([tmp_path]).documents}
    held = [documents[name] for name in corpus.info["held_out_documents"]]
    again = score_documents(one, "held-out text", held, 64)
    assert score.bytes == again.bytes and score.tokens == again.tokens
    assert score.bits == pytest.approx(again.bits, rel=1e-6)
    with pytest.raises(RunError, match="another tokenizer"):
        score_held_out(writer(Codec(letters().to_str())), corpus, 64)
    with torch.no_grad():
        one.model.head.weight.fill_(math.nan)
    with pytest.raises(RunError, match="not a number"):
        score_held_out(one, corpus, 64)
