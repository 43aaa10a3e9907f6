"""The benchmarks: the gate lets nothing wrong through, a failing peer is a line, numbers add up."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recurrence as oracle
import torch
from torch import Tensor

import tfla
from tfla.bench import cases, check, measure, models, plots, report, runs, scale
from tfla.bench.cases import Implementation, Leaves, Shape
from tfla.bench.runs import Row, Task
from tfla.cli import run_command
from tfla.reference import layout
from tfla.spec import CallSpec, Inputs, Options
from tfla.xlstm import XLSTMConfig

CPU = torch.device("cpu")
SHAPE = Shape(B=2, T=70, H=2, K=8, V=12)
OURS = {x.function: x for x in cases.IMPLEMENTATIONS if x.ours}
ATTENTION = next(x for x in cases.IMPLEMENTATIONS if x.name == "attention")


# ------------------------------------------------------------------------------- the gate


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def row_of_leaves(x: Implementation, shape: Shape = SHAPE) -> tuple[Leaves, Tensor]:
    """One sequence and head of leaves, and dh, in fp64."""
    leaves = x.leaves(replace(shape, B=1, H=1), torch.float64, CPU, seed=3)
    rows = {name: check._row(x.canonical(t.detach()), 0, 0) for name, t in leaves.items()}
    return rows, torch.randn(rows["v"].shape, dtype=torch.float64)


def by_autograd(h: Callable[[Leaves], Tensor], rows: Leaves, dh: Tensor) -> dict[str, Tensor]:
    x = {name: t.clone().requires_grad_() for name, t in rows.items()}
    out = h(x)
    grads = torch.autograd.grad(out, list(x.values()), dh)
    return {"h": out.detach()} | {f"d{n}": t for n, t in zip(x, grads, strict=True)}


@pytest.mark.parametrize("function", ["exp", "sigmoid", "simple"])
def test_closed_form_is_the_recurrence(function: str) -> None:
    """Two programs that share no line: values and all gradients."""

    def h(x: Leaves) -> Tensor:
        q, k, v = (x[name][None, :, None] for name in "qkv")
        gates = {name: x[name][None, :, None] for name in x.keys() - {"q", "k", "v"}}
        if function == "simple":
            return oracle.linear_attention(q, k, v, gates["log_f"])[0][0, :, 0]
        return oracle.mlstm(q, k, v, gates["i"], gates["f"], input_gate=function)[0][0, :, 0]

    x = next(x for x in cases.IMPLEMENTATIONS if x.function == function)
    rows, dh = row_of_leaves(x)
    truth = by_autograd(h, rows, dh)
    found = check.closed_form(function, rows, dh)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_closed_form_of_attention_is_attention() -> None:
    def h(x: Leaves) -> Tensor:
        q, k, v = (x[name][None, None] for name in "qkv")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0]

    rows, dh = row_of_leaves(ATTENTION)
    truth, found = by_autograd(h, rows, dh), check.closed_form("attention", rows, dh)
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def test_a_decay_a_channel_with_equal_channels_is_one_decay() -> None:
    vector = next(x for x in cases.IMPLEMENTATIONS if x.function == "vector")
    rows, dh = row_of_leaves(vector)
    one = rows["log_f"][:, 0]
    wide = check.closed_form("vector", rows | {"log_f": one[:, None].expand(-1, SHAPE.K)}, dh)
    narrow = check.closed_form("simple", rows | {"log_f": one}, dh)
    torch.testing.assert_close(wide["h"], narrow["h"])
    torch.testing.assert_close(wide["dlog_f"].sum(-1), narrow["dlog_f"])


def test_ssd_is_the_family_with_its_gates() -> None:
    """C, B, x, dt, A of state-space duality, through the public function."""
    ssd = next(x for x in cases.IMPLEMENTATIONS if x.function == "ssd")
    rows, dh = row_of_leaves(ssd, replace(SHAPE, V=64))
    q, k, v = (rows[name][None, :, None] for name in "qkv")
    dt = rows["dt"][None, :, None]
    h, _ = tfla.linear_attention(q, k, v, rows["A"] * dt, dt.log(), scale=1.0)
    torch.testing.assert_close(check.closed_form("ssd", rows, dh)["h"], h[0, :, 0])


@pytest.mark.parametrize("function", ["exp", "sigmoid"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_right_passes(function: str, dtype: str) -> None:
    verdict = check.judge(OURS[function], SHAPE, cases.DTYPES[dtype], CPU)
    assert verdict.errors.keys() == {"h", "dq", "dk", "dv", "di", "df"}
    assert not verdict.exceeded and verdict.tokens == SHAPE.T and verdict.first_s > 0


def spoiled(change: Callable[[Leaves, Tensor], Tensor]) -> Implementation:
    """Ours with a fault in it."""
    return replace(OURS["exp"], call=lambda x: change(x, OURS["exp"].call(x)))


FAULTS = {
    "one value": lambda x, h: h * (1 + 0.5 * (torch.arange(h.shape[1]) == 69)[:, None, None]),
    "a gradient": lambda x, h: h + 0.01 * (x["f"] - x["f"].detach())[..., None],
    "not finite": lambda x, h: h / torch.where(h == h.max(), 0.0, 1.0),
    "a constant input": lambda x, h: OURS["exp"].call(x | {"i": x["i"].detach()}) + 0 * h,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_seen(fault: str) -> None:
    x = spoiled(FAULTS[fault])  # type: ignore[arg-type]
    assert check.judge(x, replace(SHAPE, B=1, H=1), torch.float32, CPU).exceeded


def test_a_constant_normaliser_is_recognised() -> None:
    """The official exp kernels: wrong as a gradient of the function, right as what they are."""

    def call(x: Leaves) -> Tensor:
        ones = torch.ones_like(x["v"][..., :1])
        sums, _ = tfla.linear_attention(
            x["q"],
            x["k"],
            torch.cat([x["v"], ones], -1),
            torch.nn.functional.logsigmoid(x["f"]),
            x["i"],
        )
        return sums[..., :-1] / sums[..., -1:].abs().clamp_min(1.0).detach()

    verdict = check.judge(replace(OURS["exp"], call=call, detached=True), SHAPE, torch.float32, CPU)
    assert {"dq", "dk", "di", "df"} <= set(verdict.exceeded)
    assert max(verdict.errors.values()) > 0.1 > 1e-4 > max(verdict.against.values())


@pytest.mark.parametrize("function", ["exp", "sigmoid"])
def test_the_truth_of_a_step_is_a_step(function: str) -> None:
    x, state = models.step_inputs(replace(SHAPE, T=1), torch.float32, CPU, function)
    h, C = check.step_truth(function, x, state)
    full = {name: t.double() for name, t in x.items()}
    wide = tfla.State(*(None if t is None else t.double() for t in state))
    expected, after = tfla.mlstm_step(**full, state=wide, input_gate=function)  # type: ignore[arg-type]
    torch.testing.assert_close(h, expected)
    gauge = 1.0 if after.m is None else after.m.exp()[..., None, None]
    torch.testing.assert_close(C, after.C * gauge)


# ------------------------------------------------------------------------------- measuring


def test_runs_are_timed_in_turns() -> None:
    calls: list[tuple[str, int]] = []
    found = measure.in_turns(
        {name: lambda turn, name=name: calls.append((name, turn)) for name in "ab"},
        CPU,
        repeats=4,
        seconds=60,
        warm=1,
    )
    assert calls == [(name, turn) for turn in range(5) for name in ("ba" if turn % 2 else "ab")]
    assert all(isinstance(times, list) and len(times) == 4 for times in found.values())


def test_a_time_is_that_of_the_call_in_milliseconds() -> None:
    found = measure.in_turns({"nap": lambda _: time.sleep(0.02)}, CPU, 3, 60, 0)["nap"]
    assert isinstance(found, list) and 20 <= min(found) < 5000  # a busy machine is late


def test_the_clock_ends_a_measurement_but_not_before_three_turns() -> None:
    found = measure.in_turns({"nap": lambda _: time.sleep(0.01)}, CPU, 100, 0.0, 0)["nap"]
    assert isinstance(found, list) and len(found) == 3


def test_a_run_that_fails_fails_alone() -> None:
    def fail(turn: int) -> None:
        if turn == 1:
            raise RuntimeError("out of luck")

    found = measure.in_turns({"bad": fail, "good": lambda _: None}, CPU, 3, 60, 0)
    assert isinstance(found["bad"], RuntimeError)
    assert isinstance(found["good"], list) and len(found["good"]) == 3


def test_peak_memory_is_the_largest_sum_at_a_time() -> None:
    def run(_: int) -> Tensor:
        first = torch.empty(1000, 1000)
        second = torch.empty(500, 1000)
        del first
        return torch.cat([second, torch.empty(300, 1000)])

    assert measure.peak_bytes(run, CPU) == pytest.approx(6.4e6, rel=0.01)


def test_inputs_are_fresh_by_seed_and_laid_out_as_wanted() -> None:
    for x in (*OURS.values(), ATTENTION):
        a, b, again = (x.leaves(SHAPE, torch.float32, CPU, seed) for seed in (1, 2, 1))
        assert all(not torch.equal(a[name], b[name]) for name in a)
        assert all(torch.equal(a[name], again[name]) for name in a)
        assert all(t.is_contiguous() and t.requires_grad for t in a.values())
        assert x.canonical(a["q"]).shape[:2] == (SHAPE.B, SHAPE.T)


def test_a_pinned_chunk_is_taken_and_given_back() -> None:
    before = layout.L
    [x] = cases.with_chunks([OURS["exp"]], [16])
    leaves = x.leaves(SHAPE, torch.float32, CPU, 0)
    with x.pinned():
        assert layout.L == 16
    assert layout.L == before
    torch.testing.assert_close(x.run(leaves), OURS["exp"].run(leaves), rtol=1e-4, atol=1e-5)


def test_a_pinned_span_is_that_of_a_gpus_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was planned before; and a Program that is known is known again."""
    pytest.importorskip("triton", reason="the backend for GPUs is written in it; not for macOS")
    from tfla.kernels import planning

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    q = torch.empty(8, 512, 2, 16, dtype=torch.bfloat16)
    gates = torch.empty(8, 512, 2)
    spec = CallSpec.of(
        Inputs(q, q, q, gates, gates, None, None, None, None),
        Options(1.0, "exp", True, True, False, True, "triton", "ieee"),
    )
    usual, modes = planning.plan_of(spec), set()
    for x in cases.with_chunks([OURS["exp"], OURS["sigmoid"]], [64, 128, 4096]) * 2:
        with x.pinned():
            plan = planning.plan_of(spec)
            modes.add(planning.mode())
        assert plan.checkpoint_every == x.chunk and plan == x.planned(usual)
    assert len(modes) == 6 and planning.mode() not in modes
    assert planning.plan_of(spec) == usual and usual.checkpoint_every not in (64, 128, 4096)


