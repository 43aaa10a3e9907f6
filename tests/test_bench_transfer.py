"""tfla bench transfer: what is measured is the function, and what is derived is what is measured.

The laws are held against independent draws; each allowance is five standard errors of the mean
over the draws, so a law that is off by more is seen, and no number was chosen by looking.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tfla
from tfla.bench import plots, report, runs, transfer
from tfla.bench.cases import Shape
from tfla.bench.runs import Row, Task
from tfla.bench.transfer import VARIANTS, Variant
from tfla.cli import run_command

CPU = torch.device("cpu")
EXP = VARIANTS["tfla exp, not normalised"]


def draw(N: int, T: int, K: int, V: int, log_i: float, log_f: float) -> tuple[Tensor, Tensor]:
    """h without the normaliser and v, (N, T, V), of N independent sequences in fp64."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(N, T, 1, width, generator=g, dtype=torch.float64) for width in (K, K, V))
    gates = (torch.full((N, T, 1), x, dtype=torch.float64) for x in (log_f, log_i))
    h, _ = tfla.linear_attention(q, k, v, *gates)
    return h[:, :, 0], v[:, :, 0]


def deviation(found: Tensor, expected: Tensor | float) -> float:
    """Of the mean over the first axis, in standard errors; the largest of the other axes."""
    error = found.std(0) / len(found) ** 0.5
    return ((found.mean(0) - expected).abs() / error).max().item()


LAWS = [
    (4000, 12, 1, 3, 0.0, -0.3),  # one channel of q and k
    (4000, 12, 4, 3, -2.0, -0.05),
    (4000, 12, 16, 3, 1.5, -3.0),
    (4000, 12, 4, 1, 0.0, 0.0),  # nothing is forgotten: the sum counts tokens
    (4000, 5, 4, 3, 0.5, -math.inf),  # everything is: one token
]


@pytest.mark.parametrize(("N", "T", "K", "V", "log_i", "log_f"), LAWS)
def test_the_variance_of_h_is_a_geometric_sum(
    N: int, T: int, K: int, V: int, log_i: float, log_f: float
) -> None:
    """Exact for any K, at every token."""
    h, _ = draw(N, T, K, V, log_i, log_f)
    decay = math.exp(2 * log_f)
    t = torch.arange(1, T + 1, dtype=torch.float64)
    sums = t if log_f == 0 else (1 - decay**t) / (1 - decay)
    expected = transfer.expected_square(log_i, log_f, T)
    torch.testing.assert_close(expected, math.exp(2 * log_i) * sums)
    assert deviation(h.square().mean(-1), expected) < 5
    assert deviation(h.mean(-1), 0.0) < 5


@pytest.mark.parametrize(("N", "T", "K", "V", "log_i", "log_f"), LAWS)
def test_the_gain_is_the_exact_one(
    N: int, T: int, K: int, V: int, log_i: float, log_f: float
) -> None:
    """For any K, V and T, not only for large ones: the gain over many draws, by the delta method
    for the error of a ratio of means."""
    h, v = draw(N, T, K, V, log_i, log_f)
    top, below = (x.abs().amax(-1).mean(-1) for x in (h, v))
    exact = transfer.expected_gain(log_i, log_f, T, K)
    assert deviation(top - exact * below, 0.0) < 5


def test_the_gain_of_one_token_is_known_by_hand() -> None:
    """E|s q . k| = E|s q| sqrt(2 / pi), and E|q| = sqrt(2 / pi) for K = 1."""
    for T in (1, 7):
        found = transfer.expected_gain(-1.0, -math.inf, T, 1)
        assert found == pytest.approx(math.exp(-1) * 2 / math.pi, rel=1e-10)
    # Two equal weights: the root of a chi-squared number with two degrees has mean sqrt(pi / 2).
    both = 2 * transfer.expected_gain(0.0, 0.0, 2, 1) - 2 / math.pi
    assert both == pytest.approx(1.0, rel=1e-10)
    assert transfer.mean_norm(64) == pytest.approx(1 - 1 / 256, rel=1e-4)


