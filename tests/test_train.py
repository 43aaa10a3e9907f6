"""Training: the same losses after any interruption, the right mean, the right schedule."""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tfla.xlstm import XLSTM, checkpoint, files
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.data import Codec, open_corpus, prepare
from tfla.xlstm.run import TrainOptions, resume, start
from tfla.xlstm.train import (
    MetricsLog,
    Placement,
    TrainState,
    evaluate,
    read_metrics,
    train,
)
from tfla.xlstm.writer import _until, load_writer

MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
SMALL = MODEL | {"context": 24, "batch": 2, "log_every": 1, "eval_every": 4, "save_every": 5}
SMALL |= {"eval_bytes": 500, "steps": 12}
CPU = torch.device("cpu")


def go(folder: Path, text: Path, **values: Any) -> list[dict[str, Any]]:
    """A whole run."""
    return list(train(start(folder, SMALL | {"paths": [text]} | values), Placement("cpu")))


def numbers(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be the same in every run: all but the clock."""
    fields = ("event", "step", "loss", "lr", "bits_per_byte")
    return [tuple(r.get(name) for name in fields) for r in records if r["event"] != "save"]


def weights(folder: Path) -> bytes:
    return (checkpoint.load(folder).path / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("stop", [1, 7, 10, 12])
def test_a_resumed_run_continues_to_the_same_bits(
    text: Path, tmp_path: Path, gate: str, stop: int
) -> None:
    whole = go(tmp_path / "whole", text, input_gate=gate)
    broken = tmp_path / "broken"
    begun = train(start(broken, SMALL | {"paths": [text], "input_gate": gate}), Placement("cpu"))
    for record in begun:
        if record["step"] == stop:
            break
    begun.close()
    torch.manual_seed(99)  # another process, another state of the generator
    list(train(resume(broken, {}), Placement("cpu")))
    assert numbers(read_metrics(broken / "metrics.jsonl")) == numbers(whole)
    assert weights(broken) == weights(tmp_path / "whole")


def test_the_state_of_the_generator_is_part_of_a_checkpoint(text: Path, tmp_path: Path) -> None:
    run = start(tmp_path, SMALL | {"paths": [text], "steps": 5})
    list(train(run, Placement("cpu")))
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(train(resume(tmp_path, {}), Placement("cpu")))
    assert torch.equal(torch.rand(3), expected)


def command(folder: Path, text: Path, *rest: str) -> list[str]:
    options = {**SMALL, "steps": 60, "save_every": 1, "eval_every": 20}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    words = itertools.chain.from_iterable(pairs)
    return [sys.executable, "-m", "tfla", "train", str(text), "--out", str(folder), *words, *rest]


def test_kill_9_at_any_moment(text: Path, tmp_path: Path) -> None:
    """Three kills: before the first checkpoint, and twice while steps and checkpoints alternate."""
    environment = {**os.environ, "TERM": "dumb"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run(folder: Path, *rest: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(folder, text, *rest),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    reference = run(whole)
    for reach in (0, 10, 30):
        process = run(killed, "--resume")
        limit = time.monotonic() + 900
        while process.poll() is None and time.monotonic() < limit:
            records = read_metrics(killed / "metrics.jsonl")
            if (records[-1]["step"] if records else 0) >= reach and (killed / "data").exists():
                break
            time.sleep(0.001)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    torn = files.partial_folder(killed / "checkpoints" / ".step-00000031.1.tmp")
    (torn / "model.safetensors").write_bytes(b"torn")
    last = run(killed, "--resume")
    for process in (last, reference):
        said = process.communicate(timeout=900)[0]
        assert process.returncode == 0, said
    assert not torn.exists()
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, 61))
    assert numbers(read_metrics(killed / "metrics.jsonl")) == numbers(lines)
    assert weights(killed) == weights(whole)


def test_metrics_after_the_checkpoint_and_half_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"event": "eval", "step": step, "progress": 0.1, "elapsed": 0.2, "bits_per_byte": 8.0}
        for step in (1, 2, 3)
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines) + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    MetricsLog(path, 2).write(records[2] | {"new": True})
    assert read_metrics(path) == [*records[:2], records[2] | {"new": True}]
    MetricsLog(path, 0)
    assert read_metrics(path) == []


def test_a_longer_run_may_follow_and_a_finished_one_does_nothing(
    text: Path, tmp_path: Path
) -> None:
    go(tmp_path, text)
    assert list(train(resume(tmp_path, {}), Placement("cpu"))) == []
    more = resume(tmp_path, {"steps": 15, "lr": 1e-3})
    assert more.options.steps == 15 and more.options.lr == 1e-3
    steps = [r["step"] for r in train(more, Placement("cpu")) if r["event"] == "train"]
    assert steps == [13, 14, 15]
    by_clock = resume(tmp_path, {"seconds": 1e9})
    assert by_clock.options.steps is None


@pytest.mark.parametrize(
    "change", [{"hidden_size": 32}, {"held_out": 0.1}, {"paths": []}, {"input_gate": "sigmoid"}]
)
def test_a_run_cannot_change_what_it_is(text: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    own = {"hidden_size": 16, "held_out": 0.05, "paths": [text], "input_gate": "exp"}
    next(train(start(tmp_path, SMALL | own), Placement("cpu")))
    assert resume(tmp_path, own).config.hidden_size == 16
    [name] = change
    what = "files to train on are" if name == "paths" else f"--{name.replace('_', '-')} is"
    with pytest.raises(RunError, match=f"{what} not what the run"):
        resume(tmp_path, change)
    with pytest.raises(RunError, match="holds a run already; add --resume"):
        start(tmp_path, SMALL | {"paths": [text]})


# ------------------------------------------------------------------------------- arithmetic


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_runs_may_share_a_corpus(text: Path, tmp_path: Path) -> None:
    alone = go(tmp_path / "alone", text)
    corpus = prepare([text], tmp_path / "shared")
    for name in ("a", "b"):
        run = start(tmp_path / name, SMALL, corpus=corpus)
        assert numbers(list(train(run, Placement("cpu")))) == numbers(alone)
        assert not (tmp_path / name / "data").exists()
    longer = resume(
        tmp_path / "a", {"steps": 14}, corpus=open_corpus(corpus.folder, corpus.fingerprint)
    )
    assert [r["step"] for r in train(longer, Placement("cpu")) if r["event"] == "train"] == [13, 14]
    other = prepare([text / "decoder.py"], tmp_path / "other")
    with pytest.raises(RunError, match="not the corpus that the run"):
        resume(tmp_path / "b", {}, corpus=other)


@pytest.mark.usefixtures("double")
def test_accumulation_equals_a_bigger_batch(text: Path, tmp_path: Path) -> None:
    runs = {}
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        folder = tmp_path / f"{batch}"
        records = go(folder, text, batch=batch, accumulate=accumulate, steps=4, clip=0.3)
        model = checkpoint.load(folder).tensors("model")
        runs[batch] = [r["loss"] for r in records if r["event"] == "train"], model
    for losses, model in (runs[2], runs[1]):
        assert losses == pytest.approx(runs[8][0], rel=1e-12)
        for name, weight in model.items():
            torch.testing.assert_close(weight, runs[8][1][name], rtol=1e-9, atol=1e-12)


def test_clipping_bounds_the_gradient(text: Path, tmp_path: Path) -> None:
    class Watched(Placement):
        def clip(self, state: TrainState, loss: Any, largest: float) -> torch.Tensor:
            found = super().clip(state, loss, largest)
            grads = [p.grad for p in state.parameters.values()]
            seen.append((float(found[1]), math.sqrt(sum(float(g.square().sum()) for g in grads))))
            return found

    seen: list[tuple[float, float]] = []
    list(train(start(tmp_path, SMALL | {"paths": [text], "clip": 0.5}), Watched("cpu")))
    assert len(seen) == 12 and max(before for before, _ in seen) > 0.5
    assert all(after == pytest.approx(min(before, 0.5), rel=1e-4) for before, after in seen)


def test_only_matrices_decay() -> None:
    from tfla.xlstm import XLSTMConfig

    model = XLSTM(XLSTMConfig(vocab_size=257, **MODEL))
    state = TrainState(model, TrainOptions(steps=1, weight_decay=0.3), Placement("cpu"))
    decayed, rest = state.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "blocks.0.mlstm.qkvo.weight",
        "blocks.0.mlstm.out.weight",
        "blocks.0.ffn.up.weight",
        "blocks.0.ffn.down.weight",
        "head.weight",
    }
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_bits_per_byte_of_a_model_that_knows_nothing(text: Path, tmp_path: Path) -> None:
    """Every token costs log2(257) bits; the ends of documents are paid for and count no byte."""
    run = start(tmp_path, SMALL | {"paths": [text]})
    model = XLSTM(run.config)
    torch.nn.init.zeros_(model.head.weight)
    stream, raw = run.corpus.held_out(10**6)
    bits = evaluate(model, stream, len(raw), run.options, CPU)
    assert bits == pytest.approx(math.log2(257) * (len(stream) - 1) / len(raw), rel=1e-6)


@pytest.mark.parametrize("window", [None, 50])
def test_bits_per_byte_are_those_of_the_windows(
    text: Path, tmp_path: Path, window: int | None
) -> None:
    run = start(tmp_path, SMALL | {"paths": [text]})
    model = XLSTM(run.config)
    stream, raw = run.corpus.held_out(1)
    total, size = 0.0, window or SMALL["context"]
    for begin in range(0, len(stream) - 1, size):
        part = stream[begin : begin + size + 1]
        logits, _ = model(part[None, :-1])
        log_p = logits[0].detach().double().log_softmax(-1)
        total -= float(log_p.gather(1, part[1:, None]).sum()) / math.log(2)
    bits = evaluate(model, stream, len(raw), run.options, CPU, window)
    assert bits == pytest.approx(total / len(raw), rel=1e-5)


def test_training_learns(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the same line again and again\n" * 400)
    values = SMALL | {"paths": [tmp_path / "text"], "steps": 120, "lr": 2e-2, "eval_every": 120}
    records = list(train(start(tmp_path / "run", values), Placement("cpu")))
    [held_out] = [r["bits_per_byte"] for r in records if r["event"] == "eval"]
    assert held_out < 1.0
    writer = load_writer(tmp_path / "run")
    assert "".join(writer.write(b"the same line ", 15, temperature=0)) == "again and again"


def test_a_loss_that_is_no_number_ends_the_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at step [0-9]+; resume with a smaller --lr"):
        go(tmp_path, text, lr=1e30, save_every=1)
    saved = checkpoint.load(tmp_path).tensors("model")
    assert all(weight.isfinite().all() for weight in saved.values())


# ------------------------------------------------------------------------------- schedule


def test_schedule() -> None:
    options = TrainOptions(steps=1000, lr=2.0, warmup=0.1, final_lr=0.25)
    lr = [options.lr_at(options.progress(step, 0.0)) for step in range(1001)]
    assert lr[0] == pytest.approx(0.02)
    assert lr[50] == pytest.approx(1.0)
    assert lr[100] == max(lr) == pytest.approx(2.0)
    assert lr[550] == pytest.approx((2.0 + 0.5) / 2)
    assert lr[1000] == pytest.approx(0.5)
    assert lr[:101] == sorted(lr[:101]) and lr[100:] == sorted(lr[100:], reverse=True)
    constant = TrainOptions(steps=10, warmup=0.0, final_lr=1.0)
    assert {constant.lr_at(step / 10) for step in range(11)} == {constant.lr}


def test_progress_is_the_limit_that_is_nearer() -> None:
    options = TrainOptions(steps=100, seconds=50)
    assert options.progress(20, 5.0) == 0.2
    assert options.progress(20, 30.0) == 0.6
    assert options.progress(20, 51.0) == 1.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.slow  # ranks train compiled blocks in test_train_parallel.py
def test_compiled_blocks_learn_the_same(text: Path, tmp_path: Path) -> None:
    few = {"steps": 3, "eval_every": 3, "save_every": 3}
    plain = go(tmp_path / "plain", text, **few)
    run = start(tmp_path / "compiled", SMALL | {"paths": [text]} | few)
    torch.compiler.reset()
    compiled = list(train(run, Placement("cpu", compile=True)))
    for one, other in zip(plain, compiled, strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-5)


def test_a_time_budget_is_kept_and_its_schedule_ends_low(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that every look at it moves on, so that a busy machine has as many steps."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 64)
    monkeypatch.setattr("tfla.xlstm.train.time", clock)
    records = go(tmp_path, text, steps=None, seconds=2.0, eval_every=10**6, save_every=10**6)
    trained = [r for r in records if r["event"] == "train"]
    assert trained[-1]["elapsed"] >= 2.0 >= trained[-2]["elapsed"]  # 1.9996 is recorded as 2.0
    assert trained[0]["lr"] < 2.5e-4 and max(r["lr"] for r in trained) > 2.2e-3
    assert trained[-1]["lr"] < 5e-4
    assert [r["event"] for r in records[-3:]] == ["train", "eval", "save"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither --steps nor --seconds is given"),
        ({"steps": 0}, "--steps is 0; it must be above 0"),
        ({"seconds": math.inf}, "--seconds is inf; it must be above 0"),
        ({"steps": 1, "save_every": 0}, "--save-every is 0; it must be at least 1"),
        ({"steps": 1, "warmup": 1.5}, "--warmup is 1.5; it must be from 0 to 1"),
        ({"steps": 1, "lr": math.nan}, "--lr is nan; it must be above 0"),
        ({"steps": 1, "precision": "fp8"}, "--precision is fp8; it must be auto, fp32 or bf16"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError) as caught:
        TrainOptions(**values)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------- writing


def test_stop_texts_are_found_across_pieces() -> None:
    pieces = ["ab", "c\n", "\nde", "f"]
    assert "".join(_until(pieces, ("\n\n",))) == "abc"
    assert "".join(_until(pieces, ("\n\nx",))) == "abc\n\ndef"
    assert "".join(_until(pieces, ("e", "bc"))) == "a"
    assert list(_until(["a", "b"], ("x",))) == ["a", "b"]


def test_a_document_that_ends_ends_the_text(text: Path, tmp_path: Path) -> None:
    go(tmp_path, text, steps=1)
    writer = load_writer(tmp_path)
    with torch.no_grad():
        writer.model.head.weight.zero_()
        writer.model.head.weight[Codec().end] = 1e-3
        writer.model.norm.weight.zero_()
    assert len("".join(writer.write(b"x", 4000, temperature=1.0, seed=0))) < 4000


class FakeClock(Placement):
    """A placement on whose clock a step takes a minute."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.now = 0.0
        self.clock = lambda: self.now
        self.around_step = self.minute

    @contextlib.contextmanager
    def minute(self) -> Iterator[None]:
        yield
        self.now += 60.0


def test_checkpoints_come_by_the_clock_too(text: Path, tmp_path: Path) -> None:
    rare = {"steps": 12, "save_every": 1000, "eval_every": 1000}
    run = start(tmp_path / "a", SMALL | rare | {"paths": [text]})
    assert run.options.save_every_seconds == 300.0
    saved = [r["step"] for r in train(run, FakeClock()) if r["event"] == "save"]
    assert saved == [0, 5, 10, 12]
    # The minutes count from the last checkpoint, whatever made it.
    run = start(tmp_path / "b", SMALL | rare | {"paths": [text], "save_every": 4})
    saved = [r["step"] for r in train(run, FakeClock()) if r["event"] == "save"]
    assert saved == [0, 4, 8, 12]


def test_the_best_checkpoint_on_held_out_text_is_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5, 5: 3.25, 6: 6.0}
    asked: list[int] = []

    def evaluate(*_: Any) -> float:
        asked.append(len(asked) + 1)
        return bits[asked[-1]]

    monkeypatch.setattr("tfla.xlstm.train.evaluate", evaluate)
    options = SMALL | {"paths": [text], "steps": 6, "eval_every": 1, "save_every": 1}
    list(train(start(tmp_path, options | {"steps": 4}), Placement("cpu")))
    list(train(resume(tmp_path, {"steps": 6}), Placement("cpu")))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000005", "step-00000006"]
    best = checkpoint.load(tmp_path).best()
    assert best is not None and (best["step"], best["bits_per_byte"]) == (2, 3.0)
    assert checkpoint.load(tmp_path / "checkpoints" / kept[0]).meta["step"] == 2
    # Judged on other text the old best says nothing, so the next evaluation is the best.
    bits[7] = 9.0
    list(train(resume(tmp_path, {"steps": 7, "eval_bytes": 600}), Placement("cpu")))
    best = checkpoint.load(tmp_path).best()
    assert best is not None and best["step"] == 7


def test_a_placement_may_keep_no_best_checkpoint(text: Path, tmp_path: Path) -> None:
    class LastAlone(Placement):
        keep_best = False

    options = SMALL | {"paths": [text], "eval_every": 1, "save_every": 100}
    events = [r["event"] for r in train(start(tmp_path, options), LastAlone("cpu"))]
    assert events.count("eval") == 12 and events.count("save") == 2  # at the start and at the end
