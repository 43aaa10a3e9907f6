"""The command `tfla`: reads options, calls the library, prints; it computes nothing.

A further command is a function under `@app.command(...)` that imports what it needs in its body:
`tfla --help` does not wait for torch. What the person at the keyboard can put right is a RunError:
one line, exit status 2.
"""

import importlib.util
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tfla import signals

if Path(sys.argv[0] or ".").stem == "tfla":  # the command, and no program that imports this file
    signals.end_silently()
try:
    import typer
except ModuleNotFoundError:
    print("tfla: typer is not installed; in a clone: pip install '.[train]'", file=sys.stderr)
    raise SystemExit(2) from None

import tfla
from tfla import bench
from tfla import threads as threads_
from tfla.errors import RunError

if TYPE_CHECKING:
    import torch

    from tfla.threads import Threads
    from tfla.xlstm.run import Run
    from tfla.xlstm.train import Placement
    from tfla.xlstm.writer import Writer

LESS = "take a smaller --batch, a larger --accumulate, or a smaller model"
# Shapes of a model by name, and its parameters where a token is a byte.
SIZES = {
    "tiny": ({"hidden_size": 128, "num_layers": 2, "num_heads": 1}, "0.5M"),
    "small": ({"hidden_size": 256, "num_layers": 4, "num_heads": 2}, "3.4M"),
    "medium": ({"hidden_size": 512, "num_layers": 8, "num_heads": 4}, "26M"),
    "large": ({"hidden_size": 768, "num_layers": 12, "num_heads": 6}, "85M"),
    "xl": ({"hidden_size": 1024, "num_layers": 24, "num_heads": 4}, "304M"),
}
EXTRAS = {"rich", "matplotlib", "numpy", "safetensors", "tokenizers"}
# What typer raises about the command line: click's class in its older versions, its own since.
UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="tfla",
    help="Train xLSTM language models and let them write, on any machine.\n\n"
    "Start with [bold]tfla demo[/bold]; [bold]tfla COMMAND --help[/bold] explains the others.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _option(panel: str | None, text: str, *names: str, default: str | None = None) -> Any:
    """An option of a panel of the help; `default` says in words what happens without it."""
    text = text if not default else rf"{text} \[default: {default}]"
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=default is None)


_run, _data, _model = partial(_option, "Run"), partial(_option, "Data"), partial(_option, "Model")
_training, _text = partial(_option, "Training"), partial(_option, "Text")
_sampling = partial(_option, "Sampling")
MODEL_FOLDER = (
    "Folder that tfla train wrote, one checkpoint in it, or a folder in transformers' format."
)
DEVICE = "Where to compute: cpu, cuda or cuda:1; auto takes a GPU when there is one."
THREADS = "CPU threads to compute with; OMP_NUM_THREADS, where it is set, is the default."


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tfla {tfla.__version__}")
        raise typer.Exit()