def test_peers_are_chosen_by_parts_of_their_names() -> None:
    assert [x.name for x in cases.chosen("none")] == ["tfla exp", "tfla sigmoid"]
    assert cases.chosen("all") == cases.IMPLEMENTATIONS
    names = {x.name for x in cases.chosen("mamba, attention")}
    assert {"mamba2 ssd", "attention", "attention cudnn"} <= names and "fla gla" not in names
    assert {x.name for x in cases.IMPLEMENTATIONS} <= plots.COLOURS.keys()


def test_curves_carry_their_names() -> None:
    """At their right ends, in their colours, none over another."""
    result = report.load(Path(__file__).parents[1] / "docs/results/gpu-kernels.json")
    rows = [row for row in result["rows"] if row["study"] == "length"]
    figure = plots._lengths(rows, result["ceiling"], "")
    assert len(figure.axes) == 4
    for ax in figure.axes:
        names = {text.get_text(): text for text in ax.texts}
        assert names.keys() == {row["implementation"] for row in rows}
        assert all(text.get_color() == plots.COLOURS[name] for name, text in names.items())
        heights = sorted(text.xy[1] for text in names.values())
        assert all(high - low > 0.05 for low, high in zip(heights, heights[1:], strict=False))


# ------------------------------------------------------------------------------- tasks


