"""Results: the JSON, the tables, and the comparison of two runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfla.bench import language_study, roofline, transfer
from tfla.bench.cases import Shape
from tfla.bench.runs import Row
from tfla.xlstm import files
from tfla.xlstm.files import RunError

FORMAT = 1
COLUMNS = {
    "kernels": [
        "",
        "ms",
        "± %",
        "TFLOP/s",
        "GB/s",
        "% bytes\nlimit",
        "% arith\nlimit",
        "peak\nMiB",
        "host\nµs",
        "first\ns",
        "error\nh",
        "error\ngrads",
    ],
    "decode": ["", "ms", "± %", "GB/s", "% bytes\nlimit", "host\nµs", "error\nh"],
    "model": [
        "",
        "ms",
        "± %",
        "tokens/s",
        "TFLOP/s",
        "% arith\nlimit",
        "% bytes\nlimit",
        "peak\nMiB",
    ],
    "bias": [
        "",
        "bias of i",
        "ms a step",
        "norm\nfirst 10",
        "norm\nlargest",
        "loss\nfirst",
        "loss\nlast",
        "held-out\nbits/byte",
    ],
    "language_plan": [
        "",
        "parameters",
        "ms a step",
        "± %",
        "tokens/s",
        "peak MiB\nof a step",
        "error\nlogits",
    ],
    "language": [
        "",
        "learning\nrate",
        "tokens/s",
        "± %",
        "tuning text\nbits/byte",
        "reported text\nbits/byte",
        "the same in\nlong windows",
    ],
    "transfer": ["", "s a draw", "draws", "error\nh", "standard\nerror %", "off\n%", "border"],
}
SUMMARY_COLUMNS = [
    "",
    "parameters",
    "best\nlearning rate",
    "seeds",
    "windows of\nthe context",
    "long\nwindows",
    "tokens/s",
    "peak MiB\nof a step",
]
ROOFLINE_COLUMNS = [
    "kernel",
    "launches",
    "GFLOP",
    "MB",
    "MB via\nL2",
    "FLOP/\nbyte",
    "ms by\nbytes",
    "ms by\narith",
    "bound by",
]


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON. RunError: there is a file at `path` that ``save`` has not written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, (json.dumps(result, indent=1) + "\n").encode(), is_result)


def is_result(path: Path) -> bool:
    """Whether `save` has written this file."""
    try:
        return {"tfla", "machine", "rows"} <= load(path).keys()
    except (RunError, RecursionError):
        return False


def load(path: Path) -> dict[str, Any]:
    """Read a result. RunError: the file is no result, or one of another format."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); give a file that tfla bench wrote") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise RunError(f"{path} is not a result of this tfla bench; measure again")
    return result


def median(row: Row) -> float | None:
    """Milliseconds; None where there is no speed to be had."""
    samples = row.get("samples_ms")
    return statistics.median(samples) if samples and row["status"] == "ok" else None


def spread(samples: Sequence[float]) -> float:
    """Half the range that holds the middle half of the samples, over the median."""
    ordered = sorted(samples)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return (high - low) / 2 / statistics.median(ordered)


def limits_ms(row: Row, ceiling: dict[str, Any], of: str = "") -> tuple[float, float]:
    """The least time by bytes and by arithmetic, of the function or (`of` = "plan_") the plan."""
    moved, flops = row[f"{of}bytes"], row.get(f"{of}flops", 0)
    return moved / ceiling["bytes_per_s"] * 1e3, flops / ceiling["flops_per_s"] * 1e3


# ---------------------------------------------------------------- tables


def head(result: dict[str, Any]) -> str:
    """The machine and its ceilings, before any measurement."""
    machine, ceiling = result["machine"], result["ceiling"]
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"tfla {result['tfla']}\nceiling, measured: {ceiling['bytes_per_s'] / 1e9:,.1f} GB/s, "
        f"{ceiling['flops_per_s'] / 1e12:,.3g} TFLOP/s in {ceiling['dtype']} ({ceiling['how']})"
    )


