"""The command `tfla`: reads options, calls the library, prints; it computes nothing.

A further command is a function under `@app.command(...)` that imports what it needs in its body, so
that `tfla --help` stays quick. What the person at the keyboard can put right is a RunError: one
line, exit status 2.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    print('tfla: typer is not installed; pip install "tfla[train]"', file=sys.stderr)
    raise SystemExit(2) from None

import tfla
from tfla import gates
from tfla.bench.cli import register
from tfla.xlstm.checkpoint import RunError

if TYPE_CHECKING:
    import torch

    from tfla.xlstm.train import Placement

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
DEVICE = "Where to compute: cpu, cuda or cuda:1; auto takes a GPU when there is one."


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


# fmt: off
@app.command(
    short_help="Train a language model on files, or on Python's own sources.",
    epilog="Example: [bold]tfla train ~/texts --out runs/texts --seconds 600[/bold]\n\n"
    "After a break: [bold]tfla train --out runs/texts --resume[/bold]",
)
def train(
    command: typer.Context,
    paths: Annotated[list[Path] | None, typer.Argument(
        help="Files and folders to train on. Folders are searched to the bottom and every file is "
        "read as bytes, whatever it is; names that start with a dot are left out. Without any: the "
        "sources of Python's standard library, without its tests.", show_default=False,
    )] = None,
    out: Annotated[Path, _run(
        "Folder for checkpoints, metrics.jsonl and loss.png.")] = Path("runs/train"),
    resume: Annotated[bool, _run(
        "Continue the run in --out from its last checkpoint, with the options it had; those given "
        "again replace them. Without a checkpoint it starts at the beginning.", "--resume",
    )] = False,
    steps: Annotated[int | None, _run(
        "Train this many steps.", default="1000, without --seconds")] = None,
    seconds: Annotated[float | None, _run(
        "Train this many seconds; the learning rate then follows the clock.", default="")] = None,
    seed: Annotated[int, _run("Start of all random numbers.")] = 0,
    device: Annotated[str, _run(DEVICE)] = "auto",
    context_ranks: Annotated[int, _run(
        "Under torchrun: processes that share each window, its tokens split among them.")] = 1,
    recompute: Annotated[bool, _run(
        "Under torchrun: keep only what enters the blocks for the backward pass, compute the rest "
        "again.", "--recompute")] = False,
    compile: Annotated[bool, _run(
        "Compile the blocks of the model: some time at the start, more tokens a second after it.",
        "--compile")] = False,
    precision: Annotated[str, _run(
        "fp32 or bf16; auto: bf16 on a GPU that has it, else fp32.")] = "auto",
    save_every: Annotated[int, _run("Steps between checkpoints; the last two are kept.")] = 100,
    eval_every: Annotated[int, _run("Steps between evaluations on held-out text.")] = 100,
    eval_bytes: Annotated[int, _run("Bytes of held-out text in an evaluation.")] = 65536,
    log_every: Annotated[int, _run("Steps between lines in metrics.jsonl.")] = 10,
    tokenizer: Annotated[Path | None, _data(
        "A tokenizer.json of the tokenizers library.", default="one token a byte")] = None,
    held_out: Annotated[float, _data(
        "Share of the bytes that is never trained on: whole files, picked by name.")] = 0.05,
    hidden_size: Annotated[int, _model("Width; half of it must divide by --num-heads.")] = 128,
    num_layers: Annotated[int, _model("Number of blocks.")] = 2,
    num_heads: Annotated[int, _model("mLSTM heads in a block.")] = 1,
    input_gate: Annotated[str, _model(
        f"{gates.described()}.")] = "exp",
    context: Annotated[int, _training("Tokens in a training window.")] = 256,
    batch: Annotated[int, _training("Windows in a forward pass.")] = 8,
    accumulate: Annotated[int, _training(
        "Forward passes in a step: a batch this many times larger in the same memory.")] = 1,
    lr: Annotated[float, _training("AdamW's learning rate at its peak.")] = 2.5e-3,
    warmup: Annotated[float, _training(
        "Share of the run in which the learning rate rises.")] = 0.05,
    final_lr: Annotated[float, _training("Share of the peak that the cosine ends at.")] = 0.1,
    weight_decay: Annotated[float, _training(
        "For matrices; norms, biases, gates and embeddings have none.")] = 0.1,
    clip: Annotated[float, _training("Largest norm of the gradient.")] = 1.0,
) -> None:
    """Train an xLSTM language model. A run that was stopped or killed goes on with --resume.
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

    plot, outputs = out / "loss.png", {"loss.png": render.is_plot}

    def make() -> runs.Run:
        if resume and checkpoint.exists(out):
            sources = {name: command.get_parameter_source(name) for name in command.params}
            given = [n for n, source in sources.items() if source and source.name == "COMMANDLINE"]
            if kept := render.keep_old_plot(plot):
                _say(f"{plot} is of an earlier version, or not ours; it is now {kept}")
            return runs.resume(out, {name: command.params[name] for name in given}, outputs)
        if resume:
            _say(f"{out} holds no checkpoint; starting at the beginning, with these options")
        unlimited = steps is None and seconds is None
        values = command.params | ({"steps": 1000} if unlimited else {})
        return runs.start(out, values, outputs)

    place = _placement(device, context_ranks, recompute, compile)
    console = Console(quiet=not place.main)
    stopped = False
    with ExitStack() as held:  # the lock of the run, until the plot is drawn
        with place.together(), _warnings_in_a_line():
            run = place.share(make)
            held.enter_context(run.lock or nullcontext())
            render.describe(run, place.device, console)
            try:
                render.watch(training.train(run, place), console)
            except KeyboardInterrupt:
                stopped = True
        if not place.main:
            return
        records = metrics.read_metrics(out / runs.METRICS)
        render.loss_curve(
            records,
            plot,
            title=f"Training on {run.corpus.name}",
            bytes_per_token=None if run.corpus.lost else run.corpus.bytes_per_token,
        )
    if stopped:
        _say(f"stopped; go on with: tfla train --out {out} --resume")
        raise typer.Exit(130)
    unit = "bits_per_token" if run.corpus.lost else "bits_per_byte"
    bits = [record[unit] for record in records if unit in record]
    result = f"{bits[-1]:.3f} {metrics.UNITS[unit]}" if bits else "not in metrics.jsonl any more"
    render.line(console, f"held-out text: {result}; the curve: {out}/loss.png")
    render.line(console, f'let it write: tfla generate {out} "import "')


