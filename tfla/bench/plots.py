"""Results as figures, PNG and SVG: one colour an implementation everywhere, limits dashed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tfla
from tfla import render
from tfla.bench import check, language_study, report, roofline, transfer
from tfla.bench.cases import DTYPES, Shape
from tfla.bench.runs import Row
from tfla.xlstm import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours and neighbours of them; ours blue, attention orange, as elsewhere.
COLOURS = {
    "tfla exp": "#0072B2",
    "tfla sigmoid": "#56B4E9",
    "mlstm_kernels xl exp": "#009E73",
    "mlstm_kernels xl sigmoid": "#7BC8A4",
    "mlstm_kernels limit exp": "#00573F",
    "mlstm_kernels torch exp": "#4D7F3A",
    "mlstm_kernels step exp": "#009E73",
    "fla simple_gla": "#CC79A7",
    "fla gla": "#882255",
    "fla lightning": "#AA4499",
    "fla torch simple_gla": "#E5A8CB",
    "mamba2 ssd": "#555555",
    "attention": "#D55E00",
    "attention cudnn": "#D55E00",
    "attention flash": "#E69F00",
}
LIMIT = "#222222"
TIME = "ms (lower is better)"
BIAS_COLOURS = ("#D55E00", "#E69F00", "#009E73", "#332288", "#CC79A7", "#555555")
LINES = ("solid", "dashed", "dashdot", "dotted")
MOST_GAIN = 1e4  # the end of the colours; what is beyond has the last one
START = (-10.0, 3.0, 6.0)  # i and the range of f with which `tfla.xlstm` begins to train
STARTS = "gates of a model before its training: i = -10, f from 3 to 6"
DERIVED = "derived: exact before the norm, for large K and V after it"
GAIN = "gain: mean over tokens of max |h| / mean of max |v|"


def _colour(name: str) -> str:
    return COLOURS.get(name, "#999999")


PASSES = {"forward": "Forward", "forward+backward": "Forward + backward"}


STUDIES = (
    *("length", "heads", "chunk", "batch", "errors", "gain", "border", "bias"),
    *("tokens", "positions", "rates"),
)


def check_room(folder: Path, command: str, result: Path | None = None) -> None:
    """RunError when a figure or a result of another stands where `command` will write its own; its
    JSON is there already when it is `result`."""
    if result is None:
        files.check_file(folder / f"{command}.json", report.is_result)
    for study in STUDIES:
        for picture in _pictures(folder / f"{command}-{study}"):
            files.check_file(picture, _is_picture)


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Every figure that the rows of a result are enough for; the files written."""
    made = []
    drawings = (
        *(_lengths, _heads, _chunks, _batches, _errors, _gains, _borders, _biases),
        *(_learning, _by_position, _rates),
    )
    figures = zip(STUDIES, drawings, strict=True)
    for study, figure in figures:
        rows = [r for r in result["rows"] if r["study"] == study and report.median(r)]
        if study == "errors":
            rows = [r for r in result["rows"] if r["kind"] == "kernels" and r.get("errors")]
        if study == "border":
            rows = [r for r in result["rows"] if r["kind"] == "transfer" and report.median(r)]
        if study in ("tokens", "positions", "rates"):
            rows = [r for r in result["rows"] if language_study.is_trained(r)]
        if len(rows) > 1:
            about = f"{rows[0]['dtype']}, {result['machine']['device']}"
            drawn = figure(rows, result["ceiling"], about)
            made += _save(drawn, folder / f"{result['command']}-{study}")
    return made