def title(row: Row) -> str:
    """Of the table that a row belongs in."""
    if row["kind"] == "bias":
        m, o = row["model"], row["options"]
        return (
            f"{m['num_layers']} blocks of width {m['hidden_size']}, {m['num_heads']} heads, eps "
            f"{m['norm_eps']:g}; {o['steps']} steps of {o['batch']} x {o['context']} tokens, "
            f"learning rate {o['lr']:g}.\nNorm: of all gradients before clipping; median of the "
            "first 10 steps, and the largest.\nLoss: nats a token, the first step and the median "
            "of the last 10"
        )
    if row["kind"] == "language_plan":
        m, tokens = row["model"], row["context"] * row["batch"]
        return (
            f"{m['num_layers']} blocks of width {m['hidden_size']}; {m['num_heads']} heads of the "
            f"mLSTM, {m['attention_heads']} of attention; {row['dtype']}.\nEvery training: "
            f"{row['steps']:,} steps of {row['batch']} x {row['context']} tokens, "
            f"{row['steps'] * tokens:,} in all.\nPeak: over weights and moments of AdamW. Error: "
            "against fp64"
        )
    if row["kind"] == "language":
        rate = f"learning rate {row['lr']:g}" if row["swept"] else "each at its best learning rate"
        return (
            f"Seed {row['seed']}, {rate}. Windows of {row['context']:,} tokens, long ones of "
            f"{language_study.LONG * row['context']:,}"
        )
    if row["kind"] == "transfer":
        epsilons = " | ".join(f"{eps:g}" for eps in row["eps"])
        return (
            f"One head {row['shape']['K']}/{row['shape']['V']}, {row['shape']['T']:,} tokens, "
            f"{len(row['f'])} x {len(row['i'])} gates, {row['dtype']}.\n"
            "Error: of h against fp64. Standard error of the gain over the draws, and the gain "
            "off its closed form: the worst gates.\nBorder: the input gate's pre-activation at "
            f"which the gain after the norm\nis {transfer.BORDER:.2f}, at f = "
            f"{shown_forget_gate(row)[1]:g}, eps {epsilons}"
        )
    if row["kind"] != "model":
        return f"{Shape(**row['shape'])}, {row['dtype']}"
    B, T = row["shape"]["B"], row["shape"]["T"]
    return (
        f"{row['implementation']}, {row['size']}, {row['dtype']}: prefill of {T:,} tokens, decode "
        f"of {B} sequences, training step of {B} x {T:,} tokens"
    )


def cells(row: Row, ceiling: dict[str, Any]) -> list[str]:
    """The line of a row that has a speed."""
    ms = median(row)
    assert ms is not None
    if row["kind"] == "transfer":
        return _transfer_cells(row, ms)
    if row["kind"] == "bias":
        return _bias_cells(row, ms)
    if row["kind"] == "language":
        return _language_cells(row, ms)
    if row["kind"] == "language_plan":
        return _language_plan_cells(row, ms)
    by_bytes, by_flops = limits_ms(row, ceiling)
    errors = row.get("errors", {})
    worst = max((e for n, e in errors.items() if n not in ("h", "C")), default=None)
    outside = "!" if any(name != "h" for name in row.get("exceeded", [])) else ""
    line = {
        "": row["pass"] if row["kind"] == "model" else label(row),
        "ms": _three(ms),
        "± %": f"{100 * spread(row['samples_ms']):.0f}",
        "GB/s": f"{row['bytes'] / ms / 1e6:,.1f}",
        "% bytes\nlimit": f"{100 * by_bytes / ms:.0f}",
        "TFLOP/s": _three(row.get("flops", 0) / ms / 1e9),
        "% arith\nlimit": f"{100 * by_flops / ms:.0f}",
        "peak\nMiB": _number(row.get("peak_bytes"), 2**-20, ",.0f"),
        "host\nµs": _number(row.get("host_us"), 1, ",.0f"),
        "first\ns": _number(row.get("first_s"), 1, ".1f"),
        "tokens/s": _number(row.get("tokens"), 1e3 / ms, ",.0f"),
        "error\nh": _number(errors.get("h"), 1, ".0e"),
        "error\ngrads": _number(worst, 1, ".0e") + outside if row["pass"] != "forward" else "-",
    }
    return [line[column] for column in COLUMNS[row["kind"]]]


def _transfer_cells(row: Row, ms: float) -> list[str]:
    index, _ = shown_forget_gate(row)
    borders = [transfer.border(row["i"], gain[index]) for gain in row["after"]]
    errors = row["errors"]["h"], row.get("standard_error"), row.get("expected_off")
    return [
        row["implementation"],
        _three(ms / 1e3),
        str(row["draws"]),
        _number(errors[0], 1, ".0e"),
        _number(errors[1], 100, ".1f"),
        _number(errors[2], 100, ".1f"),
        " | ".join(_number(x, 1, ".1f") for x in borders),
    ]


def _bias_cells(row: Row, ms: float) -> list[str]:
    norms, loss = row["gradient_norm"], row["loss"]
    return [
        row["implementation"],
        f"{row['bias']:g}",
        _three(ms),
        _three(statistics.median(norms[:10])),
        _three(max(norms)),
        _three(loss[0]),
        _three(statistics.median(loss[-10:])),
        _number(row.get("bits_per_byte"), 1, ".3f"),
    ]