@app.callback()
def _tfla(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command(
    short_help="Train a language model on files, or on Python's own sources.",
    epilog="Example: [bold]tfla train ~/texts --out runs/texts --seconds 600[/bold]\n\n"
    "After a break: [bold]tfla train --out runs/texts --resume[/bold]",
)
def train(
    command: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders to train on. Folders are searched to the bottom; names in them "
            "that start with a dot, and binary files, are left out. Without any: the sources of "
            "Python's standard library, without its tests.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, _run("Folder for checkpoints, metrics.jsonl and loss.png.")] = Path(
        "runs/train"
    ),
    resume: Annotated[
        bool,
        _run(
            "Continue the run in --out from its last checkpoint, with the options it had; options "
            "that are passed again replace them. Without a checkpoint it starts at the beginning.",
            "--resume",
        ),
    ] = False,
    steps: Annotated[
        int | None, _run("Train this many steps.", default="1000, without --seconds")
    ] = None,
    seconds: Annotated[
        float | None,
        _run("Train this many seconds; the learning rate then follows the clock.", default=""),
    ] = None,
    seed: Annotated[int, _run("Start of all random numbers.")] = 0,
    device: Annotated[str, _run(DEVICE)] = "auto",
    threads: Annotated[
        int | None,
        _run(
            THREADS,
            default="the fastest: with --seconds chosen anew as the machine is busy or idle, "
            "with --steps at the start",
        ),
    ] = None,
    context_ranks: Annotated[
        int, _run("Under torchrun: processes that share each window, its tokens split among them.")
    ] = 1,
    recompute: Annotated[
        bool,
        _run(
            "Under torchrun: keep only what enters the blocks for the backward pass, compute the "
            "rest again.",
            "--recompute",
        ),
    ] = False,
    compile: Annotated[
        bool,
        _run(
            "Compile the blocks of the model: some time at the start, more tokens a second "
            "after it.",
            "--compile",
        ),
    ] = False,
    precision: Annotated[
        str, _run("fp32 or bf16; auto: bf16 on a GPU that has it, else fp32.")
    ] = "auto",
    save_every: Annotated[
        int,
        _run("Steps between checkpoints; the last two are kept, and the best on held-out text."),
    ] = 100,
    save_every_seconds: Annotated[
        float, _run("Seconds after which there is a checkpoint, whatever the step.")
    ] = 300.0,
    eval_every: Annotated[int, _run("Steps between evaluations on held-out text.")] = 100,
    eval_bytes: Annotated[int, _run("Bytes of held-out text in an evaluation.")] = 65536,
    log_every: Annotated[int, _run("Steps between lines in metrics.jsonl.")] = 10,
    tokenizer: Annotated[
        Path | None,
        _data("A tokenizer.json of the tokenizers library.", default="one token a byte"),
    ] = None,
    held_out: Annotated[
        float, _data("Share of the bytes that is never trained on: whole files, picked by name.")
    ] = 0.05,
    include: Annotated[
        list[str] | None,
        _data(
            "Of folders read only files that fit this pattern, '*.py' or 'src/*.py'; can be given "
            "several times.",
            default="all",
        ),
    ] = None,
    init: Annotated[
        Path | None,
        _model(
            "Start with the weights, the shape and the tokenizer of this run, checkpoint, or "
            "folder in transformers' format; a smaller --lr is then better.",
            default="random weights",
        ),
    ] = None,
    size: Annotated[
        str | None,
        _model(
            "The three options below by one name, for "
            + ", ".join(f"{name} ({number})" for name, (_, number) in SIZES.items())
            + " parameters where a token is a byte.",
            default="tiny",
        ),
    ] = None,
    hidden_size: Annotated[int, _model("Width; half of it must divide by --num-heads.")] = 128,
    num_layers: Annotated[int, _model("Number of blocks.")] = 2,
    num_heads: Annotated[int, _model("mLSTM heads in a block.")] = 1,
    input_gate: Annotated[
        str, _model("exp (the paper's mLSTMexp) or sigmoid (its mLSTMsig).")
    ] = "exp",
    context: Annotated[int, _training("Tokens in a training window.")] = 256,
    batch: Annotated[int, _training("Windows in a forward pass.")] = 8,
    accumulate: Annotated[
        int,
        _training("Forward passes in a step: a batch this many times larger in the same memory."),
    ] = 1,
    lr: Annotated[float, _training("AdamW's learning rate at its peak.")] = 2.5e-3,
    warmup: Annotated[
        float, _training("Share of the run in which the learning rate rises.")
    ] = 0.05,
    final_lr: Annotated[float, _training("Share of the peak that the cosine ends at.")] = 0.1,
    weight_decay: Annotated[
        float, _training("For matrices; norms, biases, gates and embeddings have none.")
    ] = 0.1,
    clip: Annotated[float, _training("A gradient of a larger norm is scaled down to it.")] = 1.0,
) -> None:
    """Train an xLSTM language model. A run that was stopped or killed goes on with --resume;
    ctrl-C, SIGTERM and SIGHUP save a checkpoint first (a second ctrl-C does not wait for it).
    It is judged in bits per byte on held-out text: 8 is chance, lower is better, gzip -9 needs
    about 2 for source code. One process at a time writes to --out, and nothing is overwritten
    there that tfla has not written.
    """
    # fmt: on
    _require("rich", "matplotlib", "numpy", "safetensors", *(["tokenizers"] if tokenizer else []))
    from rich.console import Console

    from tfla import render
    from tfla.xlstm import checkpoint, metrics
    from tfla.xlstm import run as runs
    from tfla.xlstm import train as training
    from tfla.xlstm.writer import read_base

    plot, outputs = out / "loss.png", {"loss.png": render.is_plot}
    sources = {name: command.get_parameter_source(name) for name in command.params}
    given = {n: command.params[n] for n, x in sources.items() if x and x.name == "COMMANDLINE"}
    if size is not None:
        if size not in SIZES:
            raise RunError(f"--size is {size}; it must be one of {', '.join(SIZES)}")
        given = SIZES[size][0] | given

    def make() -> runs.Run:
        if resume and checkpoint.exists(out):
            if kept := render.keep_old_plot(plot):
                _say(f"{plot} is of an earlier version, or not ours; it is now {kept}")
            return runs.resume(out, given, outputs)
        if resume:
            _say(f"{out} holds no checkpoint; starting at the beginning, with these options")
        unlimited = steps is None and seconds is None
        values = command.params | given | ({"steps": 1000} if unlimited else {})
        base = None
        if init is not None:
            base = read_base(init)
            shape = SIZES["tiny"][0].keys() | {"input_gate"}  # what is not given is as it has it
            values = {n: x for n, x in values.items() if n in given or n not in shape}
        return runs.start(out, values, outputs, base)

    same = {name: str(value) for name, value in command.params.items()}
    place = _placement(
        device, context_ranks, recompute, compile, same, lambda: threads_.requested(threads)
    )
    console = Console(quiet=not place.main, file=_Lasting())
    status = 0  # not the error: its frames hold the run, and so its lock
    with ExitStack() as held:  # the lock of the run, until the plot is drawn
        received = held.enter_context(signals.Signals())
        place.signalled = lambda: received.noted
        with place.together(), _warnings_in_a_line():
            run = place.share(make)
            held.enter_context(run.lock or nullcontext())
            on = str(place.device)
            if place.device.type == "cpu":
                chosen = _threads_for(run, place, threads)
                chosen.set()  # the checkpoint before the first step names them too
                place.around_step = chosen.step
                on = f"CPU, {chosen}"
            render.describe(run, on, console)
            per_token = None if run.corpus.lost else run.corpus.bytes_per_token

            def draw() -> None:
                render.loss_curve(
                    metrics.read_metrics(out / runs.METRICS),
                    plot,
                    title=f"Training on {run.corpus.name}",
                    bytes_per_token=per_token,
                )

            try:
                with received.held():
                    records = training.train(run, place)
                    seen = render.redrawn(records, draw) if place.main else records
                    render.watch(seen, console, per_token)
            except (signals.Interrupted, KeyboardInterrupt) as error:
                status = signals.exit_status(error)
        if not place.main:
            if status:
                raise typer.Exit(status)
            return
        draw()
    if status:
        _say(f"stopped; go on with: tfla train --out {shlex.quote(str(out))} --resume")
        raise typer.Exit(status)
    unit = "bits_per_token" if run.corpus.lost else "bits_per_byte"
    evaluations = metrics.read_metrics(out / runs.METRICS)
    bits = [record[unit] for record in evaluations if unit in record]
    result = f"{bits[-1]:.3f} {metrics.UNITS[unit]}" if bits else "not in metrics.jsonl any more"
    render.line(console, f"held-out text: {result}; the curve: {out}/loss.png")
    render.line(console, f'let it write: tfla generate {shlex.quote(str(out))} "import "')


