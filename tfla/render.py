"""What a person sees of a run: progress and plots, so that cli.py and demo.py know no plotting."""

import io
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tfla
from tfla.threads import words
from tfla.xlstm import files
from tfla.xlstm.metrics import UNITS, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

    from tfla.xlstm.run import Run

# (heading, unit of y, {implementation: [(context, y)]})
Panel = tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]

# One colour an implementation in every plot of the project (Okabe and Ito's, told apart by the
# colour-blind).
COLOURS = {"mLSTM": "#0072B2", "attention": "#D55E00", "gzip -9": "#555555", "training": "#9FC5E8"}


def watch(records: Iterable[Mapping[str, Any]], console: "Console") -> None:
    """Show the records of `train` as they come: a bar on a terminal, else a line an evaluation."""
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("[bold]{task.fields[left]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[right]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    start, first = time.monotonic(), None
    text = {"step": "", "loss": "", "held-out": "", "speed": "", "threads": "", "left": ""}
    with bar:
        task = bar.add_task("", total=1.0, left="training", right="")
        for record in records:
            done = record["progress"]
            first = done if first is None else first
            if record["event"] == "train":
                text["step"] = f"step {record['step']:,}"
                text["loss"] = f"loss {record['loss']:.3f}"
                text["speed"] = f"{record['tokens_per_second']:,.0f} tokens/s"
                if count := record.get("threads"):
                    text["threads"] = words(count)
                if done > first:
                    left = (time.monotonic() - start) * (1 - done) / (done - first)
                    text["left"] = f"{clock(left)} left"
            if record["event"] == "eval":
                unit = unit_of(record) or "bits_per_byte"
                short = UNITS[unit].replace(" per ", "/")
                text["held-out"] = f"held-out {record[unit]:.3f} {short}"
                if not console.is_terminal:
                    console.print(
                        ", ".join(filter(None, text.values())), highlight=False, soft_wrap=True
                    )
            right = "  ".join(value for name, value in text.items() if value and name != "step")
            bar.update(task, completed=done, left=text["step"] or "training", right=right)


def describe(run: "Run", on: str, console: "Console") -> None:
    """Corpus, model and plan of a run, and what it is computed on, in three lines; then what its
    tokens do not give back, and what a resumed run is to do otherwise."""
    info, config, options = run.corpus.info, run.config, run.options
    kept, held = info["train"], info["held_out"]
    length = f"{options.steps:,} steps" if options.steps else f"{options.seconds:g} s"
    begun = f", from step {run.saved.meta['step']:,} on" if run.saved else ""
    left_out = info.get("left_out", {}).get("binary", 0)
    binary = f"; {left_out:,} binary files left out" if left_out else ""
    line(
        console,
        f"{run.corpus.name}: {kept['documents']:,} files, "
        f"{kept['bytes'] / 1e6:.2f} MB to train on; {held['documents']:,} files, "
        f"{held['bytes'] / 1e6:.2f} MB held out{binary}",
        head="corpus   ",
    )
    line(
        console,
        f"{config.num_parameters():,} parameters, "
        f"{config.flops_per_token(training=True) / 1e6:.1f} MFLOP a trained token, "
        f"{config.state_bytes() / 1024:.0f} KiB of state a sequence",
        head="model    ",
    )
    line(
        console,
        f"{length} of {options.tokens_per_step:,} tokens{begun}, into {run.folder}, on {on}",
        head="training ",
    )
    if lost := run.corpus.lost:
        line(
            console,
            f"do not give back {lost:,} of {held['bytes']:,} bytes of "
            f"held-out text ({lost / held['bytes']:.2%}), so results are in bits per token, "
            "not per byte",
            head="tokens   ",
        )
    for change in run.changes:
        line(console, change, head="changed  ")


def line(console: "Console", text: str, head: str = "") -> None:
    """Print one line that is not folded at the console's width, after a bold `head`. The text may
    be the name of a file, in which brackets are no markup."""
    from rich.text import Text

    whole = Text.assemble((head, "bold"), text)
    console.print(whole, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """3:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def loss_curve(
    records: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    gzip_bits: float | None = None,
    final: tuple[int, float] | None = None,
    bytes_per_token: float | None = 1.0,
) -> None:
    """Bits a byte against seconds of training: each step's training loss, the held-out evaluations,
    gzip's line.

    `bytes_per_token` turns nats a token into bits a byte; None: the plot is in bits a token.
    `final` marks an evaluation after the training: the tokens of its windows, which are longer than
    those of the others, and its bits. Numbers stand in the legend, where no curve covers them.
    """
    import math

    trained = [r for r in records if r["event"] == "train"]
    unit = "bits_per_byte" if bytes_per_token else "bits_per_token"
    held = [r for r in records if r["event"] == "eval" and unit in r]
    figure, axes = _figure(1)
    [ax] = axes
    scale = 1 / (math.log(2) * (bytes_per_token or 1.0))
    ax.plot(
        [r["elapsed"] for r in trained],
        [r["loss"] * scale for r in trained],
        color=COLOURS["training"],
        linewidth=1.2,
        label="training batches",
    )
    times, bits = [r["elapsed"] for r in held], [r[unit] for r in held]
    ax.plot(
        times,
        bits,
        color=COLOURS["mLSTM"],
        marker="o",
        markersize=4,
        linewidth=2.2,
        label=f"held-out text: {bits[-1]:.2f} at the end" if bits else "held-out text",
    )
    if final is not None:
        window, last = final
        at = times[-1] if times else trained[-1]["elapsed"] if trained else 0.0
        ax.plot(
            [at],
            [last],
            color=COLOURS["mLSTM"],
            marker="D",
            markersize=8,
            linestyle="none",
            label=f"after training, in windows of {window:,} tokens: {last:.2f}",
        )
    if gzip_bits is not None:
        text = f"gzip -9 of that text: {gzip_bits:.2f}"
        ax.axhline(gzip_bits, color=COLOURS["gzip -9"], linestyle="--", linewidth=1.5, label=text)
    levels = [r["loss"] * scale for r in trained] + bits
    if levels:
        marks = [gzip_bits] if gzip_bits is not None else []
        lowest = min(*levels, *marks, *([final[1]] if final else []), max(levels))
        highest = min(max(levels), 8.2) if bytes_per_token else max(levels)
        ax.set_ylim(max(0.0, lowest - 0.4), max(highest, lowest) + 0.1)
    ax.set_xlim(left=0)
    ax.set_xlabel("training time (s)")
    ax.set_ylabel(f"{UNITS[unit]} (lower is better)")
    ax.set_title(title, loc="left", parse_math=False)  # it may hold the name of a file
    ax.legend(frameon=False, loc="upper right")
    _finish(figure, path)


def curves(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Log-log panels side by side, their curves named above them, where none of them lies."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = _figure(len(panels))
    named = {}
    for ax, (heading, unit, lines) in zip(axes, panels, strict=True):
        for name, points in lines.items():
            if points:
                x, y = zip(*points, strict=True)
                [curve] = ax.plot(
                    x, y, color=COLOURS[name], marker="o", markersize=5, linewidth=2.2
                )
                named[name] = curve
        ticks = sorted({x for points in lines.values() for x, _ in points})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(ticks, [f"{t / 1024:g}k" if t >= 1024 else f"{t:g}" for t in ticks])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        values = [y for points in lines.values() for _, y in points]
        if values:
            ax.set_ylim(min(values) / 2, max(values) * 2)
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel(unit)
        ax.set_title(heading, loc="left", fontsize=12)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, parse_math=False)
    if named:
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside upper right",
            ncols=len(named),
            frameon=False,
            fontsize=12,
        )
    _finish(figure, path)


def _figure(panels: int) -> "tuple[Figure, list[Axes]]":
    # Figure by itself, not pyplot: no display, no global state, nothing to close.
    if "matplotlib" not in sys.modules:  # which refuses to be imported for a backend of its user
        os.environ.pop("MPLBACKEND", None)  # that it does not know, and that nothing here uses
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(8.5 if panels == 1 else 5.8 * panels, 5.0), layout="constrained", dpi=150
    )
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, alpha=0.25)
        ax.tick_params(labelsize=11)
        ax.xaxis.label.set_fontsize(12)
        ax.yaxis.label.set_fontsize(12)
        ax.title.set_fontsize(13)
    return figure, axes


def _finish(figure: "Figure", path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": f"tfla {tfla.__version__}"})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, buffer.getvalue(), is_plot)


def is_plot(path: Path) -> bool:
    """Whether this file has drawn the picture in `path`: it says so within."""
    return _drawn_by(path, b"tEXtSoftware\0tfla ")


def keep_old_plot(path: Path) -> Path | None:
    """Give a plot of a version of tfla that did not sign its plots another name; returns it.

    Those were Matplotlib's, of 1275 x 750 pixels. It may be another's, so nothing is overwritten.
    """
    size = (1275).to_bytes(4, "big") + (750).to_bytes(4, "big")
    if not _drawn_by(path, b"tEXtSoftware\0Matplotlib version", b"IHDR" + size):
        return None
    free = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, 10**6))
    kept = next(name for name in free if not os.path.lexists(name))
    path.rename(kept)
    return kept


def _drawn_by(path: Path, *signs: bytes) -> bool:
    """Whether a file is a PNG whose head holds these signs."""
    if not files.is_regular(path):
        return False
    with path.open("rb") as stream:
        head = stream.read(1024)
    return head.startswith(b"\x89PNG\r\n\x1a\n") and all(sign in head for sign in signs)
