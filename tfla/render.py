"""What a person sees of a run: progress and plots, so that cli.py and demo.py know no plotting."""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tfla
from tfla.errors import RunError
from tfla.threads import words
from tfla.xlstm import files
from tfla.xlstm.metrics import UNITS, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

    from tfla.xlstm.run import Run
    from tfla.xlstm.score import Score

# (heading, unit of y, {implementation: [(context, y)]})
Panel = tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]

# One colour an implementation in every plot of the project (Okabe and Ito's, told apart by the
# colour-blind).
COLOURS = {"mLSTM": "#0072B2", "attention": "#D55E00", "gzip -9": "#555555", "training": "#9FC5E8"}


REDRAWING = 0.05  # of the time may go into drawing the curve again


def redrawn(
    records: Iterable[Mapping[str, Any]],
    draw: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Mapping[str, Any]]:
    """The records of `train`; `draw` is called after each evaluation, but where these come so
    quickly that it would take more than REDRAWING of the time. What cannot be drawn is left for the
    end of the run, which then says so."""
    took, last = 0.0, clock()
    for record in records:
        yield record
        now = clock()
        if record["event"] == "eval" and REDRAWING * (now - last) >= took:
            with suppress(OSError, RunError):
                draw()
            last = clock()
            took = last - now


def watch(
    records: Iterable[Mapping[str, Any]],
    console: "Console",
    bytes_per_token: float | None = 1.0,
) -> None:
    """Show the records of `train` as they come: a bar on a terminal, else a line an evaluation.

    Both losses are in one unit: bits a byte, or bits a token where `bytes_per_token` is None.
    """
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
    unit = UNITS["bits_per_byte" if bytes_per_token else "bits_per_token"].replace(" per ", "/")
    text = {"step": "", "training": "", "held-out": "", "speed": "", "threads": "", "left": ""}
    with bar:
        task = bar.add_task("", total=1.0, left="training", right="")
        for record in records:
            done = record["progress"]
            first = done if first is None else first
            if record["event"] == "train":
                text["step"] = f"step {record['step']:,}"
                bits = record["loss"] / math.log(2) / (bytes_per_token or 1.0)
                text["training"] = f"training {bits:.3f} {unit}"
                text["speed"] = f"{record['tokens_per_second']:,.0f} tokens/s"
                if count := record.get("threads"):
                    text["threads"] = words(count)
                if done > first:
                    left = (time.monotonic() - start) * (1 - done) / (done - first)
                    text["left"] = f"{clock(left)} left"
            if record["event"] == "eval":
                found = record[unit_of(record) or "bits_per_byte"]
                text["held-out"] = f"held-out {found:.3f} {unit}"
                if not console.is_terminal:
                    console.print(
                        ", ".join(filter(None, text.values())), highlight=False, soft_wrap=True
                    )
            right = "  ".join(value for name, value in text.items() if value and name != "step")
            bar.update(task, completed=done, left=text["step"] or "training", right=right)


def _files(said: Mapping[str, int]) -> str:
    """How many files, and how large they are together."""
    count, size = said["documents"], said["bytes"]
    text = f"{size / 1e6:,.2f} MB" if size >= 10_000 else f"{size:,} bytes"
    return f"{count:,} file{'s' if count != 1 else ''}, {text}"


@contextmanager
def reading(console: "Console", size: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; the function that it gives is told of bytes as they are read."""
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("reading", total=size)
        yield lambda done: bar.update(task, advance=done)


def scores(console: "Console", found: Sequence["Score"], window: int) -> None:
    """A line a text, and what its numbers are."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("text", overflow="fold")
    for heading in ("bytes", "tokens", "bits/byte", "bits/token", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in found:
        per_byte = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.3f}"
        numbers = [f"{score.bytes:,}", f"{score.tokens:,}", per_byte]
        numbers += [f"{score.bits_per_token:.3f}", f"{score.perplexity:,.2f}"]
        table.add_row(escape(shown(score.name)), *numbers)
    console.print(table)
    line(console, f"in windows of {window:,} tokens; perplexity is that of a token")
    lost = sum(score.lost for score in found[-1:])
    if lost:
        line(
            console,
            f"the tokens do not give back {lost:,} bytes, so bits per byte are not stated",
        )


def shown(name: str) -> str:
    """A file's name as text: it need not be UTF-8."""
    return name.encode("utf-8", "replace").decode()


def describe(run: "Run", on: str, console: "Console") -> None:
    """Corpus, model and plan of a run, and what it is computed on, in three lines; then what its
    tokens do not give back, and what a resumed run is to do otherwise."""
    info, config, options = run.corpus.info, run.config, run.options
    kept, held = info["train"], info["held_out"]
    length = f"{options.steps:,} steps" if options.steps else f"{options.seconds:g} s"
    begun = f", with the weights of {shown(run.init)}" if run.weights and run.init else ""
    begun = f", from step {run.saved.meta['step']:,} on" if run.saved else begun
    left_out = info.get("left_out", {}).get("binary", 0)
    binary = f"; {left_out:,} binary files left out" if left_out else ""
    line(
        console,
        f"{run.corpus.name}: {_files(kept)} to train on; {_files(held)} held out{binary}",
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


@dataclass(frozen=True)
class LossCurve:
    """A run in a picture: its name, its records, and bytes a token where these can be told."""

    name: str
    records: Sequence[Mapping[str, Any]]
    bytes_per_token: float | None


RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")


def loss_curves(runs: Sequence[LossCurve], path: Path, over: str = "seconds") -> None:
    """Held-out loss of runs, with markers, and their training loss, thin, over "seconds" of
    training or "steps": in bits a byte, or a token where tokens do not give the text back.
    RunError when some of the runs are in one of these and some in the other."""
    units = {run.name: next(filter(None, map(unit_of, run.records)), None) for run in runs}
    several = {found: name for name, found in units.items() if found}
    if len(several) > 1:
        words = " and ".join(f"{name} is in {UNITS[found]}" for found, name in several.items())
        raise RunError(f"{words}; give runs of one unit")
    unit = next(iter(several), "bits_per_byte")
    figure, [ax] = _figure(1)
    x, levels = {"seconds": "elapsed", "steps": "step"}[over], []
    for number, run in enumerate(runs):
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        size = run.bytes_per_token if unit == "bits_per_byte" else 1.0
        trained = [r for r in run.records if r["event"] == "train" and size]
        held = [r for r in run.records if r["event"] == "eval"]
        losses = [r["loss"] / math.log(2) / (size or 1.0) for r in trained]
        bits = [r[unit] for r in held]
        ax.plot([r[x] for r in trained], losses, color=colour, linewidth=0.9, alpha=0.45)
        ax.plot(
            [r[x] for r in held],
            bits,
            color=colour,
            marker="o",
            markersize=4,
            linewidth=2.2,
            label=shown(run.name) + (f": {bits[-1]:.3f}" if bits else ""),
        )
        levels += bits + losses
    if levels and unit == "bits_per_byte":
        ax.set_ylim(max(0.0, min(levels) - 0.3), min(max(levels), 8.2) + 0.1)
    ax.set_xlim(left=0)
    ax.set_xlabel("training time (s)" if over == "seconds" else "steps")
    ax.set_ylabel(f"{UNITS[unit]} (lower is better)")
    ax.set_title("held-out text, and training (thin)", loc="left")
    legend = ax.legend(frameon=False, loc="upper right")
    for text in legend.get_texts():
        text.set_parse_math(False)  # it is the name of a folder
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
