"""The text of a folder in transformers' format: its tokenizer, and the ids that begin and end one.

    tokenizer.json                              of the tokenizers library
    tokenizer_config.json                       which of its tokens begin, end and pad a text
    config.json, generation_config.json         their ids: bos_token_id, eos_token_id

A run without a tokenizer has one id a byte; transformers has no such tokenizer, so it gets one of
256 tokens, of a byte each, and one that ends a document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfla.errors import RunError
from tfla.integrations import shards
from tfla.integrations.weights import CONFIG, save_xlstm
from tfla.xlstm import XLSTM
from tfla.xlstm.data import Codec, read_tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"
# What transformers' xLSTMConfig takes for ids that config.json does not mention.
DEFAULT_IDS = {"bos_token_id": 0, "eos_token_id": 2}
END_NAMES = ("<|endoftext|>", "<|endofdocument|>")  # the first that is no token already


@dataclass(frozen=True)
class TextSide:
    """How a model of such a folder is given text.

    codec: text to ids and back. begin: the ids before every text. stop: the ids that end one.
    """

    codec: Codec
    begin: tuple[int, ...]
    stop: tuple[int, ...]


def read_text_side(folder: Path, vocab_size: int) -> TextSide:
    """What the files of `folder` say; RunError, which names the file, when they say nothing that a
    model of `vocab_size` ids can use."""
    source = read_tokenizer(folder / TOKENIZER)
    ids = {name: _ids(folder, name, vocab_size) for name in DEFAULT_IDS}
    begin, stop = ids["bos_token_id"], ids["eos_token_id"]
    end = next(iter((*stop, *begin)), None)
    codec = Codec(source, end)
    needed = codec.vocab_size if end is not None else codec.end
    if needed > vocab_size:
        raise RunError(
            f"{folder / TOKENIZER} has ids up to {needed - 1:,}, the model of {CONFIG} only "
            f"{vocab_size:,} of them; they do not belong together"
        )
    return TextSide(codec, begin[:1], stop)


def export_run(model: XLSTM, codec: Codec, folder: Path) -> Path:
    """Write a model and its codec as a folder that transformers reads, and ``tfla`` too.

    Its tokenizer puts the id that ends a document before every text, as it stood in training.
    RunError when the folder is not empty, or when transformers cannot hold the model or its
    tokenizer.

    Example:
        writer = load_writer(Path("runs/train"))
        export_run(writer.model, writer.codec, Path("exported"))
        # then: AutoTokenizer.from_pretrained("exported"),
        #       AutoModelForCausalLM.from_pretrained("exported")
    """
    tokenizer, name = with_end(codec)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), codec.end)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), name),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    texts = {
        TOKENIZER: tokenizer,
        TOKENIZER_CONFIG: json.dumps(config, indent=2) + "\n",
        GENERATION: json.dumps(ids, indent=2) + "\n",
    }
    try:
        return save_xlstm(model, folder, fields=ids, texts=texts)
    except (ValueError, FileExistsError) as error:
        raise RunError(str(error).rstrip(".")) from error


def with_end(codec: Codec) -> tuple[str, str]:
    """A tokenizer.json with the codec's ids, whose end of a document is a special token that stands
    before every text; and the name of that token."""
    from tokenizers import AddedToken, Tokenizer, processors

    plain = Tokenizer.from_str(codec.source) if codec.source is not None else _bytes_tokenizer()
    before = plain.get_vocab(with_added_tokens=True)
    name = next((token for token, id in before.items() if id == codec.end), None)
    made = plain
    if name is None:
        name = next((word for word in END_NAMES if word not in before), END_NAMES[-1])
        body = json.loads(plain.to_str())
        vocab = body["model"].get("vocab")
        if isinstance(vocab, dict) and codec.end != len(before):
            # Of ids with gaps: a token that is added would get the number of those there are.
            body["model"]["vocab"] = {**vocab, **before, name: codec.end}
            made = Tokenizer.from_str(json.dumps(body))
    made.no_padding()
    made.no_truncation()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B:1", special_tokens=[(name, codec.end)]
    )
    if made.get_vocab(with_added_tokens=True) != before | {name: codec.end}:
        raise RunError(
            f"the run's tokenizer cannot be given a token of the id {codec.end:,}, which ends a "
            "document; export a run with another tokenizer"
        )
    return made.to_str(pretty=True), name


def _bytes_tokenizer() -> Any:
    """A tokenizer of 256 tokens, whose ids are the bytes of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel writes a byte as a letter: itself where it is printable, else one from U+0100 on.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _ids(folder: Path, name: str, vocab_size: int) -> tuple[int, ...]:
    """The ids of that name: those of generation_config.json, else of config.json, else those that
    transformers takes; null is none."""
    fields: Mapping[str, Any] = {}
    for file in (folder / GENERATION, folder / CONFIG):
        try:
            fields = shards.read_json(file)
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise RunError(str(error).rstrip(".")) from error
        if name in fields:
            break
    else:
        return (DEFAULT_IDS[name],) if DEFAULT_IDS[name] < vocab_size else ()
    found = fields[name]
    several = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(id) is not int or not 0 <= id < vocab_size for id in several):
        raise RunError(f"{file} has {name} {found!r:.60}; it must be ids below {vocab_size:,}")
    return tuple(several)
