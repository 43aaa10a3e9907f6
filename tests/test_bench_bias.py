"""tfla bench bias: only the bias differs, and what is recorded is what training did."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tfla.bench import bias as trainings
from tfla.bench import report, runs
from tfla.bench.bias import BiasStudy, Watched
from tfla.bench.runs import Row, Task
from tfla.cli import run_command
from tfla.xlstm import XLSTM, XLSTMConfig

CPU = torch.device("cpu")
MODEL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "norm_eps": 1e-6}
OPTIONS = {"steps": 4, "context": 16, "batch": 2, "lr": 1e-2, "eval_bytes": 200}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{number}: what is read here, and what is not. " * 9)
    return folder


def task_of(texts: Path, bias: float, **fields: Any) -> Task:
    study = BiasStudy((texts,), MODEL, OPTIONS | fields.pop("options", {}), bias)
    return Task("bias", "cpu", "fp32", ("tfla exp", "tfla sigmoid"), work=study, **fields)


def rows_of(task: Task) -> list[Row]:
    told: list[tuple[Any, ...]] = []
    trainings.bias(task, CPU, lambda *message: told.append(message))
    return [message[1] for message in told if message[0] == "row"]


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_only_the_bias_of_the_input_gate_differs(gate: str) -> None:
    config = XLSTMConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, input_gate=gate)
    torch.manual_seed(5)
    plain = dict(XLSTM(config).named_parameters())
    torch.manual_seed(5)
    other = dict(Watched(CPU, -3.5).build(config, "fp32").named_parameters())
    assert plain.keys() == other.keys()
    for name, value in other.items():
        expected = plain[name].detach().clone()
        if name.endswith("gates.bias"):
            assert (expected[:2] == -10).all()
            expected[:2] = -3.5
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=0)


def test_each_row_has_every_step(texts: Path) -> None:
    rows = [row for number in (0.0, -10.0) for row in rows_of(task_of(texts, number))]
    order = [(row["implementation"], row["bias"]) for row in rows]
    assert order == [(n, b) for b in (0.0, -10.0) for n in ("tfla exp", "tfla sigmoid")]
    for row in rows:
        assert row["status"] == "ok", row
        assert len(row["loss"]) == len(row["gradient_norm"]) == 4
        assert len(row["samples_ms"]) == 3 and row["bits_per_byte"] > 0
    first = [row["loss"][0] for row in rows]
    assert first[0] != first[2]
    # exp(-10) and sigmoid(-10) differ by 5e-5: the two gates begin alike.
    assert first[2] == pytest.approx(first[3], rel=1e-3)


def test_the_norm_is_that_of_all_gradients_before_clipping(texts: Path) -> None:
    """A smaller limit leaves the first norm as it is."""
    wide, tight = (rows_of(task_of(texts, -2.0, options={"clip": clip}))[0] for clip in (1e6, 1e-3))
    assert wide["gradient_norm"][0] == tight["gradient_norm"][0] > 1e-3


def test_the_same_seed_is_the_same_training(texts: Path) -> None:
    a, b = (rows_of(task_of(texts, -5.0))[0] for _ in range(2))
    assert a["loss"] == b["loss"] and a["gradient_norm"] == b["gradient_norm"]
    other = rows_of(task_of(texts, -5.0, options={"seed": 1}))[0]
    assert other["loss"] != a["loss"]


def test_texts_too_short_are_a_line_with_the_reason(texts: Path) -> None:
    for row in rows_of(task_of(texts, -2.0, options={"context": 10**6})):
        assert row["status"] == "failed" and "RunError" in row["reason"]
        assert report.median(row) is None
    _, below = report.remarks([row], {})
    assert len(below) == 1 and "window" in below[0]


def test_late_trainings_are_left_out_and_said(texts: Path) -> None:
    rows = list(runs.work_off([task_of(texts, -2.0, until=0.0)], 60.0))
    assert [(row["status"], row["bias"]) for row in rows] == [("skipped", -2.0)] * 2
    assert "2 blocks of width 16" in report.title(rows[0])


def test_by_command(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"bench bias {texts} --steps 3 --hidden-size 16 --num-layers 1 --num-heads 2"
    words += f" --context 16 --batch 2 --biases=-2,-10 --device cpu --out {tmp_path / 'out'}"
    assert run_command(words.split()) == 0
    found = report.load(tmp_path / "out" / "bias.json")
    assert [row["bias"] for row in found["rows"]] == [-2, -10] * 2
    assert str(texts) not in (tmp_path / "out" / "bias.json").read_text()
    assert (tmp_path / "out" / "bias-bias.svg").is_file()
    path = str(tmp_path / "out" / "bias.json")
    assert run_command(["bench", "compare", path, path]) == 0
    assert "in 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nowhere", "nowhere does not exist"),
        ("--biases x", "--biases is x; it must be numbers"),
        ("--biases=-2,-2", "it must be different numbers"),
        ("--biases nan", "it must be finite numbers"),
        ("--steps 0", "--steps is 0; it must be above 0"),
        ("--context 0", "--context is 0"),
        ("--num-heads 3", "num_heads"),
        ("--eps 0", "norm_eps"),
        ("--eps nan", "norm_eps"),
        ("--lr nan", "--lr is nan"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_command(f"bench bias {words} --device cpu --out {out}".split()) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not out.exists()
