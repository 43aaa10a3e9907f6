"""`tfla demo`: train, write, and compare with attention on the machine at hand, in five minutes."""

import gzip
import hashlib
import itertools
import os
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import tfla
from tfla import render
from tfla.threads import Threads, for_generation, requested, words
from tfla.xlstm import files
from tfla.xlstm.metrics import read_metrics
from tfla.xlstm.model import XLSTM
from tfla.xlstm.run import Run, start
from tfla.xlstm.train import Placement, evaluate, train
from tfla.xlstm.writer import load_writer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = dict[str, Any]
Probe = Callable[[int, torch.device], Callable[[], None]]

MODEL = {"hidden_size": 128, "num_layers": 2, "num_heads": 1}
TRAINING = {"context": 256, "batch": 8, "lr": 2.5e-3}
SIGNATURE = "<!-- tfla demo wrote this; sha256 "
READ = 2048  # tokens through which the state is carried at the end: it has only seen 256, and can
PROMPT = "import os\nimport sys\n\n\nclass "
# The comparison is of one sequence, as wide as a model of 256.
HEADS, WIDTH = 4, 64
CONTEXTS = [2**power for power in range(8, 17)]


def run_demo(
    out: Path | None,
    seconds: float,
    device: torch.device,
    seed: int,
    console: "Console",
    threads: int | None = None,
) -> None:
    """The whole demonstration; `out` is by default runs/demo, or the first free runs/demo-N.
    `threads` of a CPU are by default as many as are fastest, each part for itself."""
    began = time.monotonic()
    folder = out or _free_folder(Path("runs/demo"))
    plan = {
        "seconds": seconds,
        "seed": seed,
        "eval_every": 100,
        "eval_bytes": 16384,
        "log_every": 5,
    }
    outputs = {"loss.png": render.is_plot, "context.png": render.is_plot, "demo.md": is_report}
    run = start(folder, MODEL | TRAINING | plan, outputs)
    with run.lock or nullcontext():
        _run(run, seconds, device, seed, console, threads)
    render.line(console, f"took {render.clock(time.monotonic() - began)}")


def _run(
    run: Run,
    seconds: float,
    device: torch.device,
    seed: int,
    console: "Console",
    threads: int | None,
) -> None:
    folder = run.folder
    place = Placement(device)
    on = machine(device)
    if device.type == "cpu":
        asked = requested(threads)
        chosen = Threads(asked) if asked else Threads.adaptive()
        chosen.set()
        place.around_step, on = chosen.step, f"CPU, {chosen}"
    corpus = run.corpus
    megabytes = corpus.info["train"]["bytes"] / 1e6

    _head(console, f"1. Train for {seconds:g} s on {corpus.name}, {megabytes:.1f} MB")
    render.line(console, f"an xLSTM of {run.config.num_parameters():,} parameters, on {on}")
    per_token = None if corpus.lost else corpus.bytes_per_token
    render.watch(train(run, place), console, per_token)
    writer = load_writer(folder, device)
    records = read_metrics(folder / "metrics.jsonl")
    speed = statistics.median(r["tokens_per_second"] for r in records if r["event"] == "train")
    # As much as takes an eighth of the time of the training, and enough for gzip.
    size = max(run.options.eval_bytes, int(1.25 * speed * seconds / 8))
    stream, raw = corpus.held_out(size)
    bits, short = (
        evaluate(writer.model, stream, len(raw), run.options, device, window=window)
        for window in (READ, run.options.context)
    )
    zipped = 8 * len(gzip.compress(raw, 9)) / len(raw)
    verdict = (
        f"held-out text, {len(raw):,} bytes, in windows of {READ:,}: {bits:.3f} bits per byte; "
        f"gzip -9 on the same: {zipped:.3f}"
    )
    render.line(console, "", head=verdict)

    _head(console, "2. Let it write, after a prompt")
    if device.type == "cpu":
        Threads(for_generation(run.config.num_parameters(), threads)).set()
    latest = time.monotonic() + seconds / 10
    console.file.write(PROMPT)
    for piece in writer.write(PROMPT.encode(), 500, temperature=0.7, seed=seed):
        console.file.write(piece)
        console.file.flush()
        if time.monotonic() > latest:
            break
    console.file.write("\n")

    _head(console, f"3. mLSTM beside attention: one sequence, {HEADS} heads of {WIDTH}")
    if device.type == "cpu":
        model = XLSTM(run.config)
        tokens = torch.zeros(run.options.batch, run.options.context, dtype=torch.int64)
        asked = requested(threads)
        settled = Threads(asked) if asked else Threads.fastest(lambda: _pass(model, tokens))
        settled.set()
        render.line(console, f"on {machine(device)}")
    rows = compare(CONTEXTS, seconds / 3, device)
    render.line(
        console,
        "train: forward and backward over the whole context. next: one further token after it.\n"
        "kept: what has to be remembered for that, a state or a cache of keys and values, in fp32.",
    )
    console.print(_table(rows))

    title = f"{run.config.num_parameters() / 1e6:.2f}M-parameter xLSTM on {corpus.name}"
    render.loss_curve(
        records, folder / "loss.png", title=title, gzip_bits=zipped, final=(READ, bits)
    )
    render.curves(
        _panels(rows), folder / "context.png", title=f"mLSTM and attention on {machine(device)}"
    )
    files.write(folder / "demo.md", signed(_report(rows, verdict, device)), is_report)

    _head(console, "4. What this has shown")
    for sentence in findings(seconds, rows, bits, short, zipped, len(raw)):
        render.line(console, f"- {sentence}")
    render.line(console, f"plots: {folder}/loss.png, {folder}/context.png; table: {folder}/demo.md")
    render.line(console, f'more of its prose: tfla generate {shlex.quote(str(folder))} "def "')