def rows_of(task: Task, function: Callable[..., None]) -> list[Row]:
    told: list[tuple[Any, ...]] = []
    function(task, CPU, lambda *message: told.append(message))
    return [message[1] for message in told if message[0] == "row"]


def small(kind: str, *names: str, **fields: Any) -> Task:
    common = {"shape": SHAPE, "repeats": 3, "warm": 1, "seconds": 5.0}
    return Task(kind, "cpu", "fp32", names, **(common | fields))


def test_wrong_results_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = spoiled(lambda x, h: 1.01 * h)

    def fail(x: Leaves) -> Tensor:
        raise RuntimeError("no kernel image")

    peer = replace(wrong, name="attention", call=lambda x: 1.01 * OURS["exp"].call(x))
    bad = replace(peer, name="mamba2 ssd", call=fail)
    picky = replace(peer, name="fla gla", multiple=64)
    monkeypatch.setattr(cases, "IMPLEMENTATIONS", [wrong, OURS["sigmoid"], peer, bad, picky])
    names = [x.name for x in cases.IMPLEMENTATIONS]
    rows = rows_of(small("kernels", *names), runs.kernels)
    by = {(row["implementation"], row["pass"]): row for row in rows}
    ours = by["tfla exp", "forward"]
    assert ours["status"] == "WRONG" and "samples_ms" not in ours and "h 1.0e-02" in ours["reason"]
    assert report.median(by["tfla sigmoid", "forward+backward"]) is not None
    # A peer that is off keeps its speed, and its error stands beside it.
    other = by["attention", "forward+backward"]
    assert other["status"] == "ok" and "h" in other["exceeded"] and len(other["samples_ms"]) == 3
    assert by["mamba2 ssd", "forward"]["reason"] == "RuntimeError: no kernel image"
    assert by["fla gla", "forward"]["status"] == "skipped"
    above, below = report.remarks(rows, {"bytes_per_s": 1e9, "flops_per_s": 1e9})
    assert not any(line.startswith("limit of tfla exp") for line in above)
    assert "tfla exp  fwd: WRONG: off by h 1.0e-02" in below[0]