@app.command(
    short_help="Let a trained model continue a text.",
    epilog='Example: [bold]tfla generate runs/train "def main(" --tokens 300 --seed 1[/bold]',
)
def generate(
    run: Annotated[
        Path,
        typer.Argument(help=MODEL_FOLDER, show_default=False),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue; - reads it from the standard input. Without one a new document "
            "begins.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[Path | None, _text("Read the prompt from this file.", default="")] = None,
    tokens: Annotated[
        int, _text("Write at most this many tokens (bytes, without a tokenizer).")
    ] = 400,
    stop: Annotated[
        list[str] | None,
        _text("Stop before this text appears; can be given several times.", default=""),
    ] = None,
    temperature: Annotated[
        float, _sampling("0 takes the likeliest token, 1 samples as the model says.")
    ] = 0.8,
    top_k: Annotated[
        int | None, _sampling("Sample among this many likeliest tokens.", default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        _sampling("Sample among the likeliest tokens that sum to this probability.", default="all"),
    ] = None,
    seed: Annotated[
        int | None,
        _sampling("The same seed writes the same text.", default="another text each time"),
    ] = None,
    device: Annotated[str, _option(None, DEVICE)] = "auto",
    threads: Annotated[
        int | None, _option(None, THREADS, default="1 for small models, more for large ones")
    ] = None,
) -> None:
    """Continue a text with a trained model, character by character, on the standard output.
    The prompt is read in one pass; after it a token costs the same however long the text becomes.
    """
    # fmt: on
    _require("numpy", "safetensors")
    if file is not None and prompt is not None:
        raise RunError("a prompt and --file are both given; give one of them")
    if file is not None:
        text = file.read_bytes()
    elif prompt == "-":
        text = sys.stdin.buffer.read()
    else:
        text = (prompt or "").encode("utf-8", "surrogateescape")
    writer, noticed = _loaded(run, device, threads)
    pieces = writer.write(
        text, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop or ()
    )
    shown = text[: len(text) - len(writer.codec.unfinished(text))]  # the rest comes with the pieces
    print(shown.decode("utf-8", "replace"), end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    for warning in noticed:  # where it ends in an error, that says enough
        _say(f"warning: {warning}")


def _loaded(run: Path, device: str, threads: int | None) -> tuple["Writer", list[str]]:
    """The model to write with, on its device and with its threads; and what is to be said of it."""
    from tfla.xlstm.checkpoint import WeightsWarning
    from tfla.xlstm.writer import load_writer

    threads_.requested(threads)
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always", WeightsWarning)
        writer = load_writer(run, _device(device))
    if writer.model.embedding.weight.device.type == "cpu":
        size = writer.model.config.num_parameters()
        threads_.Threads(threads_.for_generation(size, threads)).set()
    signals.look()
    return writer, [str(warning.message) for warning in noticed]


@app.command(
    short_help="Write by turns with a trained model.",
    epilog="Example: [bold]tfla chat runs/train --tokens 100[/bold]",
)
def chat(
    run: Annotated[Path, typer.Argument(help=MODEL_FOLDER, show_default=False)],
    tokens: Annotated[int, _text("The model writes at most this many tokens at a time.")] = 200,
    stop: Annotated[
        list[str] | None,
        _text("Its turn ends before this text; can be given several times.", default=""),
    ] = None,
    temperature: Annotated[
        float, _sampling("0 takes the likeliest token, 1 samples as the model says.")
    ] = 0.8,
    top_k: Annotated[
        int | None, _sampling("Sample among this many likeliest tokens.", default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        _sampling("Sample among the likeliest tokens that sum to this probability.", default="all"),
    ] = None,
    seed: Annotated[
        int | None,
        _sampling("The same seed writes the same text.", default="another text each time"),
    ] = None,
    device: Annotated[str, _option(None, DEVICE)] = "auto",
    threads: Annotated[
        int | None, _option(None, THREADS, default="1 for small models, more for large ones")
    ] = None,
) -> None:
    """Read lines and continue each, until the end of the input (ctrl-D). The model has one text
    before it, of all your lines and its own; it keeps a state of it, so a turn costs the same
    however long the text becomes. It knows nothing of questions and answers but what its training
    had. An empty line lets it go on; /new begins a new text; ctrl-C ends its turn.
    """
    # fmt: on
    _require("numpy", "safetensors")
    from tfla.xlstm.writer import Dialogue, Sampling

    writer, noticed = _loaded(run, device, threads)
    for warning in noticed:
        _say(f"warning: {warning}")
    sampling = Sampling(temperature, top_k, top_p, seed)
    dialogue = Dialogue(writer, sampling)
    while (line := _typed_line()) is not None:
        if line.strip() == b"/new":
            dialogue = Dialogue(writer, sampling)
            continue
        with signals.Signals() as received, received.held():
            for piece in dialogue.say(line if line.strip() else b"", tokens, stop or ()):
                print(piece, end="", flush=True)
                if received.noted:
                    break
        print(flush=True)
        if received.noted and received.noted != signals.INTERRUPT:
            raise signals.Interrupted(received.noted)


def _typed_line() -> bytes | None:
    """The next line of the standard input, with its end; None after the last."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # arrows work in what is typed
        try:
            return input("> ").encode("utf-8", "surrogateescape") + b"\n"
        except EOFError:
            print()
            return None
    return sys.stdin.buffer.readline() or None


@app.command(
    "eval",
    short_help="How well a trained model expects a text: bits per byte, perplexity.",
    epilog="Example: [bold]tfla eval runs/train ~/other/texts[/bold]",
)
def evaluate(
    run: Annotated[Path, typer.Argument(help=MODEL_FOLDER, show_default=False)],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders of text, read as tfla train reads them. Without any: the "
            "held-out text of the run, all of it.",
            show_default=False,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        _option(None, "Of folders read only files that fit this pattern.", default="all"),
    ] = None,
    each: Annotated[bool, _option(None, "A line a file, and one for all.", "--each")] = False,
    context: Annotated[
        int | None,
        _option(
            None,
            "Tokens in a window; each is read from an empty state.",
            default="as in the training, or 2048",
        ),
    ] = None,
    precision: Annotated[
        str, _option(None, "fp32 or bf16; auto: bf16 on a GPU that has it, else fp32.")
    ] = "auto",
    device: Annotated[str, _option(None, DEVICE)] = "auto",
    threads: Annotated[int | None, _option(None, THREADS, default="a thread a core")] = None,
) -> None:
    """Print what a text costs with the model: bits per byte and per token, and perplexity, 2 to the
    power of the bits per token. The text is one stream, each file behind the token that ends a
    document, read in windows as in training: the first tokens of a window cost most.
    """
    # fmt: on
    _require("rich", "numpy", "safetensors")
    from rich.console import Console

    from tfla import render
    from tfla.xlstm import checkpoint, data, score
    from tfla.xlstm.writer import is_transformers_folder

    if context is not None and not 1 <= context < 2**31:
        raise RunError(f"--context is {context}; it must be from 1 to 2^31 - 1")
    if precision not in ("auto", "fp32", "bf16"):
        raise RunError(f"--precision is {precision}; it must be auto, fp32 or bf16")
    if include and not paths:
        raise RunError("--include is for the files of folders; name the folders too")
    if not paths and is_transformers_folder(run):
        raise RunError(f"{run} is no run and holds no text; name the files to read")
    found = data.find_documents(paths, None, include or ()) if paths else None
    if found is not None and not any(document.size for document in found.documents):
        raise RunError("there is no text in the files that are named; name files with text in them")
    asked = threads_.requested(threads)
    writer, noticed = _loaded(run, device, threads)
    if writer.model.embedding.weight.device.type == "cpu":
        threads_.Threads(asked or threads_.cores()).set()
    window = context or writer.context or 2048
    console = Console(file=_Lasting())
    scores = []
    if found is None:
        saved = checkpoint.load(run)
        corpus = data.open_corpus(saved.path.parent.parent / "data", str(saved.meta.get("data")))
        with render.reading(console, corpus.info["held_out"]["bytes"]) as read:
            scores.append(score.score_held_out(writer, corpus, window, precision, read))
    else:
        documents = found.documents
        groups = [(x.name, [x]) for x in documents] if each else [("all", documents)]
        with render.reading(console, sum(x.size for x in documents)) as read:
            for name, group in groups:
                scores.append(score.score_documents(writer, name, group, window, precision, read))
        if len(scores) > 1:
            scores.append(score.Score.total(scores))
    render.scores(console, scores, window)
    for warning in noticed:
        _say(f"warning: {warning}")


@app.command(
    short_help="Write a trained model as a folder that transformers reads.",
    epilog="Example: [bold]tfla export runs/train exported[/bold], then "
    'xLSTMForCausalLM.from_pretrained("exported")',
)
def export(
    run: Annotated[Path, typer.Argument(help=MODEL_FOLDER, show_default=False)],
    folder: Annotated[
        Path, typer.Argument(help="The folder to write, absent or empty.", show_default=False)
    ],
) -> None:
    """Write weights, configuration and tokenizer in transformers' format; a run without a tokenizer
    gets one of bytes. The token that ends a document also begins one there, as in training.
    transformers has the exponential input gate alone, and heads whose widths together are
    multiples of 64.
    """
    # fmt: on
    _require("numpy", "safetensors", "tokenizers")
    from tfla.integrations.text import export_run

    writer, noticed = _loaded(run, "cpu", 1)
    export_run(writer.model, writer.codec, folder)
    for warning in noticed:
        _say(f"warning: {warning}")
    words = f"{writer.model.config.num_parameters():,} parameters, with their tokenizer"
    print(f"{folder}: {words}; tfla generate reads it, and transformers")


@app.command(
    short_help="Draw the loss curves of one run or of several.",
    epilog="Example: [bold]tfla plot runs/a runs/b --out both.png[/bold]",
)
def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders that tfla train wrote.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        _option(
            None, "The picture, a PNG.", default="loss.png in the run; of several runs.png, here"
        ),
    ] = None,
    over: Annotated[str, _option(None, "The horizontal axis: seconds or steps.")] = "seconds",
) -> None:
    """Draw training and held-out loss of runs, also of one that is still going on, from their
    metrics.jsonl. Several are drawn in one picture, each in its colour.
    """
    # fmt: on
    _require("matplotlib", "numpy", "safetensors")
    from tfla import render
    from tfla.xlstm import data, files, metrics

    if over not in ("seconds", "steps"):
        raise RunError(f"--over is {over}; it must be seconds or steps")
    curves = []
    for run in runs:
        records = metrics.read_metrics(run / "metrics.jsonl")
        if not records:
            raise RunError(
                f"{run} holds no metrics.jsonl of a run; name what tfla train --out wrote"
            )
        curves.append(render.LossCurve(str(run), records, data.bytes_per_token(run / "data")))
    target = out or (runs[0] / "loss.png" if len(runs) == 1 else Path("runs.png"))
    files.check_file(target, render.is_plot)
    render.loss_curves(curves, target, over)
    print(target)


@app.command(
    short_help="Five minutes: train, write, compare with attention on this machine.",
    epilog="Example: [bold]tfla demo[/bold]\n\nA shorter look: [bold]tfla demo --seconds 30[/bold]",
)
def demo(
    seconds: Annotated[
        float,
        _option(None, "Seconds of training; the comparison takes up to a third of it on top."),
    ] = 150.0,
    out: Annotated[
        Path | None,
        _option(None, "Folder for the results.", default="runs/demo, the next time runs/demo-2"),
    ] = None,
    seed: Annotated[int, _option(None, "Start of all random numbers.")] = 0,
    device: Annotated[str, _option(None, DEVICE)] = "auto",
    threads: Annotated[
        int | None,
        _option(None, THREADS, default="the fastest, chosen anew as the machine is busy or idle"),
    ] = None,
) -> None:
    """Show what this is on this machine; no data and no GPU are needed. It
    trains a small xLSTM on the sources of Python's standard library, lets it write, times the
    mLSTM beside attention over growing context, and leaves two plots and a table.
    """
    # fmt: on
    _require("rich", "matplotlib", "numpy", "safetensors")
    from rich.console import Console

    from tfla.demo import run_demo

    threads_.requested(threads)
    run_demo(out, seconds, _device(device), seed, Console(), threads)


@app.command(
    short_help="What a bug report needs: versions, devices, what serves each dtype and why.",
    epilog="Example: [bold]tfla env > environment.txt[/bold]",
)
def env(
    self_test: Annotated[
        bool, _option(None, "Run the kernels' self-test anew, first.", "--self-test")
    ] = False,
) -> None:
    """Print the environment in one paste. With --self-test the kernels run first, in every dtype on
    every kind of GPU here, and are held against the reference: on a GPU or with a Triton where they
    have never run this decides whether they are used. Exit status 1 if they are wrong.
    """
    # fmt: on
    from tfla import environment

    tests = list(environment.self_test()) if self_test else []
    if self_test and not tests:
        raise RunError("--self-test needs a GPU that torch sees, or TRITON_INTERPRET=1")
    for line in environment.report():
        print(line)
    for line, _ in tests:
        print(line)
    if not all(passed for _, passed in tests):
        raise typer.Exit(1)


for _name, _help in bench.COMMANDS.items():
    app.command(_name, short_help=_help)(lambda: None)


def complete(commands: typer.Typer) -> None:
    """Put the commands of tfla.bench where until now their names and helps stand alone."""
    from tfla.bench.cli import register

    own = [x for x in commands.registered_commands if x.name not in bench.COMMANDS]
    if not commands.registered_groups:
        commands.registered_commands = own
        register(commands)


def main() -> None:
    """The entry point: runs the command and leaves with its exit status."""
    _open_closed()
    threads_.limit_spinning()
    with signals.Signals() as received:
        status = run_command(sys.argv[1:])
    sys.exit(status or (128 + received.noted if received.noted else 0))


def _open_closed() -> None:
    """Give what was closed (`tfla ... >&-`) to nothing: else the next file that is opened would get
    its number, a checkpoint for one, and whatever is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))


def run_command(arguments: list[str]) -> int:
    """Exit status of `tfla *arguments`: 0, or 2 after one line about what the caller can put right.

    Faults of ours come out as exceptions.
    """
    try:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        if arguments and arguments[0] in bench.COMMANDS:
            complete(app)
        status = app(arguments or ["--help"], prog_name="tfla", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except UsageError as error:
        where = getattr(error, "ctx", None)
        name = where.command_path if where else " ".join(["tfla", *arguments[:1]])
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return _fail(f"{message or 'a command is missing'}; see {name} --help")
    except RunError as error:
        return _fail(str(error))
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _fail(f"{what}{error.strerror or error}; check the path and try again")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS:
            raise
        return _fail(f"{error.name} is not installed; in a clone: pip install '.[train]'")
    except (signals.Interrupted, KeyboardInterrupt) as error:
        return signals.exit_status(error)
    except MemoryError:  # of Python and of NumPy
        return _fail(f"the memory is not enough; {LESS}")
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; it may not have been imported
            return _fail(f"the GPU's memory is full; {LESS}")
        if "DefaultCPUAllocator" in str(error):  # torch's too, of no type of its own
            return _fail(f"the memory is not enough; {LESS}")
        raise


def _require(*packages: str) -> None:
    """Say now what is missing, not when an hour of training is to be plotted."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _fail(message: str) -> int:
    _say(" ".join(message.split()))
    return 2


def _say(message: str) -> None:
    with suppress(OSError):  # nobody may be left to read it
        print(f"tfla: {message}", file=sys.stderr)


class _Lasting(io.StringIO):
    """The standard output for what runs long: where nobody reads it any more, a terminal that was
    closed or a pipe whose reader has ended, the work goes on."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stdout, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return sys.stdout is not None and sys.stdout.isatty()

    def write(self, text: str) -> int:
        with suppress(OSError):
            if sys.stdout is not None:
                sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            if sys.stdout is not None:
                sys.stdout.flush()


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings of weights are shown as the command's other lines are."""
    from tfla.xlstm.checkpoint import WeightsWarning

    plain: Any = warnings.showwarning

    def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
        if issubclass(category, WeightsWarning):
            _say(f"warning: {message}")
        else:
            plain(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _placement(
    device: str,
    context_ranks: int,
    recompute: bool,
    compile: bool,
    given: dict[str, str],
    check: Callable[[], object],
) -> "Placement":
    """This process, or under torchrun all of them, once all are found to be given the same options.

    `check` is a further look at the options: a number that cannot be is an error now, not after the
    corpus.
    """
    if "RANK" in os.environ:
        from tfla.xlstm.parallel import Ranks, join

        problem = None
        try:
            check()
            on = _device(device)
            given = given | {"device": f"{device} ({on.type} on its machine)"}
        except RunError as error:
            problem = str(error)
        join(given | {"version": tfla.__version__}, problem)
        return Ranks(on, context_ranks, recompute, compile)
    check()
    if context_ranks != 1 or recompute:
        option = "--recompute" if recompute else "--context-ranks"
        raise RunError(f"{option} is for torchrun; start with: torchrun --nproc-per-node N -m tfla")
    from tfla.xlstm.train import Placement

    return Placement(_device(device), compile)


def _threads_for(run: "Run", place: "Placement", asked: int | None) -> "Threads":
    """The threads that this run is trained with."""
    import torch

    from tfla.xlstm.model import XLSTM
    from tfla.xlstm.train import autocast, mean_nats

    model = None

    def step() -> None:
        """A pass like those of the run, of a model of its size: it leaves no trace in the run."""
        nonlocal model
        model = model or XLSTM(run.config)
        windows = torch.zeros(run.options.batch, run.options.context + 1, dtype=torch.int64)
        with autocast(run.options.precision, place.device):
            loss = mean_nats(model, windows[:, :-1], windows[:, 1:])
        loss.backward()

    before = run.saved.meta.get("threads") if run.saved else None
    return threads_.Threads.for_training(
        asked,
        keep=threads_.KEPT
        if run.options.seconds is None
        else threads_.COMPILED
        if place.compile
        else "",
        before=before if isinstance(before, int) and 1 <= before <= threads_.MOST else None,
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "RANK" in os.environ else 1,
        once=step,
    )


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"--device is {name}; it must be auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        number = torch.cuda.device_count()
        raise RunError(f"--device is {name}; torch sees {number} GPUs here; take --device auto")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device is {name}; this torch lacks it; take --device auto") from error
    return device
