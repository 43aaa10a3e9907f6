"""A run that is taken up again: what it reads next, what it says, and what it refuses."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from seals import change_meta, seal_files
from torch import Tensor

from tfla import cli
from tfla.xlstm import checkpoint
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.data import Codec, Corpus, Position
from tfla.xlstm.run import TrainOptions, resume, start
from tfla.xlstm.train import Placement, read_metrics, train
from tfla.xlstm.writer import load_writer

MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
SMALL = MODEL | {"context": 24, "batch": 2, "log_every": 1, "eval_every": 100, "save_every": 4}
SMALL |= {"eval_bytes": 500, "steps": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in which no 40 bytes are the same as any other 40."""
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    (folder / "text").write_bytes(draw.integers(32, 256, 3000, dtype=np.uint8).tobytes())
    return folder


@pytest.fixture
def run(text: Path, tmp_path: Path) -> Path:
    """A run of four steps of two windows of 24 tokens."""
    list(train(start(tmp_path / "run", SMALL | {"paths": [text]}), Placement("cpu")))
    return tmp_path / "run"


# ------------------------------------------------------------------------------- the position


def count(n: int) -> Corpus:
    """A corpus whose token at place p is p."""
    return Corpus(Path(), Codec(), {"held_out": {"lost": 0}}, np.arange(n, dtype=np.uint32))


def units(corpus: Corpus, context: int) -> int:
    return (len(corpus.train) - context) // context


def read(
    corpus: Corpus, at: Position, rows: int, context: int, seed: int = 1
) -> tuple[Tensor, Any]:
    """The tokens of the next rows, whose successors are right, and the position behind them."""
    inputs, targets = corpus.windows(at, rows, context, seed)
    assert torch.equal(targets, inputs + 1)
    return inputs, corpus.advance(at, rows, seed, context)


changes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 6)), min_size=1, max_size=6
)


@settings(max_examples=200)
@given(st.integers(90, 400), changes)
def test_each_token_is_read_once_an_epoch_whatever_changes(
    n: int, plan: list[tuple[int, int, int]]
) -> None:
    """Stages of (context, batch, steps); every epoch that is complete has read what its units hold,
    no token twice and, of the units that it was cut into, none not at all."""
    corpus, at = count(n), count(n).begin(1, plan[0][0])
    stream: list[int] = []
    begun: list[tuple[int, int]] = []  # tokens of the stream at which an epoch begins, its unit
    ahead = 0
    for context, batch, steps in plan * 3:
        for _ in range(steps):
            tokens, at = read(corpus, at, batch, context)
            stream += tokens.flatten().tolist()
            while ahead <= len(stream):
                begun.append((ahead, context))
                ahead += units(corpus, context) * context
    for (first, unit), (last, _) in zip(begun, begun[1:], strict=False):
        epoch = stream[first:last]
        if len(epoch) < last - first:
            continue
        assert len(set(epoch)) == len(epoch) == units(corpus, unit) * unit
        assert max(epoch) - min(epoch) == len(epoch) - 1, "a unit is missing"


@given(st.integers(90, 400), st.integers(1, 30), st.integers(1, 30), st.integers(0, 60))
def test_how_rows_are_dealt_out_changes_nothing(n: int, a: int, b: int, done: int) -> None:
    corpus = count(n)
    at = corpus.advance(corpus.begin(1, a), done, 1, a)
    whole, behind = read(corpus, at, 12, b)
    for rows in (1, 3, 4):
        parts, here = [], at
        for _ in range(0, 12, rows):
            part, here = read(corpus, here, rows, b)
            parts.append(part)
        assert torch.equal(torch.cat(parts), whole) and here == behind
    own = corpus.windows(at, 12, b, 1, own=[1, 5, 11])[0]
    assert torch.equal(own, whole[[1, 5, 11]])
    ranks = [k for k in (1, 2, 3, 5) if b % k == 0]
    for k in ranks:
        shares = [corpus.windows(at, 12, b, 1, part=(r, k))[0] for r in range(k)]
        assert torch.equal(torch.cat(shares, 1), whole)