def test_decode_holds_every_step_against_fp64() -> None:
    names = ("tfla exp", "tfla sigmoid", "attention")
    rows = rows_of(small("decode", *names), models.decode)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert all(set(row["errors"]) == {"h", "C"} for row in rows[:2])
    assert max(max(row["errors"].values()) for row in rows[:2]) < 1e-5
    state = 4 * SHAPE.B * SHAPE.H * SHAPE.K * SHAPE.V
    assert rows[1]["bytes"] > 2 * state and rows[0]["bytes"] > rows[1]["bytes"]


def test_a_model_is_timed_in_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"vocab_size": 32, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    monkeypatch.setitem(models.SIZES, "tiny", size)
    rows = rows_of(small("model", "tfla exp", size="tiny"), models.model)
    assert [row["pass"] for row in rows] == ["prefill", "decode", "train step"]
    assert all(row["status"] == "ok" and len(row["samples_ms"]) == 3 for row in rows)
    assert [row["tokens"] for row in rows] == [70, 2, 140]
    assert rows[2]["flops"] > 3 * 2 * rows[0]["flops"]


class Odd(Task):
    """A task whose child imports this module, and so knows the kinds below."""


def _raises(task: Task, device: torch.device, tell: runs.Tell) -> None:
    for name in task.names:
        tell("begin", name, "working")
        if name == "crash":
            os._exit(7)
        if name == "hang":
            time.sleep(600)
        if name == "raise":
            raise RuntimeError("a fault of the benchmark itself")
    for name in task.names:
        tell("row", task.row(name))


runs.TASKS["odd"] = f"{__name__}:_raises"