@pytest.mark.parametrize("log_f", [-5.0, -0.7, -0.05, -1e-3, 0.0])
@pytest.mark.parametrize("K", [1, 8, 128])
def test_the_gain_lies_between_its_bounds_and_tends_to_the_root_of_the_sum(
    K: int, log_f: float
) -> None:
    T = 300
    root = transfer.expected_square(0.0, log_f, T).sqrt().mean().item()
    share = transfer.expected_gain(0.0, log_f, T, K) / (root * transfer.mean_norm(K))
    assert math.sqrt(2 / math.pi) - 1e-9 <= share <= 1
    kept = min(T, 1 / -math.expm1(2 * log_f)) if log_f else T  # tokens in the sum
    assert 1 - share < 1 / kept


def test_the_gain_is_a_factor_of_the_input_gate() -> None:
    values = [transfer.expected_gain(x, -0.1, 50, 8) * math.exp(-x) for x in (-12.0, 0.0, 8.0)]
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])


@pytest.mark.parametrize("eps", [1e-2, 1e-4])
def test_after_the_norm_the_border_is_at_the_root_of_eps(eps: float) -> None:
    """An asymptote in V, K and the tokens kept: 1 / sqrt(2) where the gain before is sqrt(eps)."""
    T, K, V, log_f = 800, 256, 512, -0.02
    unit = transfer.expected_gain(0.0, log_f, T, K)
    for factor in (0.1, 1.0, 10.0):
        log_i = math.log(factor * eps**0.5 / unit)
        h, v = draw(1, T, K, V, log_i, log_f)
        before, after = (x.item() for x in transfer.gains(h[:, :, None], v[:, :, None], [eps]))
        assert before == pytest.approx(factor * eps**0.5, rel=0.03)
        assert after == pytest.approx(factor / math.hypot(factor, 1), rel=0.03)
        limit = transfer.expected_gain_after(log_i, log_f, T, eps)
        assert after == pytest.approx(limit, rel=0.02)


def test_after_the_norm_the_limit_counts_each_token_by_itself() -> None:
    """Where nothing is forgotten the first tokens are suppressed when the last ones pass."""
    T, K, V, eps = 400, 256, 512, 1e-2
    log_i = math.log(eps**0.5 / transfer.expected_gain(0.0, 0.0, T, K))
    h, v = draw(1, T, K, V, log_i, 0.0)
    _, after = (x.item() for x in transfer.gains(h[:, :, None], v[:, :, None], [eps]))
    assert after == pytest.approx(transfer.expected_gain_after(log_i, 0.0, T, eps), rel=0.02)
    assert after < 0.68  # not 1 / sqrt(2)


def test_one_token_comes_out_of_the_normaliser_as_it_went_in() -> None:
    """h = w v / max(|w|, 1) is v or -v where |w| > 1, and nothing larger."""
    i, f = [-12.0, 2.0, 40.0], -60.0
    task = grid(input_gates=(-12.0, 2.0, 40.0), forget_gates=(f,))
    inputs = transfer._draw(task, 0, torch.float32, CPU)
    h = transfer._cell(VARIANTS["tfla exp, normalised"], inputs, i, f)
    before = transfer.gains(h, inputs[2], [])[0]
    assert before[2].item() == pytest.approx(1.0, rel=1e-6)
    assert before[0] < 1e-4 and before[1] < 1


def test_with_the_normaliser_the_gain_grows_as_a_logarithm() -> None:
    """n . s q has the variance r^2 that h has, so E[r / max(|n . s q|, 1)] over a normal number is
    r erf(1 / (r sqrt(2))) + E_1(1 / (2 r^2)) / sqrt(2 pi) where many tokens are kept: small r pass
    as they are, large ones as sqrt(2 / pi) log r."""
    N, T, K = 1500, 100, 32
    g = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, N, T, 1, K, generator=g)
    q = q[:, -1:].expand_as(q)
    for r in (0.1, 3.0):
        gates = torch.zeros(N, T, 1), torch.full((N, T, 1), math.log(r / T**0.5))
        h, _ = tfla.linear_attention(q, k, v, *gates, normalize=True)
        scale = h[:, -1, 0].double().square().mean(-1).sqrt()  # r over the denominator
        x = torch.linspace(0, 12, 200001, dtype=torch.float64)
        density = (-x.square() / 2).exp() * math.sqrt(2 / math.pi)
        expected = torch.trapezoid(density * r / (r * x).clamp_min(1), x).item()
        one = r * math.erf(1 / (r * math.sqrt(2)))
        z = torch.linspace(math.log(1 / (2 * r * r)), 6, 200001, dtype=torch.float64)
        e1 = torch.trapezoid((-z.exp()).exp(), z).item()
        assert expected == pytest.approx(one + e1 / math.sqrt(2 * math.pi), rel=1e-3)
        assert scale.mean().item() == pytest.approx(expected, rel=0.05)