def _language_plan_cells(row: Row, ms: float) -> list[str]:
    return [
        row["implementation"],
        f"{row['parameters']:,}",
        _three(ms),
        f"{100 * spread(row['samples_ms']):.0f}",
        f"{row['context'] * row['batch'] / ms * 1e3:,.0f}",
        _number(row["peak_bytes"], 2**-20, ",.1f"),
        _number(row["errors"]["logits"], 1, ".0e"),
    ]


def _language_cells(row: Row, ms: float) -> list[str]:
    return [
        row["implementation"],
        f"{row['lr']:g}",
        f"{row['context'] * row['batch'] / ms * 1e3:,.0f}",
        f"{100 * spread(row['samples_ms']):.0f}",
        *(f"{bits:.3f}" for bits in (row["curve"][-1], row["bits"], row["bits_long"])),
    ]


def language_summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line a model at its best learning rate; of several seeds the mean, the lowest and the
    highest."""
    lines = []
    for name in language_study.NAMES:
        best = language_study.chosen(rows, name)
        if not best:
            continue
        swept = {row["lr"] for row in rows if language_study.is_trained(row) and row["swept"]}
        lr, edge = best[0]["lr"], ""
        if len(swept) > 1:
            edge = {min(swept): " (the lowest)", max(swept): " (the highest)"}.get(lr, "")
        speed = statistics.median(median(row) or math.inf for row in best)
        lines.append(
            [
                name,
                f"{best[0]['parameters']:,}",
                f"{lr:g}{edge}",
                str(len(best)),
                *(_range([row[key] for row in best]) for key in ("bits", "bits_long")),
                f"{best[0]['context'] * best[0]['batch'] / speed * 1e3:,.0f}",
                _number(best[0]["peak_bytes"], 2**-20, ",.1f"),
            ]
        )
    return lines


def _range(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def show_summary(rows: Sequence[Row]) -> None:
    """What stands below all tables: of language models the result, and what each writes."""
    lines = language_summary(rows)
    if not lines:
        return
    table("Held-out bits a byte of the reported text", SUMMARY_COLUMNS, lines)
    for name in language_study.NAMES:
        for row in language_study.chosen(rows, name)[:1]:
            print(f"{name} writes:\n{_printable(row['sample'])}\n")


def _printable(text: str) -> str:
    """Without what would command a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def shown_forget_gate(row: Row) -> tuple[int, float]:
    """(index, pre-activation) of the forget gate whose border is stated."""
    return min(enumerate(row["f"]), key=lambda pair: abs(pair[1] - transfer.SHOWN_FORGET_GATE))


def label(row: Row) -> str:
    """The name of a row in a table: the implementation, and which pass was timed."""
    part = {"forward": "  fwd", "forward+backward": "  fwd+bwd"}.get(row.get("pass", ""), "")
    return row["implementation"] + part