def test_an_unchanged_run_reads_what_it_always_read() -> None:
    """The numbers of the version that kept no position: checkpoints of it go on as they would."""
    corpus = count(1000)
    windows = corpus.windows(corpus.begin(3, 50, 17), 4, 50)[0]
    number = (1000 - 50) // 50
    for row in range(4):
        epoch, index = divmod(17 + row, number)
        random = np.random.default_rng((3, epoch))
        order, luck = random.permutation(number), random.random()
        begin = int(luck * (1000 - number * 50)) + int(order[index]) * 50
        assert windows[row].tolist() == list(range(begin, begin + 50))


def windows_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, begin: Callable[[], Any]
) -> list[Any]:
    seen: list[Any] = []
    real = Corpus.windows

    def noted(self: Corpus, *args: Any, **options: Any) -> Any:
        found = real(self, *args, **options)
        seen.extend(map(tuple, found[0].tolist()))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "windows", noted)
        list(train(begin(), Placement("cpu")))
    return seen


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 1},
        {"batch": 8},
        {"accumulate": 4},
        {"batch": 1, "accumulate": 3},
        {"context": 12},
        {"context": 48},
        {"context": 31},
        {"context": 7, "batch": 5},
        {"seed": 5},
        {"steps": 9},
    ],
    ids=str,
)
def test_a_resumed_run_reads_on_whatever_it_changes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    """Until the first epoch ends, no byte is read twice."""
    folder = tmp_path / "run"
    values = SMALL | {"paths": [text]}
    before = windows_of(folder, monkeypatch, lambda: start(folder, values))
    steps = {"steps": 4 + (2800 // 24 - 8) * 24 // (24 * 16)}
    after = windows_of(folder, monkeypatch, lambda: resume(folder, steps | change))
    tokens = [token for window in (*before, *after) for token in window]
    corpus = resume(folder, {}).corpus
    whole = bytes(x % 256 for x in corpus.train.tolist())
    size = min(len(tokens), units(corpus, 24) * 24)
    places = []
    for window in (*before, *after):  # where in the text each piece of 7 lies
        for at in range(0, len(window) - 6, 7):
            places.append(whole.find(bytes(x % 256 for x in window[at : at + 7])))
    known = [place for place in places[: size // 7 - 8] if place >= 0]
    assert len(known) > 0.5 * len(places[: size // 7 - 8])
    covered = [p + k for p in known for k in range(7)]
    assert len(set(covered)) == len(covered)


def test_a_checkpoint_without_a_position_goes_on_as_it_would(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last version wrote it: the same weights to the bit."""
    values = SMALL | {"paths": [text]}
    list(train(start(tmp_path / "whole", values | {"steps": 8}), Placement("cpu")))
    list(train(start(tmp_path / "old", values | {"steps": 8, "save_every": 1}), Placement("cpu")))
    old = tmp_path / "old"
    steps = sorted((old / "checkpoints").iterdir())
    for path in steps[-1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()

    def forget(meta: dict[str, Any]) -> None:
        del meta["position"]

    change_meta(steps[-2], forget)
    list(train(resume(old, {}), Placement("cpu")))
    a, b = (checkpoint.load(f).tensors("model") for f in (tmp_path / "whole", old))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch", "4"], ["--batch: 2 before, 4 from here on"]),
        (["--accumulate", "3"], ["--accumulate: 1 before, 3 from here on"]),
        (["--context", "12"], ["--context: 24 before, 12", "the epoch that has begun"]),
        (["--steps", "8"], ["--steps: 4 before, 8", "the learning rate goes on at"]),
        (["--seconds", "1"], ["--steps: 4 before, not given", "--seconds: not given before, 1.0"]),
        (["--lr", "1e-4"], ["--lr: 0.0025 before, 0.0001", "the learning rate goes on at 1e-05"]),
        (["--batch", "2", "--steps", "4"], []),
        ([], []),
    ],
)
def test_what_a_resume_changes_is_printed(
    run: Path,
    words: list[str],
    parts: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run_command(["train", "--out", str(run), "--resume", *words]) == 0
    said = capfd.readouterr().out
    assert all(part in said for part in parts), said
    assert ("changed" in said) == bool(parts)


# ------------------------------------------------------------------------------- what is refused


def line_of(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command that exits with 2 says why."""
    capfd.readouterr()
    assert cli.run_command(words) == 2
    said = capfd.readouterr().err
    assert said.startswith("tfla: ") and said.count("\n") == 1, said
    return said


def shorter(moments: dict[str, Tensor]) -> None:
    moments["head.weight/exp_avg"] = moments["head.weight/exp_avg"].flatten()[:7].clone()


def one_number(moments: dict[str, Tensor]) -> None:
    moments["head.weight/exp_avg_sq"] = torch.zeros(1)


def transposed(moments: dict[str, Tensor]) -> None:
    moments["head.weight/exp_avg"] = moments["head.weight/exp_avg"].T.contiguous()


def half(moments: dict[str, Tensor]) -> None:
    moments["head.weight/exp_avg_sq"] = moments["head.weight/exp_avg_sq"].half()


def whole_numbers(moments: dict[str, Tensor]) -> None:
    moments["head.weight/exp_avg"] = moments["head.weight/exp_avg"].int()


def missing(moments: dict[str, Tensor]) -> None:
    del moments["head.weight/exp_avg"]


def all_missing(moments: dict[str, Tensor]) -> None:
    for name in [name for name in moments if not name.startswith("random")]:
        del moments[name]


def left_over(moments: dict[str, Tensor]) -> None:
    moments["other.weight/exp_avg"] = torch.zeros(3)


def other_moment(moments: dict[str, Tensor]) -> None:
    moments["head.weight/max_exp_avg_sq"] = torch.zeros(257, 16)


def no_field(moments: dict[str, Tensor]) -> None:
    moments["head.weight"] = torch.zeros(257, 16)


def step_of_many(moments: dict[str, Tensor]) -> None:
    moments["head.weight/step"] = torch.full((257, 16), 4.0)


def another_step(moments: dict[str, Tensor]) -> None:
    moments["head.weight/step"] = torch.tensor(-1.0)


def no_generator(moments: dict[str, Tensor]) -> None:
    del moments["random/cpu"]


def short_generator(moments: dict[str, Tensor]) -> None:
    moments["random/cpu"] = moments["random/cpu"][:100].clone()


def broken_generator(moments: dict[str, Tensor]) -> None:
    moments["random/cpu"] = torch.full_like(moments["random/cpu"], 255)


MOMENTS = [
    shorter,
    one_number,
    transposed,
    half,
    whole_numbers,
    missing,
    all_missing,
    left_over,
    other_moment,
    no_field,
    step_of_many,
    another_step,
    no_generator,
    short_generator,
    broken_generator,
]


@pytest.mark.parametrize("harm", MOMENTS)
def test_moments_that_are_not_the_parameters_own_are_one_line(
    run: Path, harm: Callable[[dict[str, Tensor]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Fused AdamW would read beyond them: a crash, or what lies behind them in memory."""
    path = checkpoint.load(run).path
    moments = load_file(path / "optimizer.safetensors")
    harm(moments)
    save_file(moments, path / "optimizer.safetensors")
    seal_files(path)
    assert str(path) in line_of(["train", "--out", str(run), "--resume", "--steps", "6"], capfd)


def test_moments_that_are_no_numbers_are_told(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.load(run).path
    moments = load_file(path / "optimizer.safetensors")
    moments["head.weight/exp_avg_sq"][3] = float("nan")
    save_file(moments, path / "optimizer.safetensors")
    seal_files(path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.run_command(["train", "--out", str(run), "--resume", "--steps", "6"])
    err = capfd.readouterr().err
    assert "warning" in err and "head.weight/exp_avg_sq hold numbers that are not finite" in err


OTHER: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("wider", lambda m: m["config"].update(hidden_size=32)),
    ("deeper", lambda m: m["config"].update(num_layers=2)),
    ("enormous", lambda m: m["config"].update(hidden_size=2_000_000)),
    ("a million blocks", lambda m: m["config"].update(num_layers=1_000_000)),
    ("beyond floats", lambda m: m["config"].update(hidden_size=10**400)),
    ("fewer words", lambda m: m["config"].update(vocab_size=256)),
    ("sigmoid", lambda m: m["config"].update(input_gate="relu")),
    ("no config", lambda m: m.pop("config")),
    ("a list", lambda m: m.update(config=[])),
    ("other fields", lambda m: m["config"].update(more=1)),
    ("no options", lambda m: m.pop("options")),
    ("options none", lambda m: m.update(options=None)),
    ("half a batch", lambda m: m["options"].update(batch=1.5)),
    ("a text", lambda m: m["options"].update(lr="high")),
    ("unknown option", lambda m: m["options"].update(more=1)),
    ("no step", lambda m: m.pop("step")),
    ("step -1", lambda m: m.update(step=-1)),
    ("step true", lambda m: m.update(step=True)),
    ("elapsed", lambda m: m.update(elapsed="long")),
    ("no lr", lambda m: m["options"].update(lr=None)),
    ("lr a text", lambda m: m["options"].update(lr="0.1")),
    ("clip a list", lambda m: m["options"].update(clip=[1.0])),
    ("warmup true", lambda m: m["options"].update(warmup=True)),
    ("no data", lambda m: m.pop("data")),
    ("position", lambda m: m.update(position=4)),
    ("position none", lambda m: m["position"].pop("unit")),
    ("unit 0", lambda m: m["position"].update(unit=0)),
    ("unit too large", lambda m: m["position"].update(unit=10**9)),
    ("beyond the epoch", lambda m: m["position"].update(offset=10**9)),
    ("negative", lambda m: m["position"].update(offset=-1)),
]


@pytest.mark.parametrize("harm", [x for _, x in OTHER], ids=[name for name, _ in OTHER])
def test_a_description_of_another_kind_is_one_line(
    run: Path, harm: Callable[[dict[str, Any]], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    change_meta(checkpoint.load(run).path, harm)
    line_of(["train", "--out", str(run), "--resume", "--steps", "6"], capfd)


@pytest.mark.parametrize(
    "words", [["--hidden-size", "32"], ["--num-layers", "2"], ["--context", "100000"]]
)
def test_another_model_or_a_window_beyond_the_text_is_one_line(
    run: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    line_of(["train", "--out", str(run), "--resume", *words], capfd)
    list(train(resume(run, {"steps": 5}), Placement("cpu")))  # and the run is not in use


@pytest.mark.parametrize("option", ["batch", "context", "steps", "seed", "save_every"])
@pytest.mark.parametrize("value", [1.5, True, "8", np.float32(3)])
def test_options_that_are_no_whole_numbers_are_named(option: str, value: object) -> None:
    with pytest.raises(RunError, match=f"--{option.replace('_', '-')} is .*; it must be a whole"):
        TrainOptions(**{"steps": 3, option: value})


def test_a_model_that_is_nan_is_an_error_not_a_text(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint.load(run).path
    weights = load_file(path / "model.safetensors")
    weights["head.weight"][3] = float("nan")
    save_file(weights, path / "model.safetensors")
    seal_files(path)
    with pytest.warns(UserWarning, match=r"head\.weight hold numbers that are not finite"):
        load_writer(run)
    assert "logits are not finite" in line_of(["generate", str(run), "x"], capfd)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.run_command(["train", "--out", str(run), "--resume", "--steps", "6"]) == 2
    said = capfd.readouterr().err
    form = r"tfla: warning: .*head\.weight hold .*\ntfla: the loss is nan .*\n"
    assert re.fullmatch(form, said), said
    weights["head.weight"][3] = 0.0
    weights["embedding.weight"][77] = float("inf")  # a letter that is not in the text
    save_file(weights, path / "model.safetensors")
    seal_files(path)
    assert cli.run_command(["generate", str(run), "x", "--tokens", "1", "--temperature", "0"]) == 0
    said = capfd.readouterr().err
    assert re.fullmatch(r"tfla: warning: .*embedding\.weight hold numbers .*\n", said), said


def test_the_run_is_in_use_until_training_ends(run: Path) -> None:
    more = train(resume(run, {"steps": 8}), Placement("cpu"))
    next(more)
    with pytest.raises(RunError, match="is in use by process"):
        resume(run, {})
    more.close()
    resume(run, {})
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")][:4] == [1, 2, 3, 4]