# ------------------------------------------------------------------------------- the task


def grid(*names: str, **fields: Any) -> Task:
    common: dict[str, Any] = {
        "shape": Shape(1, 40, 1, 8, 12), "repeats": 3, "study": "gain",
        "input_gates": (-8.0, -2.0, 4.0), "forget_gates": (-3.0, 5.0), "epsilons": (1e-2, 1e-6),
    }  # fmt: skip
    return Task("transfer", "cpu", "fp32", names, **(common | fields))


def rows_of(task: Task) -> list[Row]:
    told: list[tuple[Any, ...]] = []
    transfer.transfer(task, CPU, lambda *message: told.append(message))
    return [message[1] for message in told if message[0] == "row"]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_number_of_the_grid_is_the_gain_of_its_gates(name: str) -> None:
    """Against the public functions, one pair of gates at a time."""
    task = grid(name, repeats=2)
    [row] = rows_of(task)
    assert row["status"] == "ok" and row["draws"] == 2 and row["errors"]["h"] < 1e-5
    variant = VARIANTS[name]
    for y, f in enumerate(task.forget_gates):
        for x, i in enumerate(task.input_gates):
            found = torch.zeros(3, dtype=torch.float64)
            for turn in range(2):
                q, k, v = transfer._draw(task, turn, torch.float32, CPU)
                gates = (torch.full((1, 40, 1), gate) for gate in (i, f))
                gate, normalize = variant
                h, _ = tfla.mlstm(q, k, v, *gates, input_gate=gate, normalize=normalize)  # type: ignore[arg-type]
                h = h.double()
                normed = [
                    (h - h.mean(-1, keepdim=True))
                    / (h.var(-1, correction=0, keepdim=True) + eps).sqrt()
                    for eps in task.epsilons
                ]
                sizes = [z.abs().amax(-1).mean() for z in (h, *normed)]
                found += torch.stack(sizes) / v.abs().amax(-1).double().mean() / 2
            stored = [row["before"][y][x], *(after[y][x] for after in row["after"])]
            assert stored == pytest.approx(found.tolist(), rel=1e-4)


def test_a_wrong_operator_has_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    right = transfer._cell

    def wrong(variant: Variant, *rest: Any) -> Tensor:
        return right(variant, *rest) * (1.001 if variant.normalize else 1.0)

    monkeypatch.setattr(transfer, "_cell", wrong)
    rows = {row["implementation"]: row for row in rows_of(grid(*VARIANTS))}
    assert {name: row["status"] for name, row in rows.items()} == {
        name: "WRONG" if variant.normalize else "ok" for name, variant in VARIANTS.items()
    }
    assert "before" not in rows["tfla exp, normalised"]


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        ([0.1, 0.5, 0.9], 5.0),
        ([0.1, 0.7, 0.7], 4.0),
        ([0.9, 0.9, 0.9], None),  # passes everywhere
        ([0.1, 0.1, 0.1], None),
        ([0.9, 0.1, 0.7], 6.0),  # it must rise
    ],
)
def test_the_border_lies_between_two_gates(gain: list[float], expected: float | None) -> None:
    assert transfer.border([2.0, 4.0, 6.0], gain, 0.7) == expected
    assert transfer.border([2.0, 7.0, 12.0], gain, 0.7) is None  # too coarse to tell


def test_a_draw_too_late_is_left_out() -> None:
    [row] = rows_of(grid("tfla exp, normalised", until=0.0))
    assert row["draws"] == 1 and "standard_error" not in row
    assert len(report.cells(row, {})) == len(report.COLUMNS["transfer"])


def test_rows_of_a_process_that_died_have_a_table() -> None:
    late = list(runs.work_off([grid(*VARIANTS, until=0.0)], 60.0))
    assert [row["status"] for row in late] == ["skipped"] * 4
    assert "2 x 3 gates" in report.title(late[0])


# ------------------------------------------------------------------------------- the page