def findings(
    seconds: float, rows: Sequence[Row], bits: float, short: float, zipped: float, size: int
) -> list[str]:
    """What the demonstration has measured, a sentence each: `bits` a byte in long windows, `short`
    in those of the training, `zipped` by gzip."""
    learns = "It learns" if bits < 8 else "It has not learnt"
    carried = "is of use" if bits < short else "was of no use"
    said = [
        f"{learns}: after {seconds:,.0f} s of training it needs {bits:.2f} bits a byte for "
        f"{size:,} bytes that it has never seen, where chance needs 8 and gzip -9 {zipped:.2f}.",
        f"Its state {carried} beyond the {TRAINING['context']} tokens that it was trained on: the "
        f"same text in windows of {READ:,} tokens takes {bits:.2f} bits a byte, in windows of "
        f"{TRAINING['context']} {short:.2f}.",
    ]
    ours = [(row["context"], row["mLSTM"]) for row in rows if row["mLSTM"] is not None]
    both = [row for row in rows if row["mLSTM"] is not None and row["attention"] is not None]
    if not ours or not both:
        return said
    (least, first), (long, last) = ours[0], ours[-1]
    widest = both[-1]
    T, one, other = widest["context"], widest["mLSTM"], widest["attention"]
    start = both[0]["attention"]
    said.append(
        f"The time of training is linear in the context: of {long:,} tokens each costs "
        f"{last['train'] / first['train']:.1f} times what each of {least:,} does; with attention "
        f"each of {T:,} costs {other['train'] / start['train']:.1f} times what each of "
        f"{both[0]['context']:,} does, and {other['train'] / one['train']:.1f} times the mLSTM's."
    )
    said.append(
        f"The memory of writing is constant: whatever came before, the mLSTM keeps "
        f"{one['bytes'] / 1024:,.0f} KiB; attention keeps {other['bytes'] / 1024:,.0f} KiB after "
        f"{T:,} tokens."
    )
    said.append(
        f"So is its time: the next token takes the mLSTM {one['next'] * 1e6:,.0f} us after {T:,} "
        f"tokens, {both[0]['mLSTM']['next'] * 1e6:,.0f} after {both[0]['context']:,}; attention "
        f"{other['next'] * 1e6:,.0f} and {start['next'] * 1e6:,.0f}."
    )
    return said


def _pass(model: XLSTM, tokens: torch.Tensor) -> None:
    model(tokens)[0].sum().backward()


def compare(contexts: Sequence[int], budget: float, device: torch.device) -> list[Row]:
    """Time mLSTM and causal attention of the same width at each context, in about `budget` seconds.

    A row has "context" in tokens and, by implementation, "train": seconds a token of forward and
    backward over the whole sequence, "next": seconds for one further token, "bytes": what has to be
    kept for that. Each implementation has half of the time; what would take longer is None.
    """
    left = dict.fromkeys(PAIR, budget / 2)
    whole = dict.fromkeys(PAIR, 0.0)  # seconds of the last pass over a whole sequence
    rows: list[Row] = []
    for T in contexts:
        row: Row = {"context": T}
        for name, (train_step, next_token, size, growth) in PAIR.items():
            row[name] = None
            if growth * whole[name] > left[name]:
                left[name] = 0.0
                continue
            started = time.perf_counter()
            whole[name] = _seconds(train_step(T, device), device)
            row[name] = {
                "train": whole[name] / T,
                "next": _seconds(next_token(T, device), device),
                "bytes": size(T),
            }
            left[name] -= time.perf_counter() - started
        if all(row[name] is None for name in PAIR):
            break
        rows.append(row)
    return rows


def _mlstm_train(T: int, device: torch.device) -> Callable[[], None]:
    q, k, v, grad = torch.randn(4, 1, T, HEADS, WIDTH, device=device).unbind()
    i, f = torch.randn(2, 1, T, HEADS, device=device).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v, i, f + 4)]

    def once() -> None:
        h, _ = tfla.mlstm(*leaves)
        torch.autograd.grad(h, leaves, grad)

    return once