def _lengths(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Runtime over the length at a constant number of tokens, a panel a pass and set-up; set-ups of
    one length are left out where others have several."""
    lengths = {(_dims(row), row["shape"]["T"]) for row in rows}
    several = {dims for dims, _ in lengths if sum(dims == other for other, _ in lengths) > 1}
    rows = [row for row in rows if not several or _dims(row) in several]
    setups = sorted({_dims(row) for row in rows}, reverse=True)
    figure, axes = _panels(len(setups), 2)
    for (H, K, V), line in zip(setups, axes, strict=True):
        for (part, name), ax in zip(PASSES.items(), line, strict=True):
            here = [r for r in rows if _dims(r) == (H, K, V) and r["pass"] == part]
            _curves(ax, here, lambda row: row["shape"]["T"])
            for row in [r for r in here if r["implementation"] == "tfla sigmoid"][:1]:
                text = "limit of tfla sigmoid: the larger of bytes and arithmetic"
                ax.axhline(max(report.limits_ms(row, ceiling)), color=LIMIT, ls="--", label=text)
            ticks = sorted({row["shape"]["T"] for row in here})
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
            _plain_log(ax)
            _label_ends(ax)
            _name(ax, f"{name}, {H} heads {K}/{V}", "tokens in a sequence", TIME)
    tokens = max(row["shape"]["B"] * row["shape"]["T"] for row in rows)
    return _finish(figure, axes, f"{tokens:,} tokens at every length, {about}")


def _heads(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Runtime over the head dim at a constant number of channels and tokens."""
    figure, [axes] = _panels(1, 2)
    for (part, name), ax in zip(PASSES.items(), axes, strict=True):
        here = [r for r in rows if r["pass"] == part]
        _curves(ax, here, lambda row: row["shape"]["V"])
        dims = sorted({_dims(row)[:0:-1] for row in here})
        ax.set_xscale("log", base=2)
        ax.set_xticks([V for V, _ in dims], [f"{K}/{V}" for V, K in dims])
        ax.set_ylim(bottom=0)
        _label_ends(ax)
        _name(ax, name, "head dim of q, k / of v", TIME)
    s = rows[0]["shape"]
    channels = f"{s['H'] * s['V']:,} channels, {s['B']} x {s['T']:,} tokens"
    return _finish(figure, [axes], f"{channels}, {about}")


def _chunks(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Memory against runtime of forward and backward, a point a chunk, a panel a gate."""
    rows = [row for row in rows if row["pass"] == "forward+backward"]
    gates = list(dict.fromkeys(_plain(row).rpartition(" ")[2] for row in rows))
    figure, [axes] = _panels(1, len(gates))
    for gate, ax in zip(gates, axes, strict=True):
        names = dict.fromkeys(_plain(row) for row in rows if _plain(row).endswith(f" {gate}"))
        for name in names:
            here = sorted((r for r in rows if _plain(r) == name), key=lambda row: row["chunk"])
            x, y = [report.median(r) or 0 for r in here], [r["peak_bytes"] / 2**20 for r in here]
            ax.plot(x, y, color=_colour(name), marker="o", linewidth=1.8, label=name)
            last: tuple[float, float] | None = None
            ours = name.startswith("tfla")  # its points lie at the left, and so do their numbers
            for row, a, b in list(zip(here, x, y, strict=True))[::-1]:
                if last and abs(math.log(a / last[0])) + abs(math.log(b / last[1])) < 0.12:
                    continue  # its number would lie on that of the point before
                where: dict[str, Any] = {"xytext": (-8 if ours else 8, 0)}
                where |= {"textcoords": "offset points", "ha": "right" if ours else "left"}
                where |= {"va": "center" if ours else "bottom", "fontsize": 10}
                ax.annotate(f"{row['chunk']:,}", (a, b), color=_colour(name), **where)
                last = a, b
        _plain_log(ax, "x")
        _plain_log(ax)
        label = "peak over the inputs, MiB (lower is better)"
        _name(ax, f"input gate {gate}", f"forward + backward, {TIME}", label)
    for which in ("x", "y"):  # what is compared has one scale
        ends = [end for ax in axes for end in getattr(ax, f"get_{which}lim")()]
        for ax in axes:
            ax.set(**{f"{which}lim": (min(ends), max(ends))})
    text = "Memory against runtime; at each point the tokens from one stored state to the next"
    return _finish(figure, [axes], f"{text}\n{Shape(**rows[0]['shape'])}, {about}")


def _batches(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Microseconds of a decode step over the batch, beside the least that its bytes take."""
    figure, [[ax]] = _panels(1, 1)
    steps = [{**r, "samples_ms": [(report.median(r) or 0) * 1e3]} for r in rows]
    _curves(ax, steps, lambda row: row["shape"]["B"])
    for name, style in (("tfla exp", "--"), ("attention", ":")):
        here = sorted((r["shape"]["B"], r) for r in rows if r["implementation"] == name)
        if here:
            limits = [max(report.limits_ms(row, ceiling)) * 1e3 for _, row in here]
            text = f"{name}: its bytes at a copy's speed"
            ax.plot([B for B, _ in here], limits, color=LIMIT, linestyle=style, label=text)
    ticks = sorted({row["shape"]["B"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(t) for t in ticks])
    _plain_log(ax)
    _label_ends(ax)
    context = rows[0]["shape"]["T"]
    _name(ax, "", "sequences in the batch", "µs a step (lower is better)")
    title = f"One token of every sequence; attention looks back at {context:,}\n{about}"
    return _finish(figure, [[ax]], title)


# What an error is of: its marker, and the names that `check` gives it.
ERRORS = {
    "h": ("o", ("h",)),
    "worst of dq, dk, dv, di": ("D", ("dq", "dk", "dv", "di")),
    "df, the forget gate's": ("^", ("df",)),
}


def _errors(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Error of h, of the gradients and of the forget gate's, which has a bound of its own, against
    fp64; the worst of all shapes."""
    figure, [[ax]] = _panels(1, 1)
    seen = {_plain(row): None for row in rows}
    names = [name for name in seen if name not in COLOURS]
    names += [name for name in reversed(COLOURS) if name in seen]
    for line, (label, (marker, fields)) in enumerate(ERRORS.items()):
        ax.plot([], [], marker, color="#555555", markerfacecolor="white", label=label)
        for place, name in enumerate(names):
            errors = [row["errors"] for row in rows if _plain(row) == name]
            found = [e[field] for e in errors for field in fields if field in e]
            if found:
                look: dict[str, Any] = {"markersize": 9, "markeredgewidth": 2}
                look["markerfacecolor"] = _colour(name) if label == "h" else "white"
                ax.plot(max(found), place + 0.2 * (1 - line), marker, color=_colour(name), **look)
    dtype = DTYPES[rows[0]["dtype"]]
    limit = check.bound("h", dtype)
    ax.axvline(limit, color=LIMIT, ls="--", label=f"bound for ours: {limit:.1e}")
    limit = check.bound("df", dtype)
    ax.axvline(limit, color=LIMIT, ls=":", label=f"bound for our df: {limit:.1e}")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xscale("log")
    _name(ax, "", "relative error against fp64 (lower is better)", "")
    return _finish(figure, [[ax]], f"Errors, {about}")


def _gains(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Heat maps of the gain over both gates: a line of panels a variant, before the norm at the
    left, then after the norm with each eps."""
    from matplotlib.colors import LogNorm

    epsilons = rows[0]["eps"]
    figure, axes = _panels(len(rows), 1 + len(epsilons), width=4.0 * (1 + len(epsilons)) + 1.5)
    shades: dict[str, Any] = {
        "cmap": "RdBu_r",
        "norm": LogNorm(1 / MOST_GAIN, MOST_GAIN),
        "rasterized": True,
    }
    for row, line in zip(rows, axes, strict=True):
        x, y = row["i"], row["f"]
        levels = {eps**0.5: style for eps, style in zip(epsilons, LINES, strict=False)}
        for number, ax in enumerate(line):
            gain = ([row["before"]] + row["after"])[number]
            mesh = ax.pcolormesh(x, y, gain, shading="nearest", **shades)
            lines = levels if not number else {transfer.BORDER: LINES[number - 1]}
            for level, style in lines.items():
                if min(map(min, gain)) < level < max(map(max, gain)):
                    ax.contour(x, y, gain, [level], colors=LIMIT, linestyles=[style], linewidths=2)
            ax.plot([START[0]] * 2, START[1:], color="#00A000", linewidth=5, label=STARTS)
            where = f"after the norm, eps {epsilons[number - 1]:g}" if number else "before the norm"
            first = f"{_gate_and_norm(row)}\n" if not number else "\n"
            _name(ax, first + where, "input gate, pre-activation i", "")
            ax.grid(False)
        line[0].set_ylabel("forget gate, pre-activation f", fontsize=12)
    for eps, style in zip(epsilons, LINES, strict=False):
        text = f"gain {transfer.BORDER:.2f} after the norm with eps {eps:g}; before it {eps**0.5:g}"
        axes[0][0].plot([], [], color=LIMIT, linestyle=style, linewidth=2, label=text)
    bar = figure.colorbar(mesh, ax=[ax for line in axes for ax in line], extend="both", aspect=40)
    bar.set_label(GAIN, fontsize=12)
    bar.ax.tick_params(labelsize=11)
    shape = f"{rows[0]['shape']['T']:,} tokens, head dim {rows[0]['shape']['V']}"
    title = f"Gain of one head at constant gates, q, k, v ~ N(0, 1), {shape}, {about}"
    return _finish(figure, axes, title)


def _borders(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """The same along one forget gate, with what is derived beside what is measured."""
    index, f = report.shown_forget_gate(rows[0])
    epsilons = rows[0]["eps"]
    figure, axes = _panels(1, 1 + len(epsilons), width=4.6 * (1 + len(epsilons)))
    before = [gain for row in rows for gain in row["before"][index]]
    for number, ax in enumerate(axes[0]):
        for row in rows:
            gain = ([row["before"]] + row["after"])[number][index]
            style = "-" if "not" in row["implementation"] else "--"
            ax.plot(
                row["i"],
                gain,
                color=COLOURS[_plain(row)],
                linestyle=style,
                linewidth=2.4,
                label=_gate_and_norm(row),
            )
            if "expected" in row:
                exact = row["expected"][index]
                if number:
                    exact = _after(row, f, epsilons[number - 1])
                every = slice(None, None, max(1, len(exact) // 20))
                ax.plot(
                    row["i"][every], exact[every], ".", color=LIMIT, markersize=6, label=DERIVED
                )
        ax.axvline(START[0], color="#00A000", linewidth=2, label=STARTS)
        ax.set(yscale="log", ylim=(min(before) / 2, max(before) * 2))
        where = f"after the norm, eps {epsilons[number - 1]:g}" if number else "before the norm"
        _name(ax, where, "input gate, pre-activation i", "" if number else GAIN)
    return _finish(figure, axes, f"Gain at the forget gate f = {f:g}, {about}")


def _biases(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Gradient norm and loss over the steps, a line of panels a gate, a colour a bias."""
    from matplotlib.ticker import MaxNLocator

    gates = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, axes = _panels(len(gates), 2)
    biases = list(dict.fromkeys(row["bias"] for row in rows))
    for gate, line in zip(gates, axes, strict=True):
        for row in [row for row in rows if row["implementation"] == gate]:
            colour = BIAS_COLOURS[biases.index(row["bias"]) % len(BIAS_COLOURS)]
            text = f"bias of the input gate {row['bias']:g}"
            for ax, name in zip(line, ("gradient_norm", "loss"), strict=True):
                steps = range(1, len(row[name]) + 1)
                ax.plot(steps, row[name], color=colour, linewidth=1.8, label=text)
        line[0].set_yscale(
            "log"
        )  # before the limits are read: those of a plain scale reach below 0
        gate = gate.removeprefix("tfla ")
        _name(line[0], f"mLSTM, input gate {gate}", "step", "norm of all gradients, not clipped")
        _name(line[1], f"mLSTM, input gate {gate}", "step", "loss, nats a token")
    for number in (0, 1):  # what is compared between the gates has one scale
        column = [line[number] for line in axes]
        low = min(ax.get_ylim()[0] for ax in column)
        high = max(ax.get_ylim()[1] for ax in column)
        for ax in column:
            ax.set_ylim(low, high)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if not number:
                _plain_log(ax)
    eps = rows[0]["model"]["norm_eps"]
    return _finish(figure, axes, f"Early training, norm eps {eps:g}, {about}")


def _learning(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Bits a byte of the tuning text over tokens and over seconds of training, each model at its
    best learning rate."""
    figure, [axes] = _panels(1, 2)
    late = []
    for name, best in _best(rows).items():
        seconds = over_seeds(row["seconds"] for row in best)[0]
        for ax, x in zip(axes, (best[0]["tokens"], seconds), strict=True):
            late += _band(ax, name, x, [row["curve"] for row in best])
    for ax, x in zip(axes, ("tokens of training", "seconds of training"), strict=True):
        _scale(ax, late)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        _name(ax, "", x, "held-out bits a byte" if ax is axes[0] else "")
    return _finish(figure, [axes], f"{_models(rows)}, {_spread(rows)}\n{about}")


def _by_position(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """Bits a byte by position in windows longer than those of training."""
    figure, [[ax]] = _panels(1, 1)
    edges, context = rows[0]["positions"], rows[0]["context"]
    middle = [(max(a, 1) * b) ** 0.5 for a, b in pairwise(edges)]
    late = []
    for name, best in _best(rows).items():
        late += _band(ax, name, middle, [row["by_position"] for row in best])
    _scale(ax, late)
    ax.axvline(context, color=LIMIT, ls=":", label=f"windows of training: {context:,}")
    ax.set_xscale("log", base=2)
    ticks = [t for t in (2**n for n in range(3, 20)) if t <= edges[-1]]
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    _name(ax, "", "position in the window, tokens", "held-out bits a byte")
    return _finish(figure, [[ax]], f"{_models(rows)}\n{_spread(rows)}, {about}")


def _rates(rows: list[Row], ceiling: dict[str, Any], about: str) -> Figure:
    """The sweep of learning rates: bits a byte of the tuning text at the end of each training."""
    figure, [[ax]] = _panels(1, 1)
    for name, best in _best(rows).items():
        swept = sorted(
            (r["lr"], r["curve"][-1]) for r in rows if r["implementation"] == name and r["swept"]
        )
        ax.plot(*zip(*swept, strict=True), marker="o", **_line(name))
        ring: dict[str, Any] = {"markersize": 13, "markerfacecolor": "none", "color": _colour(name)}
        ax.plot(best[0]["lr"], dict(swept)[best[0]["lr"]], "o", **ring)
    rates = sorted({row["lr"] for row in rows if row["swept"]})
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
    _name(ax, "", "learning rate at its peak", "held-out bits a byte at the end")
    text = "Every learning rate with one seed; the one that is taken has a ring"
    return _finish(figure, [[ax]], f"{_models(rows)}\n{text}, {about}")


def _best(rows: list[Row]) -> dict[str, list[Row]]:
    """By model the trainings at its best learning rate, one a seed."""
    found = {name: language_study.chosen(rows, name) for name in language_study.NAMES}
    return {name: best for name, best in found.items() if best}


def over_seeds(curves: Iterable[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean, lowest and highest of curves with the same points."""
    columns = list(zip(*curves, strict=True))
    means = [sum(column) / len(column) for column in columns]
    return means, [min(column) for column in columns], [max(column) for column in columns]


def _band(
    ax: Axes, name: str, x: Sequence[float], curves: Iterable[Sequence[float]]
) -> list[float]:
    """The mean of curves and their range; what is beyond the first points, for the scale."""
    mean, low, high = over_seeds(curves)
    ax.plot(x, mean, marker="o", markersize=4, **_line(name))
    ax.fill_between(x, low, high, color=_colour(name), alpha=0.2, linewidth=0)
    return [*low[1:], *high[1:]] or mean


def _scale(ax: Axes, values: Sequence[float]) -> None:
    room = 0.05 * (max(values) - min(values)) or 0.05
    ax.set_ylim(min(values) - room, max(values) + room)


def _line(name: str) -> dict[str, Any]:
    """Of a curve; a dashed one hides no other that it lies on."""
    style = "--" if name == "tfla sigmoid" else "-"
    return {"color": _colour(name), "linestyle": style, "linewidth": 2, "label": _mixer(name)}


def _mixer(name: str) -> str:
    gate = language_study.NAMES[name]
    return f"mLSTM, input gate {gate}" if gate else "attention, rotary positions"


def _spread(rows: list[Row]) -> str:
    return f"mean and range of {len({row['seed'] for row in rows})} seeds"


def _models(rows: list[Row]) -> str:
    sizes = sorted({row["parameters"] for row in rows})
    between = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    return f"Language models of {between} parameters, {rows[0]['tokens'][-1]:,} tokens"


def rooflines(
    kernels: Sequence[roofline.Kernel],
    machine: roofline.Machine,
    dtype: str,
    K: int,
    V: int,
    L: int | None,
    path: Path,
) -> list[Path]:
    """Left: each scan of the plan under the machine's roof. Right: intensity over the chunk of the
    paper's scheme, with its best chunk, beside ours."""
    figure, [[left, right]] = _panels(1, 2)
    flops, bandwidth, size = machine.flops_per_s[dtype], machine.bytes_per_s, roofline.SIZES[dtype]
    ridge = flops / bandwidth
    scans = [k for k in kernels if k.name.split(":")[0] in ("nu", "h", "dv", "dq", "dk")]
    span = sorted([ridge, *(k.intensity for k in scans)])
    x = [span[0] / 4, ridge, span[-1] * 4]
    roof = [min(flops, a * bandwidth) / 1e12 for a in x]
    left.plot(x, roof, color=LIMIT, linewidth=2, label=f"{machine.name}, {machine.source}")
    for k, marker in zip(sorted(scans, key=lambda k: k.intensity), "osD^vP*X", strict=False):
        y, text = min(flops, k.intensity * bandwidth) / 1e12, f"{k.name}: {k.intensity:,.0f}"
        left.plot(k.intensity, y, marker, color=COLOURS["tfla exp"], markersize=9, label=text)
    left.set_xscale("log", base=2)
    ticks = [2**n for n in range(12) if x[0] <= 2**n <= x[2]]
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    _plain_log(left)
    _name(left, "The scans of the plan", "FLOP a byte of main memory", "TFLOP/s at most")
    chunks = [2**power for power in range(4, 13)]
    cost = [roofline.paper_cost(chunk, K, V, size) for chunk in chunks]
    green = COLOURS["mlstm_kernels xl sigmoid"]
    text = "the paper's scheme: a state in memory once a chunk"
    right.plot(chunks, [a / b for a, b in cost], color=green, linewidth=2.2, label=text)
    best = roofline.paper_best_chunk(machine, dtype, K, V)
    a, b = roofline.paper_cost(best, K, V, size)
    right.plot(best, a / b, "o", color=green, markersize=9, label=f"its best chunk: {best:.0f}")
    if L is not None:
        forward = next(k for k in kernels if k.name == "h")
        text = f"our h: chunk {L}, state on chip"
        right.plot(L, forward.intensity, "s", color=COLOURS["tfla exp"], markersize=9, label=text)
    right.axhline(ridge, color=LIMIT, ls="--", label=f"the machine: {ridge:,.0f} FLOP/byte")
    right.set_xscale("log", base=2)
    right.set_xticks(chunks, [str(chunk) for chunk in chunks])
    _plain_log(right)
    _name(right, f"Arithmetic intensity, {K}/{V}", "tokens a chunk", "FLOP a byte, forward")
    return _save(_finish(figure, [[left, right]], f"Roofline, {dtype}"), path)


# ---------------------------------------------------------------- parts


def _plain(row: Row) -> str:
    return row["implementation"].split(" @")[0].split(",")[0]


def _after(row: Row, f: float, eps: float) -> list[float]:
    """What the gains of a line after the norm tend to."""
    variant, T = transfer.VARIANTS[row["implementation"]], row["shape"]["T"]
    gates = (transfer.log_gates(variant, i, f) for i in row["i"])
    return [transfer.expected_gain_after(*pair, T, eps) for pair in gates]


def _gate_and_norm(row: Row) -> str:
    gate, _, normaliser = row["implementation"].removeprefix("tfla ").partition(", ")
    return f"mLSTM, input gate {gate}, {normaliser}"


def _dims(row: Row) -> tuple[int, int, int]:
    return row["shape"]["H"], row["shape"]["K"], row["shape"]["V"]


def _curves(ax: Axes, rows: Sequence[Row], x: Callable[[Row], float]) -> None:
    for name in dict.fromkeys(row["implementation"] for row in rows):
        points = sorted((x(r), report.median(r) or 0) for r in rows if r["implementation"] == name)
        ours, style = name.startswith("tfla"), ":" if "graph" in name else "-"
        ax.plot(
            *zip(*points, strict=True),
            color=_colour(name.split(",")[0]),
            linestyle=style,
            marker="o" if ours else "s",
            markersize=6,
            linewidth=2.6 if ours else 1.6,
            label=name,
            zorder=3 if ours else 2,
        )


def _points(line: Any) -> Any:
    """(points, 2) of a curve."""
    return line.get_xydata()


def _label_ends(ax: Axes) -> None:
    """Write the name of each curve at its right end, in its colour, in place of the legend. Call it
    when scales and limits are set: names that would overlap are moved apart."""
    curves = [line for line in ax.get_lines() if len(_points(line)) > 1]
    curves = [line for line in curves if line.get_marker() not in ("None", "")]
    to_axes = ax.transScale + ax.transLimits
    heights = [float(to_axes.transform(_points(line)[-1])[1]) for line in curves]
    ends = sorted(zip(heights, curves, strict=True), key=lambda end: end[0])
    place = -1.0
    for height, line in ends:
        place = max(height, place + 0.055)
        ax.annotate(
            str(line.get_label()),
            (1.0, place),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
        line.set_label(f"_{line.get_label()}")


def _plain_log(ax: Axes, which: str = "y") -> None:
    """A logarithmic axis with numbers that one reads without thinking."""
    from matplotlib.ticker import NullFormatter

    ax.set(**{f"{which}scale": "log"})
    axis = ax.yaxis if which == "y" else ax.xaxis
    low, high = axis.get_view_interval()
    low, high = low / 1.3, high * 1.3
    marks = [m * 10.0**p for p in range(-5, 7) for m in (1, 2, 5) if low < m * 10.0**p < high]
    marks = marks if len(marks) < 10 else [m for m in marks if f"{m:e}"[0] == "1"]
    axis.set_ticks(marks, labels=[f"{m:,.10g}" for m in marks])
    axis.set_minor_formatter(NullFormatter())
    ax.set(**{f"{which}lim": (low, high)})


def _name(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontsize=13)
    ax.set_xlabel(x, fontsize=12)
    ax.set_ylabel(y, fontsize=12)
    ax.minorticks_off()


def _panels(rows: int, columns: int, width: float | None = None) -> tuple[Figure, list[list[Axes]]]:
    # Figure by itself, not pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    """Axes in rows and columns; `width` of all together, in inches."""
    usual = 8.5 if columns == 1 else 12.5
    size = (width or usual, 1.4 + 4.4 * rows)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, alpha=0.25)
        ax.tick_params(labelsize=11)
    return figure, [list(line) for line in axes]


def _finish(figure: Figure, axes: Sequence[Sequence[Axes]], title: str) -> Figure:
    named: dict[str, Any] = {}
    for ax in [ax for line in axes for ax in line]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    where: dict[str, Any] = {"loc": "outside lower left", "ncols": 3, "frameon": False}
    figure.legend(list(named.values()), list(named), fontsize=11, **where)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    return figure


def _save(figure: Figure, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    signature = f"tfla {tfla.__version__}"
    metadata = {"png": {"Software": signature}, "svg": {"Date": None, "Creator": signature}}
    pictures = _pictures(path)
    for file, kind in zip(pictures, metadata, strict=True):
        with files.atomic_file(file, _is_picture) as part:
            figure.savefig(part, format=kind, metadata=metadata[kind])
    return pictures


def _pictures(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]


def _is_picture(path: Path) -> bool:
    """Whether `_save` has written this file: it says so within."""
    if path.suffix == ".png":
        return render.is_plot(path)
    with path.open("rb") as stream:
        return b"<dc:title>tfla " in stream.read(4096)