def remarks(rows: Sequence[Row], ceiling: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What stands above a table (the limits of ours) and below it (who has no speed and why, what
    a reader must know of the others)."""
    limits: dict[str, list[str]] = {}
    below = []
    for row in rows:
        if median(row) is None:
            below.append(f"{label(row)}: {row['status']}: {row.get('reason', 'not measured')}")
            continue
        if row.get("ours") and "bytes" in row:
            text = f"{row['pass']}: " + _limit(limits_ms(row, ceiling))
            if "plan_bytes" in row:
                text += f"; by its plan {_limit(limits_ms(row, ceiling, 'plan_'))}"
            limits.setdefault(text, []).append(row["implementation"].split(" @")[0])
        note = row.get("note", "")
        if row.get("against"):
            worst = max(e for n, e in row["against"].items() if n != "h")
            note += f"; with a constant normaliser its gradients are within {worst:.0e}"
        if row.get("exceeded") and not row.get("ours"):
            note += "; ! is beyond the bound that ours is held to"
        if note:
            below.append(f"{row['implementation']}: {note.removeprefix('; ')}")
    above = {f"limit of {', '.join(dict.fromkeys(n))}, {text}" for text, n in limits.items()}
    return sorted(above), list(dict.fromkeys(below))


def _limit(ms: tuple[float, float]) -> str:
    return f"{ms[0]:.3g} ms by bytes" + (f", {ms[1]:.3g} by arithmetic" if ms[1] else "")


def show(rows: Sequence[Row], ceiling: dict[str, Any]) -> None:
    """Print the table of rows that belong together."""
    if not rows:
        return
    above, below = remarks(rows, ceiling)
    say("", *above)
    timed = [cells(row, ceiling) for row in rows if median(row) is not None]
    table(title(rows[0]), COLUMNS[rows[0]["kind"]] if timed else [], timed)
    say(*below)


def table(heading: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table no wider than the console: what does not fit follows below it, each part with
    the first column."""
    from rich.console import Console

    console = Console()
    say(*heading.splitlines())
    most = console.width // 2  # of the first column, whose words may go on below

    def width(part: Sequence[int]) -> int:
        texts = [[*columns[n].splitlines(), *(line[n] for line in lines)] for n in part]
        widest = [max(map(len, column)) for column in texts]
        return min(widest[0], most) + sum(widest[1:]) + 2 * len(part)

    left = list(range(1, len(columns)))
    while columns:
        part = [0]
        while left and (len(part) == 1 or width([*part, left[0]]) <= console.width):
            part.append(left.pop(0))
        console.print(_grid(columns, lines, part, most), highlight=False)
        if not left:
            break


def _grid(
    columns: Sequence[str], lines: Sequence[Sequence[str]], part: Sequence[int], most: int
) -> Any:
    """Some of the columns as a table, the first of at most so many letters."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place in part:
        look: Any = {"justify": "right", "no_wrap": True} if place else {"max_width": most}
        found.add_column(columns[place], vertical="bottom", **look)
    for line in lines:
        found.add_row(*(Text(line[place]) for place in part))
    return found


def say(*lines: str) -> None:
    """Print lines, folded between words where they are wider than the console."""
    from rich.console import Console

    for line in lines:
        Console().print(line, markup=False, highlight=False)


def roofline_cells(
    kernels: Sequence[roofline.Kernel], machine: roofline.Machine, dtype: str
) -> list[list[str]]:
    """The lines of a table with the columns ROOFLINE_COLUMNS, one a kernel."""
    lines = []
    for k in kernels:
        by_bytes, by_flops = k.ms(machine, dtype)
        numbers = f"{k.launches}|{k.flops / 1e9:,.1f}|{k.bytes / 1e6:,.0f}|{k.l2_bytes / 1e6:,.0f}|"
        numbers += f"{k.intensity:,.1f}|{by_bytes:.3f}|{by_flops:.3f}"
        bound = "bytes" if by_bytes > by_flops else "arithmetic"
        lines.append([k.name, *numbers.split("|"), bound])
    return lines


def _three(x: float) -> str:
    """Three digits that count."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"


def _number(x: float | None, factor: float, form: str) -> str:
    return "-" if x is None else format(x * factor, form)


# ---------------------------------------------------------------- comparison


def compare(
    old: dict[str, Any], new: dict[str, Any], threshold: float
) -> tuple[list[list[str]], list[str]]:
    """(lines of a table, regressions). A regression: a median of ours that is larger by more than
    `threshold` (0.05: by 5%), or one of our rows that had a speed and has none any more."""

    def key(row: Row) -> tuple[Any, ...]:
        names = ["kind", "study", "implementation", "pass", "dtype", "chunk", "size", "bias"]
        names += ["lr", "seed"]
        return (*(row.get(name) for name in names), *(row.get("shape") or {}).values())

    after = {key(row): row for row in new["rows"]}
    lines, worse = [], []
    for row in old["rows"]:
        was, other = median(row), after.get(key(row))
        now = None if other is None else median(other)
        if was is None and now is None:
            continue
        shape = f", {Shape(**row['shape'])}" if row["shape"] else ""
        named = [
            f"{name} {row[name]:g}" for name in ("bias", "lr", "seed") if row.get(name) is not None
        ]
        what = f"{row['implementation']} {row.get('pass', '')}{', '.join(named)}{shape}"
        verdict, change = "", "-"
        if now is None:
            verdict = "gone" if other is None else other["status"]
        elif was is not None:
            change = f"{100 * (now / was - 1):+.1f}%"
            verdict = "slower" if now > was * (1 + threshold) else ""
            verdict = "faster" if now * (1 + threshold) < was else verdict
        if row.get("ours") and verdict not in ("", "faster"):
            worse.append(f"{what}: {verdict}")
        pair = ["-" if ms is None else _three(ms) for ms in (was, now)]
        lines.append([what, *pair, change, verdict])
    return lines, worse


def same_machine(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the machines of two results."""
    a, b = old["machine"], new["machine"]
    return [f"{n}: {a.get(n)} and {b.get(n)}" for n in sorted({*a, *b}) if a.get(n) != b.get(n)]