# fmt: off
@app.command(
    short_help="Let a trained model continue a text.",
    epilog='Example: [bold]tfla generate runs/train "def main(" --tokens 300 --seed 1[/bold]',
)
def generate(
    run: Annotated[Path, typer.Argument(
        help="Folder that tfla train wrote, or one checkpoint in it.", show_default=False)],
    prompt: Annotated[str | None, typer.Argument(
        help="Text to continue; - reads it from the standard input. Without one a new document "
        "begins.", show_default=False,
    )] = None,
    file: Annotated[Path | None, _text("Read the prompt from this file.", default="")] = None,
    tokens: Annotated[int, _text(
        "Write at most this many tokens (bytes, without a tokenizer).")] = 400,
    stop: Annotated[list[str] | None, _text(
        "Stop before this text appears; can be given several times.", default="")] = None,
    temperature: Annotated[float, _sampling(
        "0 takes the likeliest token, 1 samples as the model says.")] = 0.8,
    top_k: Annotated[int | None, _sampling(
        "Sample among this many likeliest tokens.", default="all")] = None,
    top_p: Annotated[float | None, _sampling(
        "Sample among the likeliest tokens that sum to this probability.", default="all")] = None,
    seed: Annotated[int | None, _sampling(
        "The same seed writes the same text.", default="another text each time")] = None,
    device: Annotated[str, _option(None, DEVICE)] = "auto",
) -> None:
    """Continue a text with a trained model, character by character, on the standard output.
    The prompt is read in one pass; after it a token costs the same however long the text becomes.
    """
    # fmt: on
    _require("numpy", "safetensors")
    from tfla.xlstm.checkpoint import WeightsWarning
    from tfla.xlstm.writer import load_writer

    if file is not None and prompt is not None:
        raise RunError("a prompt and --file are both given; give one of them")
    if file is not None:
        text = file.read_bytes()
    elif prompt == "-":
        text = sys.stdin.buffer.read()
    else:
        text = (prompt or "").encode("utf-8", "surrogateescape")
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always", WeightsWarning)
        writer = load_writer(run, _device(device))
    pieces = writer.write(
        text, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop or ()
    )
    print(text.decode("utf-8", "replace"), end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    for warning in noticed:  # where it ends in an error, that says enough
        _say(f"warning: {warning.message}")


# fmt: off
@app.command(
    short_help="Five minutes: train, write, compare with attention on this machine.",
    epilog="Example: [bold]tfla demo[/bold]\n\nA shorter look: [bold]tfla demo --seconds 30[/bold]",
)
def demo(
    seconds: Annotated[float, _option(
        None, "Seconds of training; the comparison takes up to a third of it on top.")] = 150.0,
    out: Annotated[Path | None, _option(
        None, "Folder for the results.", default="runs/demo, the next time runs/demo-2")] = None,
    seed: Annotated[int, _option(None, "Start of all random numbers.")] = 0,
    device: Annotated[str, _option(None, DEVICE)] = "auto",
) -> None:
    """Show what this is on this machine; no data and no GPU are needed. It
    trains a small xLSTM on the sources of Python's standard library, lets it write, times the
    mLSTM beside attention over growing context, and leaves two plots and a table.
    """
    # fmt: on
    _require("rich", "matplotlib", "numpy", "safetensors")
    from rich.console import Console

    from tfla.demo import run_demo

    run_demo(out, seconds, _device(device), seed, Console())


# fmt: off
@app.command(
    short_help="What a bug report needs: versions, devices, what serves each dtype and why.",
    epilog="Example: [bold]tfla env > environment.txt[/bold]",
)
def env(
    self_test: Annotated[bool, _option(None, "Run the kernels' self-test anew, first.",
        "--self-test")] = False,
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


register(app)  # tfla bench, tfla roofline


def main() -> None:
    """The entry point: runs the command and leaves with its exit status."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Exit status of `tfla *arguments`: 0, or 2 after one line about what the caller can put right.

    Faults of ours come out as exceptions.
    """
    import torch

    try:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
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
    except torch.OutOfMemoryError:
        return _fail("the GPU's memory is full; take a smaller --batch, a larger --accumulate")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS:
            raise
        return _fail(f'{error.name} is not installed; pip install "tfla[train]"')
    except KeyboardInterrupt:
        return 130


def _require(*packages: str) -> None:
    """Say now what is missing, not when an hour of training is to be plotted."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _fail(message: str) -> int:
    _say(" ".join(message.split()))
    return 2


def _say(message: str) -> None:
    print(f"tfla: {message}", file=sys.stderr)


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


def _placement(device: str, context_ranks: int, recompute: bool, compile: bool) -> "Placement":
    """This process, or under torchrun all of them."""
    if "RANK" in os.environ:
        from tfla.xlstm.parallel import Ranks

        return Ranks(_device(device), context_ranks, recompute, compile)
    if context_ranks != 1 or recompute:
        option = "--recompute" if recompute else "--context-ranks"
        raise RunError(f"{option} is for torchrun; start with: torchrun --nproc-per-node N -m tfla")
    from tfla.xlstm.train import Placement

    return Placement(_device(device), compile)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"--device is {name}, wanted auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        number = torch.cuda.device_count()
        raise RunError(f"--device is {name}, torch sees {number} GPUs here; take --device auto")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device is {name}, this torch lacks it; take --device auto") from error
    return device