def _attention_train(T: int, device: torch.device) -> Callable[[], None]:
    q, k, v, grad = torch.randn(4, 1, HEADS, T, WIDTH, device=device).unbind()
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def once() -> None:
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(h, (q, k, v), grad)

    return once


def _mlstm_next(T: int, device: torch.device) -> Callable[[], None]:
    q, k, v = torch.randn(3, 1, HEADS, WIDTH, device=device).unbind()
    i, f = torch.randn(2, 1, HEADS, device=device).unbind()
    C = torch.randn(1, HEADS, WIDTH, WIDTH, device=device)
    state = tfla.State(C, C[..., 0].contiguous(), torch.zeros(1, HEADS, device=device))

    def once() -> None:
        with torch.no_grad():
            tfla.mlstm_step(q, k, v, i, f, state, inplace=True)

    return once


def _attention_next(T: int, device: torch.device) -> Callable[[], None]:
    q = torch.randn(1, HEADS, 1, WIDTH, device=device)
    k, v = torch.randn(2, 1, HEADS, T, WIDTH, device=device).unbind()

    def once() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v)

    return once


# Name: forward and backward of T tokens, the next token after T, bytes kept after T (fp32), growth
# of the first when T doubles.
PAIR: dict[str, tuple[Probe, Probe, Callable[[int], int], float]] = {
    "mLSTM": (_mlstm_train, _mlstm_next, lambda T: 4 * HEADS * (WIDTH * WIDTH + WIDTH + 1), 2.0),
    "attention": (_attention_train, _attention_next, lambda T: 4 * HEADS * 2 * T * WIDTH, 4.0),
}


def _seconds(once: Callable[[], None], device: torch.device, enough: float = 0.5) -> float:
    """The fastest of up to 30 calls, or of as many as begin within `enough` seconds, and three of
    those that take less than a second: the first has to wake the threads."""
    times: list[float] = []
    while True:
        started = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        few = len(times) < 3 and times[-1] < 1
        if len(times) == 30 or (sum(times) > enough and not few):
            return min(times)


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {words(torch.get_num_threads())}" if device.type == "cpu" else str(device)


def _cells(rows: list[Row]) -> list[list[str]]:
    """The table's body: one line a context, "-" where nothing was measured."""

    def cell(row: Row, name: str, field: str, factor: float, form: str) -> str:
        return "-" if row[name] is None else format(row[name][field] * factor, form)

    body = []
    for row in rows:
        both = row["mLSTM"] is not None and row["attention"] is not None
        ratio = f"{row['attention']['train'] / row['mLSTM']['train']:.1f}x" if both else "-"
        times = [cell(row, name, "train", 1e6, ",.1f") for name in PAIR] + [ratio]
        times += [cell(row, name, "next", 1e6, ",.0f") for name in PAIR]
        times += [cell(row, name, "bytes", 2**-10, ",.0f") for name in PAIR]
        body.append([f"{row['context']:,}", *times])
    return body


HEADINGS = [
    "context\ntokens",
    "train\nmLSTM\nµs/token",
    "train\nattention\nµs/token",
    "\nfaster\nby",
    "next\nmLSTM\nµs",
    "next\nattention\nµs",
    "kept\nmLSTM\nKiB",
    "kept\nattention\nKiB",
]


def _table(rows: list[Row]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for line in _cells(rows):
        table.add_row(*line)
    return table


def _report(rows: list[Row], verdict: str, device: torch.device) -> str:
    lines = [[" ".join(h.split()) for h in HEADINGS], ["---:"] * len(HEADINGS), *_cells(rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    setting = f"{HEADS} heads of {WIDTH}, one sequence, fp32, {machine(device)}"
    return f"{verdict}\n\n{setting}, torch {torch.__version__}\n\n{body}\n"


def signed(report: str) -> bytes:
    """A report with a last line, invisible when it is shown, by which `is_report` knows it."""
    digest = hashlib.sha256(report.encode()).hexdigest()
    return f"{report}\n{SIGNATURE}{digest} -->\n".encode()


def is_report(path: Path) -> bool:
    """Whether `path` is a report as `signed` wrote it, not changed since."""
    text, found, digest = path.read_bytes().rpartition(b"\n" + SIGNATURE.encode())
    return bool(found) and digest.startswith(hashlib.sha256(text).hexdigest().encode())


def _panels(rows: list[Row]) -> list[render.Panel]:
    def line(name: str, field: str) -> list[tuple[float, float]]:
        return [(row["context"], row[name][field] * 1e6) for row in rows if row[name] is not None]

    titles = {"train": "Training: forward + backward", "next": "Writing: the next token"}
    return [
        (title, "µs per token", {name: line(name, field) for name in PAIR})
        for field, title in titles.items()
    ]


def _free_folder(wanted: Path) -> Path:
    further = (wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(2))
    names = itertools.chain([wanted], further)
    return next(path for path in names if not os.path.lexists(path) or _is_empty(path))


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _head(console: "Console", text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")
