"""Tokenizers of any kind: the table holds every id, and what a text loses is measured and said."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Call
from seals import change_meta
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tfla import render
from tfla.xlstm import checkpoint
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.data import Codec, open_corpus, prepare
from tfla.xlstm.metrics import read_metrics
from tfla.xlstm.writer import load_writer

TINY = "--hidden-size 16 --num-layers 1 --num-heads 2 --context 16 --batch 2 --eval-bytes 500"


def words(ids: dict[str, int], **options: Any) -> Tokenizer:
    """A word each, split at white space and joined by it again."""
    tokenizer = Tokenizer(models.WordLevel(ids, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def letters(**options: Any) -> Tokenizer:
    """Every byte a token: it gives back any text that is UTF-8."""
    alphabet = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, [], **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gaps() -> Tokenizer:
    return words({**{c: n for n, c in enumerate("abcdefg")}, "h": 8})


def far_gap() -> Tokenizer:
    return words({**{c: n for n, c in enumerate("abcdefg")}, "h": 20})


def few_and_large() -> Tokenizer:
    return words({**{c: n for n, c in enumerate("abcdefg")}, "h": 70_000})


def at_the_edge() -> Tokenizer:
    return words({**{c: n for n, c in enumerate("abcdefg")}, "h": 65_535})


def added() -> Tokenizer:
    tokenizer = words({c: n for n, c in enumerate("abcdefg")})
    tokenizer.add_tokens(["h"])
    return tokenizer


def added_special() -> Tokenizer:
    tokenizer = words({**{c: n for n, c in enumerate("abcdefg")}, "z": 30})
    tokenizer.add_special_tokens([AddedToken("h", special=True)])
    return tokenizer


def padded() -> Tokenizer:
    tokenizer = gaps()
    tokenizer.enable_padding(length=500, pad_id=9999, pad_token="PAD")
    return tokenizer


def truncated() -> Tokenizer:
    tokenizer = gaps()
    tokenizer.enable_truncation(max_length=3)
    return tokenizer


def framed() -> Tokenizer:
    tokenizer = gaps()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 5000)]
    )
    return tokenizer


KINDS = [
    gaps,
    far_gap,
    few_and_large,
    at_the_edge,
    added,
    added_special,
    padded,
    truncated,
    framed,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_a_row_and_the_end_has_its_own(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    codec = Codec(tokenizer.to_str())
    ids = codec.encode(b"a h b")
    plain = Tokenizer.from_str(tokenizer.to_str())
    assert len(ids) == 3
    assert ids.tolist() == [plain.token_to_id(c) for c in "ahb"]
    assert codec.end == max(plain.get_vocab().values()) + 1 not in ids
    assert codec.vocab_size == codec.end + 1
    assert np.asarray([codec.end], codec.dtype)[0] == codec.end
    decoder = codec.decoder()
    assert "".join(map(decoder.next, ids.tolist())).split() == ["a", "h", "b"]
    gap = next((n for n in range(codec.end) if plain.id_to_token(n) is None), codec.end)
    assert codec.decoder().next(gap) == codec.decoder().next(codec.end) == ""


@pytest.mark.parametrize("kind", [gaps, far_gap, few_and_large, added_special, padded])
def test_training_and_writing_with_any_ids(
    kind: Callable[[], Tokenizer], tmp_path: Path, call: Call
) -> None:
    draw = random.Random(0)
    (tmp_path / "text").write_text(" ".join(draw.choice("abcdefgh") for _ in range(4000)))
    kind().save(str(tmp_path / "t.json"))
    line = f"train {tmp_path / 'text'} --out {tmp_path / 'run'} --tokenizer {tmp_path / 't.json'}"
    status, _, err = call(f"{line} {TINY} --steps 30 --lr 2e-2")
    assert status == 0, err
    writer = load_writer(tmp_path / "run")
    assert writer.model.config.vocab_size == writer.codec.end + 1
    written = "".join(writer.write(b"a h b", 60, temperature=1.0, seed=0))
    assert len(written.split()) > 20  # "h" is not the end of a document
    assert call(f"generate {tmp_path / 'run'} --tokens 20 --seed 1", "a h b")[0] == 0


# ------------------------------------------------------------------------------- no unknown token


@pytest.mark.parametrize("text", ["a b x", "a z", "é"])
def test_a_text_that_cannot_be_encoded_is_one_line(text: str, tmp_path: Path, call: Call) -> None:
    """The library raises Exception itself: a word that the model does not know."""
    (tmp_path / "text").write_text("a b c d " * 200 + text)
    gaps().save(str(tmp_path / "t.json"))
    line = f"train {tmp_path / 'text'} --out {tmp_path / 'run'} --tokenizer {tmp_path / 't.json'}"
    status, _, err = call(f"{line} {TINY} --steps 1")
    assert status == 2 and err.count("\n") == 1, err
    assert "the tokenizer cannot encode this text" in err and "unknown token" in err
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_cannot_be_encoded_is_one_line(tmp_path: Path, call: Call) -> None:
    (tmp_path / "text").write_text("a b c d " * 200)
    gaps().save(str(tmp_path / "t.json"))
    line = f"train {tmp_path / 'text'} --out {tmp_path / 'run'} --tokenizer {tmp_path / 't.json'}"
    assert call(f"{line} {TINY} --steps 1")[0] == 0
    status, _, err = call(f"generate {tmp_path / 'run'}", "x")
    assert status == 2 and err.count("\n") == 1 and "cannot encode" in err


def test_a_tokenizer_without_tokens_is_refused() -> None:
    with pytest.raises(RunError, match="the tokenizer has no tokens"):
        Codec(Tokenizer(models.BPE()).to_str())


# ------------------------------------------------------------------------------- what is lost


def unknown() -> Tokenizer:
    return words({"[UNK]": 0, "a": 1}, unk_token="[UNK]")


def unknown_special() -> Tokenizer:
    tokenizer = unknown()
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def dropped() -> Tokenizer:
    """A BPE without an unknown token leaves out what it does not know."""
    return Tokenizer(models.BPE({"a": 0, " ": 1}, []))


def lowered() -> Tokenizer:
    tokenizer = letters()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def stripped() -> Tokenizer:
    tokenizer = letters()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


LOSSY = [  # the text, the share of its bytes that is gone at least and at most
    (unknown, "qzj xvw ", 0.7, 0.8),
    (unknown_special, "qzj xvw ", 0.8, 1.0),
    (dropped, "a b a c ", 0.2, 0.3),
    (lowered, "Abcd efg ", 0.1, 0.13),
    (stripped, "abcd\n", 1e-5, 0.01),
    (letters, "ab\xffcd", 0.15, 0.25),  # as Latin-1: no UTF-8
]


@pytest.mark.parametrize(("kind", "text", "least", "most"), LOSSY)
def test_what_a_tokenizer_loses_is_said_and_nothing_in_bits_per_byte(
    kind: Callable[[], Tokenizer], text: str, least: float, most: float, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(12):
        copies = text * (300 + number)
        (tmp_path / "texts" / f"text{number}").write_bytes(copies.encode("latin-1"))
    kind().save(str(tmp_path / "t.json"))
    out = tmp_path / "run"
    line = f"train {tmp_path / 'texts'} --out {out} --tokenizer {tmp_path / 't.json'} {TINY}"
    status, said, err = call(f"{line} --steps 4 --eval-every 2 --log-every 1")
    assert status == 0, err
    [share] = re.findall(
        r"do not give back [\d,]+ of [\d,]+ bytes of held-out text \((.*?)%\)", said
    )
    corpus = open_corpus(out / "data", checkpoint.load(out).meta["data"])
    assert least <= corpus.lost / corpus.info["held_out"]["bytes"] <= most
    assert float(share) == pytest.approx(
        100 * corpus.lost / corpus.info["held_out"]["bytes"], abs=0.01
    )
    assert "bits per token" in said
    assert not re.search(r"\d bits(/| per )byte", said), said
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["event"] == "eval"]
    assert len(records) == 2
    assert all("bits_per_token" in r and "bits_per_byte" not in r for r in records)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_comes_back_is_stated_in_bits_per_byte(tmp_path: Path, call: Call) -> None:
    (tmp_path / "text").write_text("naïve 漢字 😀 [UNK] <s>\r\n\tend  of it \n" * 100)
    tokenizer = letters()
    tokenizer.add_special_tokens(["<s>"])  # in the text it is text
    tokenizer.save(str(tmp_path / "t.json"))
    out = tmp_path / "run"
    line = f"train {tmp_path / 'text'} --out {out} --tokenizer {tmp_path / 't.json'} {TINY}"
    status, said, _ = call(f"{line} --steps 2 --eval-every 1")
    assert status == 0 and "do not give back" not in said
    assert re.search(r"held-out text: \d+\.\d{3} bits per byte", said)
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["event"] == "eval"]
    assert len(records) == 2 and all("bits_per_byte" in r for r in records)


def test_a_corpus_of_before_is_looked_at_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("qzj xvw " * 400)
    unknown().save(str(tmp_path / "t.json"))
    corpus = prepare([tmp_path / "text"], tmp_path / "data", tokenizer=tmp_path / "t.json")
    info = json.loads((tmp_path / "data" / "corpus.json").read_text())
    del info["held_out"]["lost"]
    from tfla.xlstm.data import _fingerprint

    info["fingerprint"] = _fingerprint(tmp_path / "data", info)
    (tmp_path / "data" / "corpus.json").write_text(json.dumps(info))
    again = open_corpus(tmp_path / "data", info["fingerprint"])
    assert again.lost == corpus.lost > 0


def test_a_plot_in_bits_per_token_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    monkeypatch.setattr(
        render, "_finish", lambda figure, path: labels.append(figure.axes[0].get_ylabel())
    )
    common = {"step": 1, "progress": 0.5, "elapsed": 1.0}
    records = [
        {"event": "train", "loss": 5.0, "lr": 1.0, "tokens_per_second": 1.0, **common},
        {"event": "eval", "bits_per_token": 12.0, **common},
    ]
    render.loss_curve(records, tmp_path / "x.png", title="x", bytes_per_token=None)
    render.loss_curve(records[:1], tmp_path / "x.png", title="x")
    assert labels == ["bits per token (lower is better)", "bits per byte (lower is better)"]


def test_a_model_and_a_tokenizer_that_do_not_belong_together(tmp_path: Path, call: Call) -> None:
    """A version that counted tokens made tables that were too small."""
    (tmp_path / "text").write_text("a b c d " * 300)
    gaps().save(str(tmp_path / "t.json"))
    out = tmp_path / "run"
    line = f"train {tmp_path / 'text'} --out {out} --tokenizer {tmp_path / 't.json'} {TINY}"
    assert call(f"{line} --steps 1")[0] == 0
    change_meta(
        checkpoint.load(out).path,
        lambda meta: meta["config"].update(vocab_size=meta["config"]["vocab_size"] - 1),
    )
    for words_ in (f"generate {out} a", f"train --out {out} --resume"):
        status, _, err = call(words_)
        assert status == 2 and "they do not belong together" in err and err.count("\n") == 1