def test_whatever_a_peer_does_is_a_line() -> None:
    """It exits, it never returns: the others are measured, and so is what comes after."""
    tasks = [
        Odd("odd", "cpu", "fp32", ("a", "crash", "hang", "b"), study="first"),
        Odd("odd", "cpu", "fp32", ("c", "raise"), study="second"),
    ]
    rows = list(runs.work_off(tasks, limit=10.0))
    found = {row["implementation"]: row for row in rows}
    assert {n for n, row in found.items() if row["status"] == "ok"} == {"a", "b", "c"}
    assert found["crash"]["reason"] == "the process ended while working (exit status 7)"
    assert found["hang"]["reason"] == "working took longer than 10 s"
    assert found["raise"]["reason"] == "RuntimeError: a fault of the benchmark itself"
    assert [row["study"] for row in rows] == ["first"] * 4 + ["second"] * 2


def test_late_tasks_are_left_out_and_said() -> None:
    rows = list(runs.work_off([Odd("odd", "cpu", "fp32", ("a",), until=time.time())], 60.0))
    assert [row["status"] for row in rows] == ["skipped"] and "--seconds" in rows[0]["reason"]


# ------------------------------------------------------------------------------- results


def result(**ms: list[float]) -> dict[str, Any]:
    rows = [
        {
            "kind": "kernels",
            "study": "length",
            "implementation": name.replace("_", " "),
            "pass": "forward",
            "dtype": "fp32",
            "shape": dict(B=1, T=64, H=1, K=8, V=8),
            "status": "ok",
            "samples_ms": samples,
            "ours": name.startswith("tfla"),
        }
        for name, samples in ms.items()
    ]
    return {"format": report.FORMAT, "machine": {"device": "d"}, "rows": rows}


def test_compare_sees_what_became_worse() -> None:
    old = result(tfla_exp=[1.0, 1.0, 9.0], tfla_sigmoid=[2.0], attention=[1.0])
    same = result(tfla_exp=[1.04], tfla_sigmoid=[1.5], attention=[9.0])
    lines, worse = report.compare(old, same, 0.05)
    assert worse == [] and [line[-1] for line in lines] == ["", "faster", "slower"]
    slower = result(tfla_exp=[1.06], attention=[1.0])
    lines, worse = report.compare(old, slower, 0.05)
    assert [line.split(": ")[1] for line in worse] == ["slower", "gone"]
    wrong = result(tfla_exp=[1.0], tfla_sigmoid=[2.0])
    wrong["rows"][0] |= {"status": "WRONG"}
    assert report.compare(old, wrong, 0.05)[1][0].endswith("WRONG")