def test_the_page_states_what_its_result_holds() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page, rows = (
        (docs / "performance/transfer.md").read_text(),
        report.load(docs / "results/transfer.json")["rows"],
    )
    for row in rows:
        index, _ = report.shown_forget_gate(row)
        borders = [transfer.border(row["i"], after[index]) for after in row["after"]]
        at = [row["before"][index][row["i"].index(i)] for i in (-10, 0, 8)]
        name = row["implementation"].removeprefix("tfla ")
        words = [name, *(f"{x:.1f}" for x in borders), f"{at[0]:.5f}", f"{at[1]:.1f}"]
        assert f"| {' | '.join(words)} | " in page
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert float(line.split("|")[-2].replace(",", "")) == pytest.approx(at[2], rel=0.02)
        if "expected_off" in row:
            assert f"{row['expected_off']:.1%} off" in page


# ------------------------------------------------------------------------------- the command

WORDS = "--tokens 24 --head-dim 4 --step 4 --draws 2 --device cpu --seconds 3600 --limit 900"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transfer")
    assert run_command(["bench", "transfer", *WORDS.split(), "--out", str(out)]) == 0
    return out


def test_a_run_leaves_a_table_a_result_and_both_figures(run: Path) -> None:
    found = report.load(run / "transfer.json")
    assert [row["implementation"] for row in found["rows"]] == list(VARIANTS)
    for row in found["rows"]:
        assert row["status"] == "ok" and row["shape"] == dict(B=1, T=24, H=1, K=4, V=4)
        assert row["i"] == [-12, -8, -4, 0, 4, 8] and row["f"] == [-5, -1, 3, 7, 11]
        assert [len(after) for after in row["after"]] == [5, 5, 5]
        assert ("expected" in row) == ("not" in row["implementation"])
    for name in ("gain", "border"):
        assert (run / f"transfer-{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (run / f"transfer-{name}.svg").read_text()
    again = plots.draw(found, run)
    assert len(again) == 4


def test_two_runs_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(run / "transfer.json")
    assert run_command(["bench", "compare", path, path]) == 0
    assert "0 regressions beyond 5% in 4 rows" in capsys.readouterr().out


def test_the_gain_of_both_gates_is_one_where_both_are_small(run: Path) -> None:
    """sigmoid(i) is exp(i) there, and the denominator is 1."""
    lines = [row["before"] for row in report.load(run / "transfer.json")["rows"]]
    first = torch.tensor([line[0][0] for line in lines])
    torch.testing.assert_close(first, first[0].expand(4), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--tokens 0", "--tokens is 0; it must be 1 or more"),
        ("--head-dim 1", "--head-dim is 1; it must be 2 or more"),
        ("--draws 0", "--draws is 0; it must be 1 or more"),
        ("--input-gate 8,-12", "--input-gate is 8,-12; it must be two numbers"),
        ("--input-gate=-12", "--input-gate is -12; it must be two numbers"),
        ("--forget-gate x,1", "--forget-gate is x,1; it must be numbers"),
        ("--forget-gate=-inf,1", "--forget-gate is -inf,1; it must be finite numbers"),
        ("--forget-gate 0,90", "--forget-gate is 0,90; it must be two numbers from -60 to 60"),
        ("--step 0", "--step is 0; it must be at most 20"),
        ("--step 18", "--step is 18; it must be at most 17, the range of --forget-gate"),
        ("--step nan", "--step is nan"),
        ("--step 0.0001", "at least 0.1"),
        ("--eps 0", "--eps is 0; it must be one to four numbers above 0"),
        ("--eps 1,1,1,1,1", "one to four numbers"),
        ("--eps nan", "--eps is nan; it must be finite numbers"),
        ("--peers none", "No such option"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"bench transfer {words} --device cpu --out {tmp_path}"
    assert run_command(words.split()) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_widest_gates_are_finite(tmp_path: Path) -> None:
    """From exp(-60) to exp(60), in fp32, through a norm."""
    task = grid(*VARIANTS, input_gates=(-60.0, 0.0, 60.0), forget_gates=(-60.0, 60.0))
    for row in rows_of(replace(task, shape=Shape(1, 300, 1, 64, 64), repeats=1)):
        assert row["status"] == "ok", row
        values = torch.tensor([row["before"], *row["after"]])
        assert values.isfinite().all() and (values > 0).all()
