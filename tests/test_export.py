"""A run as a folder in transformers' format: the same ids, the same text, the same logits."""

import json
from pathlib import Path

import pytest
import torch
from test_tokenizers import added_special, at_the_edge, gaps, letters, words
from tokenizers import Tokenizer

from tfla.errors import RunError
from tfla.integrations import save_xlstm
from tfla.integrations.text import export_run, read_text_side, with_end
from tfla.xlstm import XLSTM, XLSTMConfig, load
from tfla.xlstm.data import Codec
from tfla.xlstm.writer import Dialogue, Sampling, Writer, load_writer

TEXT = "naïve 漢字 \U0001f600\n\tdef f(x):\r\n  return '<s>'\0 end"


def model(vocab_size: int) -> XLSTM:
    shape = {"hidden_size": 128, "num_layers": 1, "num_heads": 2}
    return XLSTM(XLSTMConfig(vocab_size=vocab_size, **shape))


def test_bytes_have_the_ids_that_they_are() -> None:
    codec = Codec()
    source, name = with_end(codec)
    tokenizer = Tokenizer.from_str(source)
    ids = tokenizer.encode(TEXT).ids
    assert ids == [codec.end, *TEXT.encode()]
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == TEXT
    assert tokenizer.token_to_id(name) == codec.end == 256
    every = [tokenizer.id_to_token(byte) for byte in range(256)]
    assert None not in every and len(set(every)) == 256


@pytest.mark.parametrize("kind", [letters, gaps, added_special, at_the_edge])
def test_a_tokenizer_keeps_its_ids_and_gets_the_end(kind) -> None:
    codec = Codec(kind().to_str())
    tokenizer = Tokenizer.from_str(with_end(codec)[0])
    assert tokenizer.encode("a h b").ids == [codec.end, *codec.encode(b"a h b").tolist()]
    assert tokenizer.decode([codec.end]) == ""


def test_a_name_that_is_taken_is_not_taken_again() -> None:
    codec = Codec(words({"<|endoftext|>": 0, "a": 1, "b": 2}).to_str())
    source, name = with_end(codec)
    assert Tokenizer.from_str(source).token_to_id(name) == codec.end == 3
    assert Tokenizer.from_str(source).token_to_id("<|endoftext|>") == 0


@pytest.mark.parametrize("source", [None, letters().to_str()])
def test_what_is_exported_writes_as_the_run(source: str | None, tmp_path: Path) -> None:
    codec = Codec(source)
    one = Writer(model(codec.vocab_size), codec)
    folder = export_run(one.model, codec, tmp_path / "out")
    other = load_writer(folder)
    assert (other.begin, other.stop) == ([codec.end], [codec.end])
    prompt = "größer ".encode()
    texts = ["".join(x.write(prompt, 40, seed=3)) for x in (one, other)]
    assert texts[0] == texts[1] != ""
    tokens = torch.randint(codec.vocab_size, (1, 30))
    with torch.no_grad():
        assert torch.equal(load(folder)(tokens)[0], one.model(tokens)[0])
    with pytest.raises(RunError, match="not an empty folder"):
        export_run(one.model, codec, folder)
    again = export_run(other.model, other.codec, tmp_path / "again")
    files = ("config.json", "tokenizer.json", "generation_config.json")
    assert all((again / name).read_text() == (folder / name).read_text() for name in files)


def test_what_transformers_cannot_hold_is_one_line(tmp_path: Path) -> None:
    fields = {"vocab_size": 257, "hidden_size": 128, "num_layers": 1, "num_heads": 2}
    sigmoid = XLSTM(XLSTMConfig(**fields, input_gate="sigmoid"))
    with pytest.raises(RunError, match="transformers' xLSTM has the exponential one"):
        export_run(sigmoid, Codec(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_of_a_folder_of_others(tmp_path: Path) -> None:
    """generation_config.json counts before config.json, and that before what transformers takes."""
    text = letters().to_str()
    save_xlstm(model(300), tmp_path / "x", texts={"tokenizer.json": text})

    def ids(config: dict[str, object], generation: dict[str, object] | None = None):
        kept = json.loads((tmp_path / "x/config.json").read_text())
        for name in ("bos_token_id", "eos_token_id"):
            kept.pop(name, None)
        (tmp_path / "x/config.json").write_text(json.dumps(kept | config))
        (tmp_path / "x/generation_config.json").write_text(json.dumps(generation or {}))
        side = read_text_side(tmp_path / "x", 300)
        return side.begin, side.stop

    assert ids({}) == ((0,), (2,))
    assert ids({"bos_token_id": None, "eos_token_id": [5, 6]}) == ((), (5, 6))
    assert ids({"bos_token_id": 4, "eos_token_id": 5}, {"eos_token_id": 7}) == ((4,), (7,))
    for wrong in (-1, 300, 1.5, True, "2", [1, None], {}, 10**400):
        with pytest.raises(RunError, match="eos_token_id"):
            ids({"eos_token_id": wrong})
    ids({})
    with pytest.raises(RunError, match="ids up to 255, the model of config.json only 100"):
        read_text_side(tmp_path / "x", 100)
    (tmp_path / "x/tokenizer.json").unlink()
    with pytest.raises(RunError, match=r"tokenizer\.json cannot be read"):
        load_writer(tmp_path / "x")


def test_a_text_by_turns_is_one_text() -> None:
    """What was read and written before is not read again, and not forgotten."""
    codec = Codec()
    writer = Writer(model(codec.vocab_size), codec, stop=[])
    dialogue = Dialogue(writer, Sampling(temperature=0))
    parts = [(b"import os\n", 12), (b"class A:\n", 9), (b"", 5)]
    ids = [codec.end]
    for text, count in parts:
        # Greedy tokens of the whole text so far, read anew.
        ids += codec.encode(text).tolist()
        new = writer.model.generate([ids], count, temperature=0).tokens[0].tolist()
        decoder = codec.decoder()
        whole = "".join(map(decoder.next, new)) + decoder.rest()
        assert "".join(dialogue.say(text, count)) == whole
        ids += new


def test_a_text_ends_and_the_next_begins_with_nothing() -> None:
    codec = Codec()
    writer = Writer(model(codec.vocab_size), codec)
    with torch.no_grad():
        writer.model.head.weight.zero_()  # all tokens are equally likely, and the first is taken
    writer.stop = [0]
    dialogue = Dialogue(writer, Sampling(temperature=0))
    assert "".join(dialogue.say(b"abc", 10)) == ""
    fresh = Dialogue(writer, Sampling(temperature=0))
    for each in (dialogue, fresh):
        "".join(each.say(b"xyz", 10))
    states = [x._stream.state for x in (dialogue, fresh)]
    assert all(torch.equal(a.C, b.C) for a, b in zip(*states, strict=True))


def test_a_character_that_the_prompt_begins_comes_in_whole() -> None:
    codec = Codec()
    writer = Writer(model(codec.vocab_size), codec)
    with torch.no_grad():
        writer.model.head.weight.zero_()
        writer.model.embedding.weight.zero_()
        writer.model.norm.weight.zero_()
    # Whatever is read, id 0 follows: the character is not completed, and said to be cut.
    assert "".join(writer.write("é".encode()[:1], 2, temperature=0)) == "\ufffd\0\0"