def test_spread_is_half_of_the_middle_half() -> None:
    assert report.spread([10.0] * 8) == 0.0
    assert report.spread([8.0, 8.0, 9.0, 10.0, 10.0, 11.0, 12.0, 50.0]) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the command, as small as it gets."""
    out = tmp_path_factory.mktemp("bench")
    words = "--tokens 128 --lengths 128 --studies length --repeats 3 --peers attention"
    words += " --device cpu --seconds 3600 --limit 900 --out"
    assert run_command(["bench", "kernels", *words.split(), str(out)]) == 0
    return out


def test_a_run_leaves_results_and_plots(run: Path) -> None:
    found = report.load(run / "kernels.json")
    assert {"device", "threads", "torch", "python"} <= found["machine"].keys()
    assert found["ceiling"]["bytes_per_s"] > 1e8 and found["ceiling"]["flops_per_s"] > 1e8
    assert len(found["rows"]) == 3 * 2 * 2  # implementations, passes, set-ups
    for row in found["rows"]:
        assert row["status"] == "ok" and len(row["samples_ms"]) == 3 and row["peak_bytes"] > 0
        assert len(report.cells(row, found["ceiling"])) == len(report.COLUMNS["kernels"])
    for name in ("length", "errors"):
        assert (run / f"kernels-{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (run / f"kernels-{name}.svg").read_text()
    text = (run / "kernels.json").read_text()
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_compare_by_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "kernels.json"
    assert run_command(["bench", "compare", str(path), str(path)]) == 0
    slower = json.loads(path.read_text())
    row = next(row for row in slower["rows"] if row["ours"] and row["status"] == "ok")
    row["samples_ms"] = [2 * ms for ms in row["samples_ms"]]
    report.save(tmp_path / "new.json", slower)
    assert run_command(["bench", "compare", str(path), str(tmp_path / "new.json")]) == 1
    assert "+100.0%" in capsys.readouterr().out
    threshold = ["--threshold", "1.5"]
    assert run_command(["bench", "compare", str(path), str(tmp_path / "new.json"), *threshold]) == 0
    (tmp_path / "bad.json").write_text("{")
    assert run_command(["bench", "compare", str(path), str(tmp_path / "bad.json")]) == 2
    assert "bad.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device", ["a100", "l40s", "4090", "5090", "h100", "H200", "b200", "mi300x"]
)
def test_roofline_by_command(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["roofline", "4", "16384", "16", "128", "256", "--device", device]
    assert run_command([*words, "--plot", str(tmp_path / "roof")]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ ?{name} ", out, re.MULTILINE) for name in ("h", "dv", "dq", "dk"))
    assert "(datasheet, dense): " in out and "KiB of shared memory" in out
    assert re.search(r"^memory: .*1,032.0 MiB, h, 512.0 MiB, .* MiB backward", out, re.MULTILINE)
    assert "best of the paper's scheme" in out and (tmp_path / "roof.svg").is_file()


def test_cost_of_many_gpus_by_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["roofline", "--gpus", "1024"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" *[\d,]+  ", line)]
    assert [row[0] for row in rows] == "8 16 32 64 128 256 512 1,024".split()
    # A rank receives C, n, m and b, in two parts, of all others: 8 heads of 256 x 512.
    assert float(rows[0][3]) == pytest.approx(7 * 4 * 8 * (256 * 512 + 256 + 3) / 1e6, abs=0.1)


def figures_of_two_gpus(root: Path) -> dict[str, tuple[float, float]]:
    """(the model's, measured) of docs/results/gpu-scale.json; the page says the same."""
    rows: Any = json.loads((root / "docs/results/gpu-scale.json").read_text())["rows"]
    found, alone = {}, 0.0
    for row in rows:
        name, seconds = row["name"], row.get("seconds_a_step")
        if name == "exchange":
            told = scale.collective(row["bytes_of_a_rank"], 2)
            found["exchange of a call, us"] = 1e6 * told, row["microseconds"]
        if seconds is None:
            continue
        if row["gpus"] == 1:  # the row of two GPUs is the next one
            alone = seconds
            continue
        hidden, tokens = row["hidden"], row["B"] * row["T"]
        config = XLSTMConfig(50304, hidden, row["layers"], hidden // 512)
        together = 2 if "sequence" in name else 1
        told = scale.step_of(alone, config, 2, tokens, together)
        found[f"{name}, ms a step"] = 1e3 * told, 1e3 * seconds
    return found


def test_the_model_of_many_gpus_is_as_far_off_as_the_page_says(root: Path) -> None:
    page = (root / "docs/performance/scale.md").read_text()
    found = figures_of_two_gpus(root)
    assert len(found) == 4
    for name, (told, measured) in found.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:] == [f"{measured:,.0f}", f"{told:,.0f}", f"{told / measured - 1:+.1%}"]
        assert abs(told / measured - 1) < (0.2 if "exchange" in name else 0.01), name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("roofline", "name B T H K V"),
        ("roofline --gpus 1", "--gpus is 1"),
        ("bench kernels --dtype int8", "--dtype is int8; it must be one of bf16, fp16, fp32"),
        ("bench kernels --lengths 1,x", "whole numbers from 1 on"),
        ("bench kernels --device tpu", "--device is tpu"),
        ("bench model --size 9b", "--size is 9b; it must be one of tiny"),
        ("bench kernels --peers nobody", "--peers is 'nobody'; it must be all, none, or parts of"),
        ("bench decode --peers attention,nobody", "--peers is 'attention,nobody'"),
        ("bench kernels --repeats -1", "--repeats is -1; it must be 1 or more"),
        ("bench kernels --seconds nan", "--seconds is nan; it must be 0 or more"),
        ("bench kernels --limit -1", "--limit is -1; it must be 1 or more"),
        ("bench kernels --tokens -1", "--tokens is -1; it must be 1 or more"),
        ("bench kernels --studies lengths", "--studies is lengths"),
        ("bench memory --tokens -5", "--tokens is -5; it must be 1 or more"),
        ("bench decode --context -1", "--context is -1; it must be 1 or more"),
        ("bench model --batch -1", "--batch is -1; it must be 1 or more"),
        ("bench transfer --seconds nan", "--seconds is nan; it must be 0 or more"),
        ("bench transfer --step nan", "--step is nan"),
        ("bench bias --seconds -1", "--seconds is -1; it must be 0 or more"),
        ("bench bias --lr nan", "--lr is nan"),
        ("bench compare a b --threshold nan", "--threshold is nan; it must be 0 or more"),
        ("bench draw none.json", "none.json"),
        ("roofline --gpus 99999999999", "they must be 2 to 2^20"),
        ("bench compare none.json none.json", "none.json"),
        ("roofline 1 1 1 8 8 --device b1000", "one of this, a100"),
        ("roofline 1 1 1 8 0 --device h100", "'V'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(words.split()) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("words", ["4 16384 16 128 256 --device h100", "--gpus 1024"])
def test_nothing_is_wider_than_the_console(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for width in (300, 80, 50):
        monkeypatch.setenv("COLUMNS", str(width))
        assert run_command(["roofline", *words.split()]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= width and "…" not in out
        shown[width] = sorted(re.findall(r"\d[\d,.]*", out))
    # Only the first column is repeated in what follows below.
    assert not Counter(shown[300]) - Counter(shown[50])
    assert shown[80] == shown[300]


def test_a_result_is_drawn_again(root: Path, tmp_path: Path, capsys: Any) -> None:
    words = [
        "bench",
        "draw",
        str(root / "docs" / "results" / "gpu-decode.json"),
        "--out",
        str(tmp_path),
    ]
    assert run_command(words) == 0
    assert (tmp_path / "decode-batch.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "odd.json").write_text('{"format": 1, "rows": [{"study": "batch"}]}')
    assert run_command(["bench", "draw", str(tmp_path / "odd.json"), "--out", str(tmp_path)]) == 2
    assert "is not a whole result of tfla bench" in capsys.readouterr().err


def test_the_forget_gates_error_stands_apart() -> None:
    """Its bound is another, so the worst of all gradients would say nothing."""
    fields = {"h": 1e-3, "dq": 2e-3, "dk": 3e-3, "dv": 1e-3, "di": 4e-3, "df": 2e-2}
    row = {"implementation": "tfla exp", "errors": fields, "dtype": "bf16"}
    [axes] = plots._errors([row, row], {}, "").axes
    places = {line.get_xdata()[0] for line in axes.lines if len(line.get_xdata())}
    assert places == {1e-3, 4e-3, 2e-2, 2.0**-7, 2.0**-5}


def test_peers_are_listed_with_what_brings_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "kernels", "--list-peers", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cases.IMPLEMENTATIONS)
    assert any(line.split()[-1] == "here" for line in lines)


@pytest.mark.parametrize("name", ["kernels.json", "kernels-length.png", "kernels-errors.svg"])
def test_results_of_another_are_not_overwritten(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything is measured."""
    (tmp_path / name).write_text('{"format": 1, "mine": true}')
    words = f"bench kernels --peers none --device cpu --seconds 5 --out {tmp_path}"
    assert run_command(words.split()) == 2
    said = capsys.readouterr().err
    assert f"{name} is not a file that tfla wrote" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_results_and_figures_of_ours_are_replaced(run: Path, tmp_path: Path) -> None:
    result = report.load(run / "kernels.json")
    for _ in range(2):
        plots.check_room(tmp_path, "kernels")
        report.save(tmp_path / "kernels.json", result)
        assert plots.draw(result, tmp_path)
    assert not list(tmp_path.glob(".*"))
