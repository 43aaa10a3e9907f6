"""Damaged and foreign files, drawn at random: each is one line and exit status 2, or works.

All that a checkpoint says is sealed by a checksum, which a stranger can make too; so files are
changed with the seals as they were, and sealed anew.
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from seals import change_meta, seal_files

from tfla import cli
from tfla.integrations.text import export_run
from tfla.xlstm import XLSTM, XLSTMConfig
from tfla.xlstm.data import Codec, _fingerprint

TINY = "--hidden-size 16 --num-layers 1 --num-heads 2 --context 16 --batch 2 --eval-bytes 200"
TINY += " --steps 2 --log-every 1 --device cpu --threads 1"
OTHERS: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, -(10**400), 2**63, 2**31, 1e308, float("nan"), float("inf"),
    "", "x" * 1000, "\x00", "\ud800", "9" * 400, [], {}, [[]], {"a": 1}, [1, "x", None], [[1, 2]],
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tokenizer of words, so that all the files are there."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("damage")
    (folder / "text").mkdir()
    for number in range(6):
        (folder / "text" / f"{number}.txt").write_text(f"these words are of text {number}\n" * 60)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train([str(path) for path in (folder / "text").iterdir()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = ["train", str(folder / "text"), "--out", str(folder / "run"), *TINY.split()]
    assert cli.run_command([*words, "--tokenizer", str(folder / "tokenizer.json")]) == 0
    return folder / "run"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in JSON."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else ()
    inner = list(enumerate(value))[:3] if isinstance(value, list) else inner
    for key, x in inner:
        found += places(x, (*path, key))
    return found


def harm_json(text: bytes, draw: random.Random) -> bytes:
    """One value, or one key, of JSON is another."""
    body = json.loads(text)
    *path, key = draw.choice(places(body))
    inside = body
    for step in path:
        inside = inside[step]
    kind = draw.randrange(6)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[draw.choice(["", "x", "__class__", "../../x", "step"])] = inside.pop(key)
    elif kind == 2:
        marked = "here it is"
        inside[key] = marked
        deep = draw.choice(["[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 50_000])
        return json.dumps(body).replace(json.dumps(marked), deep).encode()
    else:
        inside[key] = draw.choice(OTHERS)
    return json.dumps(body).encode()


def flip(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(min(len(content), 4000))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def harm_header(content: bytes, draw: random.Random) -> bytes:
    """Another header in a safetensors file, of a right or a wrong length."""
    size = int.from_bytes(content[:8], "little")
    header = harm_json(content[8 : 8 + size], draw)
    length = len(header) if draw.randrange(4) else draw.choice([0, 2**63, size + 10**9])
    return length.to_bytes(8, "little") + header + content[8 + size :]


def seal_anew(run: Path) -> None:
    """All checksums made right for what is there, as far as it has the form to hold them."""
    for folder in (run / "data", *(run / "checkpoints").iterdir()):
        try:
            if folder.name == "data":
                info = json.loads((folder / "corpus.json").read_text())
                info["fingerprint"] = _fingerprint(folder, info)
                (folder / "corpus.json").write_text(json.dumps(info))
                continue
            data = json.loads((run / "data" / "corpus.json").read_text())["fingerprint"]
            change_meta(folder, lambda meta, data=data: meta.update(data=data))
            seal_files(folder)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OSError):
            pass


LAST = "checkpoints/step-00000002"
FILES: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    f"{LAST}/checkpoint.json": (harm_json, harm_json, flip, cut),
    f"{LAST}/tokenizer.json": (harm_json, flip, cut),
    f"{LAST}/model.safetensors": (harm_header, harm_header, flip, cut),
    f"{LAST}/optimizer.safetensors": (harm_header, harm_header, flip, cut),
    "data/corpus.json": (harm_json, harm_json, flip, cut),
    "data/tokenizer.json": (harm_json, flip, cut),
    "metrics.jsonl": (flip, cut),
}
CASES = 12
VALUES = 4  # of OTHERS, for each field of config.json
# Of a folder in transformers' format, and what it is read for.
FOLDER: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    "config.json": (harm_json, harm_json, harm_json, flip, cut),
    "generation_config.json": (harm_json, harm_json, flip, cut),
    "tokenizer.json": (harm_json, flip, cut),
    "model.safetensors": (harm_header, harm_header, flip, cut),
}


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_says(
    name: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(name)
    for case in range(CASES):
        run = tmp_path / f"{case}"
        shutil.copytree(whole, run)
        harm = FILES[name][case % len(FILES[name])]
        (run / name).write_bytes(harm((run / name).read_bytes(), draw))
        if case % 3:
            seal_anew(run)
        commands = [
            ["generate", str(run), "these ", "--tokens", "3", "--device", "cpu"],
            ["train", "--out", str(run), "--resume", "--steps", "3", "--device", "cpu"],
        ]
        if name in ("metrics.jsonl", "data/corpus.json"):
            commands.append(["plot", str(run)])
        for words in commands:
            one_line_or_well(words, f"{name}, case {case}, {harm.__name__}", capfd)
        shutil.rmtree(run)


def one_line_or_well(words: list[str], case: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The command does what it should, or says in one line why it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = cli.run_command(words)
        except BaseException as error:
            raise AssertionError(case) from error
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    lines = [line for line in said if line.startswith("tfla: ")]
    assert status in (0, 2) and len(lines) == (status == 2) or "warning" in str(lines), said


@pytest.mark.parametrize("name", FOLDER)
def test_whatever_a_folder_of_transformers_says(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = XLSTMConfig(vocab_size=257, hidden_size=128, num_layers=1, num_heads=2)
    whole = export_run(XLSTM(config), Codec(), tmp_path / "whole")
    (tmp_path / "text").write_text("these words are read by the model\n" * 20)
    draw = random.Random(name)
    for case in range(CASES):
        folder = tmp_path / f"{case}"
        shutil.copytree(whole, folder)
        harm = FOLDER[name][case % len(FOLDER[name])]
        (folder / name).write_bytes(harm((folder / name).read_bytes(), draw))
        about = f"{name}, case {case}, {harm.__name__}"
        one_line_or_well(["generate", str(folder), "these ", "--tokens", "3"], about, capfd)
        out = ["--out", str(tmp_path / "run"), "--init", str(folder)]
        size = ["--steps", "1", "--context", "8", "--batch", "1", "--eval-bytes", "50"]
        one_line_or_well(["train", str(tmp_path / "text"), *out, *size], about, capfd)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(folder)


def test_whatever_a_field_of_config_json_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = XLSTMConfig(vocab_size=257, hidden_size=128, num_layers=1, num_heads=2)
    folder = export_run(XLSTM(config), Codec(), tmp_path / "whole")
    fields = json.loads((folder / "config.json").read_text())
    draw = random.Random(0)
    for name in (*fields, "use_bias", "chunkwise_kernel", "torch_dtype"):
        for value in draw.sample(OTHERS, VALUES):
            (folder / "config.json").write_text(json.dumps(fields | {name: value}))
            words = ["generate", str(folder), "x", "--tokens", "1"]
            one_line_or_well(words, f"{name} {value!r:.50}", capfd)
