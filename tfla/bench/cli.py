"""`tfla bench` and `tfla roofline`: options and what is printed; `register` adds them to an app."""

import importlib
import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tfla
from tfla import _compat, gates
from tfla.bench import COMMANDS, cases, measure, models, plots, report, scale
from tfla.bench import roofline as r
from tfla.bench.bias import NAMES, BiasStudy, check_options
from tfla.bench.cases import DTYPES, Shape
from tfla.bench.language_study import (
    NAMES as MIXERS,
)
from tfla.bench.language_study import SIZES, Asked, Training, open_study, size_for
from tfla.bench.memory import LAUNCHES
from tfla.bench.memory import memory as counted_memory
from tfla.bench.runs import Task, work_off
from tfla.bench.transfer import VARIANTS
from tfla.plan import Problem, plan
from tfla.programs import call_of, programs
from tfla.spec import Precision
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.config import XLSTMConfig

LARGEST_GATE = 60  # exp(60) times a thousand tokens is far from the ends of fp32
MOST_GATES = 200

bench = typer.Typer(help=COMMANDS["bench"], no_args_is_help=True, rich_markup_mode="rich")


def register(app: typer.Typer) -> None:
    """Add the commands bench, roofline and plan to an app."""
    app.add_typer(bench, name="bench")
    app.command("roofline", short_help=COMMANDS["roofline"])(roofline)
    app.command("plan", short_help=COMMANDS["plan"])(show_plan)


def _option(text: str, *names: str, default: str | None = None) -> Any:
    """An option; `default` says in words what happens without it."""
    text = text if not default else rf"{text} \[default: {default}]"
    return typer.Option(*names, help=text, show_default=default is None)


Tokens = Annotated[
    int, _option("Tokens of all sequences together.", default="65536, on a CPU 2048")
]
Dtype = Annotated[str, _option("bf16, fp16 or fp32.", default="bf16, on a CPU fp32")]


def _shared(
    peers: Annotated[
        str, _option("Other implementations to time: all, none, or parts of names, with commas.")
    ] = "all",
    dtype: Dtype = "",
    repeats: Annotated[
        int, _option("Timed calls of each implementation.", default="30, on a CPU 5")
    ] = 0,
    seconds: Annotated[
        float, _option("Begin no measurement after so many seconds.", default="3000, on a CPU 90")
    ] = 0,
    limit: Annotated[
        float, _option("Seconds after which an implementation that hangs is given up.")
    ] = 400.0,
    device: Annotated[str, _option("cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    out: Annotated[Path, _option("Folder for the JSON and the plots.")] = Path("runs/bench"),
) -> None:
    """The options of every measuring command."""


def _measures(command: Callable[..., None]) -> Callable[..., None]:
    """`command` takes a _Session, filled from the shared options, and options of its own."""
    return _measures_without()(command)


def _measures_without(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same without those of the shared options that mean nothing to the command: they keep
    their defaults."""
    return lambda command: _add(command, left_out)


def _add(command: Callable[..., None], left_out: tuple[str, ...]) -> Callable[..., None]:
    own = list(inspect.signature(command).parameters.values())[1:]
    every = inspect.signature(_shared).parameters
    shared = [p for name, p in every.items() if name not in left_out]
    fixed = {name: every[name].default for name in left_out}

    def outer(**given: Any) -> None:
        session = _Session(command.__name__, **fixed, **{p.name: given.pop(p.name) for p in shared})
        command(session, **given)
        session.run()

    outer.__name__, outer.__doc__ = command.__name__, command.__doc__
    outer.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    outer.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    first_sentence = " ".join((command.__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."
    bench.command(short_help=first_sentence)(outer)
    return command


@_measures
def kernels(
    session: "_Session",
    tokens: Tokens = 0,
    lengths: Annotated[
        str,
        _option("Tokens of a sequence, with commas.", default="512 to 65536, on a CPU 128 to 2048"),
    ] = "",
    studies: Annotated[str, _option("What is varied: length, heads, or both.")] = "length,heads",
    list_peers: Annotated[
        bool, _option("List the others that are installed, and measure nothing.", "--list-peers")
    ] = False,
) -> None:
    """Forward and forward + backward over the length at a constant number of tokens, in the two
    set-ups of the paper (16 heads 128/256, 8 heads 256/512; a quarter of the heads on a CPU), and
    over the head dim at a constant width.
    """
    if list_peers:
        for name, reason in session.missing.items():
            print(f"{name:28s} {reason or 'here'}")
        raise typer.Exit()
    _at_least(1, tokens=tokens or 1)
    if not (words := set(studies.split(","))) <= {"length", "heads"}:
        raise RunError(f"--studies is {studies}; it must be length, heads, or length,heads")
    tokens = tokens or (2048 if session.cpu else 65536)
    powers = range(7, 17, 2) if session.cpu else range(9, 17)
    wanted = _numbers(lengths) or [2**n for n in powers if 2**n <= tokens]
    share = 4 if session.cpu else 1
    for H, K, V in ((16 // share, 128, 256), (8 // share, 256, 512)):
        for T in wanted if "length" in words else []:
            session.add("kernels", Shape(max(1, tokens // T), T, H, K, V), study="length")
    T = max(t for t in wanted if t <= 8192 or t == min(wanted))
    for V in (64, 128, 256, 512) if "heads" in words else ():
        shape = Shape(max(1, tokens // T), T, 4096 // share // V, V // 2, V)
        session.add("kernels", shape, study="heads")


@_measures
def memory(
    session: "_Session",
    tokens: Tokens = 0,
    chunks: Annotated[
        str, _option("Tokens from one stored state to the next.", default="64 to 4096")
    ] = "",
) -> None:
    """Peak memory against runtime, over the tokens from one stored state to the next: the chunk of
    the paper's scheme, and with us the checkpoints of a GPU and the chunk of a CPU.
    """
    _at_least(1, tokens=tokens or 1)
    tokens = tokens or (2048 if session.cpu else 65536)
    T = min(tokens, 8192)
    usual = [32, 64, 128, 256] if session.cpu else [64, 128, 256, 512, 1024, 2048, 4096]
    sizes = _numbers(chunks) or usual
    shape = Shape(max(1, tokens // T), T, 2 if session.cpu else 8, 256, 512)
    known = [x for x in cases.IMPLEMENTATIONS if x.name in session.names]
    names = [x.name for x in cases.with_chunks(known, sizes)]
    session.add("kernels", shape, names, study="chunk", chunks=tuple(sizes))


@_measures
def decode(
    session: "_Session",
    batches: Annotated[
        str, _option("Numbers of sequences, with commas.", default="1,4,16,64,256, on a CPU to 16")
    ] = "",
    context: Annotated[int, _option("Tokens that attention looks back at.")] = 8192,
) -> None:
    """One token of a batch of sequences: 8 heads 256/512, states in fp32, updated in place."""
    _at_least(1, context=context)
    for B in _numbers(batches) or [1, 4, 16, 64, 256][: 3 if session.cpu else 5]:
        names = models.steps(session.cpu, session.peers)
        session.add("decode", Shape(B, context, 8, 256, 512), names, study="batch")


@_measures
def model(
    session: "_Session",
    size: Annotated[
        str, _option("tiny, 160m, 400m, 1.3b or 7b.", default="400m, on a CPU tiny")
    ] = "",
    batch: Annotated[int, _option("Sequences.", default="8, on a CPU 2")] = 0,
    context: Annotated[int, _option("Tokens of a sequence.", default="2048, on a CPU 512")] = 0,
) -> None:
    """Prefill, decode and a training step of a model with random weights: tokens a second, and the
    share of what the device's matrix products reach (MFU).
    """
    size = size or ("tiny" if session.cpu else "400m")
    if size not in models.SIZES:
        raise RunError(f"--size is {size}; it must be one of {', '.join(models.SIZES)}")
    _at_least(1, batch=batch or 1, context=context or 1)
    B, T = batch or (2 if session.cpu else 8), context or (512 if session.cpu else 2048)
    names = [name for name in session.names if name.startswith("tfla")]
    session.add("model", Shape(B, T, 1, 1, 1), names, size=size)


@_measures_without("peers", "dtype", "repeats", "seconds")
def transfer(
    session: "_Session",
    tokens: Annotated[int, _option("Tokens in the sequence.")] = 512,
    head_dim: Annotated[int, _option("Width of q, k and v.")] = 128,
    input_gate: Annotated[str, _option("Lowest and highest pre-activation i.")] = "-12,8",
    forget_gate: Annotated[str, _option("Lowest and highest pre-activation f.")] = "-5,12",
    step: Annotated[float, _option("Distance of one pre-activation from the next.")] = 1.0,
    eps: Annotated[
        str, _option("The norm's eps, one to four values with commas.")
    ] = "1e-2,1e-6,1e-8",
    draws: Annotated[int, _option("Independent q, k and v; each draw serves all gates.")] = 4,
    seconds: Annotated[float, _option("Begin no further draw after so many seconds.")] = 600.0,
) -> None:
    """How much of v passes through a head at constant gates, q, k, v ~ N(0, 1): the mean over
    tokens of the largest |h| over that of the largest |v|, before and after the head's norm, for
    both input gates with and without the normaliser, in fp32.
    """
    smallest = (("tokens", tokens, 1), ("head-dim", head_dim, 2), ("draws", draws, 1))
    for name, number, least in smallest:
        if number < least:
            raise RunError(f"--{name} is {number}; it must be {least} or more")
    gates = _gates("input-gate", input_gate, step), _gates("forget-gate", forget_gate, step)
    epsilons = _reals("eps", eps)
    if not 1 <= len(epsilons) <= 4 or not all(0 < x <= 1 for x in epsilons):
        raise RunError(f"--eps is {eps}; it must be one to four numbers above 0, at most 1")
    _at_least(0, seconds=seconds)
    session.take("fp32", draws, seconds)
    shape = Shape(1, tokens, 1, head_dim, head_dim)
    for name in VARIANTS:
        session.add(
            "transfer",
            shape,
            [name],
            study="gain",
            input_gates=gates[0],
            forget_gates=gates[1],
            epsilons=epsilons,
        )


@_measures_without("peers", "dtype", "repeats", "seconds")
def bias(
    session: "_Session",
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders of text. Without any: the sources of Python's library."
        ),
    ] = None,
    biases: Annotated[str, _option("Biases of the input gate, with commas.")] = "0,-2,-5,-10",
    eps: Annotated[float, _option("The eps of the model's norms.")] = 1e-6,
    steps: Annotated[int, _option("Steps of each training.")] = 100,
    hidden_size: Annotated[int, _option("Width of the model.")] = 128,
    num_layers: Annotated[int, _option("Blocks of the model.")] = 4,
    num_heads: Annotated[int, _option("Heads of each block.")] = 4,
    context: Annotated[int, _option("Tokens in a window.")] = 256,
    batch: Annotated[int, _option("Windows in a step.")] = 8,
    lr: Annotated[float, _option("Learning rate at its peak.")] = 2.5e-3,
    seed: Annotated[int, _option("Seed of the parameters and of the order of the texts.")] = 0,
    seconds: Annotated[float, _option("Begin no training after so many seconds.")] = 1200.0,
) -> None:
    """Loss and gradient norm of early training with other biases of the input gate: a small model
    of each gate, from one seed, on the same tokens.
    """
    model = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "norm_eps": eps,
    }
    options = {"steps": steps, "context": context, "batch": batch, "lr": lr, "seed": seed}
    check_options(model, options)
    for path in paths or ():
        if not path.exists():
            raise RunError(f"{path} does not exist; give files and folders of texts, or none")
    options |= {"log_every": 10, "save_every": 2**31, "eval_every": 2**31}
    numbers = _reals("biases", biases)
    if len(set(numbers)) < len(numbers):
        raise RunError(f"--biases is {biases}; it must be different numbers")
    _at_least(0, seconds=seconds)
    session.take("fp32", 1, seconds)
    for name in NAMES:  # a task each, so that what is done is kept when a later one fails
        for number in numbers:
            study = BiasStudy(tuple(paths or ()), model, options, number)
            session.add("bias", None, [name], study="bias", work=study)


@_measures_without("peers", "dtype", "repeats", "seconds")
def language(
    session: "_Session",
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders of text. Without any: the sources of Python's library."
        ),
    ] = None,
    minutes: Annotated[float, _option("Minutes that all trainings together may take.")] = 10.0,
    size: Annotated[
        str,
        _option(f"Number of parameters: {', '.join(SIZES)}.", default="by --minutes and device"),
    ] = "",
    rates: Annotated[
        str, _option("Learning rates of the sweep, with commas.", default="three, by --size")
    ] = "",
    seeds: Annotated[
        int,
        _option("Trainings of each model at its best learning rate, each with a seed of its own."),
    ] = 3,
    steps: Annotated[
        int | None,
        _option("Steps of each training.", default="what fits into --minutes, at most 2 epochs"),
    ] = None,
    context: Annotated[int, _option("Tokens in a window.", default="by --size")] = 0,
    batch: Annotated[int, _option("Windows in a step.", default="by --size")] = 0,
    tokenizer: Annotated[
        Path | None, _option("A tokenizer.json.", default="a token is a byte")
    ] = None,
    include: Annotated[
        list[str] | None,
        _option("Of folders read only files that fit this pattern, '*.py'.", default="all"),
    ] = None,
    resume: Annotated[
        bool,
        _option(
            "Go on with the study in --out; the other options must be those of its start.",
            "--resume",
        ),
    ] = False,
) -> None:
    """Language models of one size with mLSTMexp, mLSTMsig and causal attention, trained on the same
    tokens in the same order: held-out bits a byte over tokens, seconds and positions, the sweep of
    learning rates, speed, memory, and what each writes.
    """
    began, cuda = time.time(), session.options["device"] != "cpu"
    size = size or size_for(minutes, cuda)
    if size not in SIZES:
        raise RunError(f"--size is {size}; it must be one of {', '.join(SIZES)}")
    precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    asked = Asked(
        paths=tuple(map(str, paths or ())),
        include=tuple(include or ()),
        tokenizer=str(tokenizer) if tokenizer else None,
        device=session.options["device"],
        precision=precision,
        size=size,
        context=context or SIZES[size].context,
        batch=batch or SIZES[size].batch,
        minutes=minutes,
        steps=steps,
        rates=_reals("rates", rates) if rates else SIZES[size].rates,
        seeds=seeds,
    )
    asked.check()
    session.take(precision, 1, math.inf)
    session.check_room()
    study = open_study(session.out / "language", asked, resume, began)
    session.add("language_plan", None, list(MIXERS), study="plan", work=study)
    trainings = [Training(study, lr, 0) for lr in asked.rates]
    trainings += [Training(study, None, seed) for seed in range(1, seeds)]
    for training in trainings:  # by turns, so that a slow moment of the machine meets all
        for name in MIXERS:
            session.add("language", None, [name], study="language", work=training)


@bench.command()
def compare(
    old: Annotated[Path, typer.Argument(help="JSON of a run.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="JSON of a later one.", show_default=False)],
    threshold: Annotated[
        float, _option("A row that is slower by more than this share is a regression.")
    ] = 0.05,
) -> None:
    """Compare two runs. Exit status 1 if one of our own rows became slower, wrong, or is gone."""
    _at_least(0, threshold=threshold)
    before, after = report.load(old), report.load(new)
    for line in report.same_machine(before, after):
        print(f"not the same machine: {line}")
    lines, worse = report.compare(before, after, threshold)
    report.table("", ["", "old ms", "new ms", "change", ""], lines)
    for line in worse:
        print(f"REGRESSION {line}")
    print(f"{len(worse)} regressions beyond {100 * threshold:g}% in {len(lines)} rows")
    if worse:
        raise typer.Exit(1)


@bench.command()
def draw(
    result: Annotated[Path, typer.Argument(help="JSON of a run.", show_default=False)],
    out: Annotated[Path, _option("Folder for the plots.")] = Path("runs/bench"),
) -> None:
    """Draw the plots of a run again, from its JSON."""
    found = report.load(result)
    try:
        plots.check_room(out, str(found["command"]), result)
        pictures = plots.draw(found, out)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{result} is not a whole result of tfla bench ({type(error).__name__}: {error}); "
            "measure again"
        ) from error
    print("plots:", *pictures)


def _size(what: str) -> Any:
    return typer.Argument(help=what, min=1, show_default=False)


def roofline(
    B: Annotated[int | None, _size("Sequences.")] = None,
    T: Annotated[int | None, _size("Tokens in each.")] = None,
    H: Annotated[int | None, _size("Heads.")] = None,
    K: Annotated[int | None, _size("Head dim of q and k.")] = None,
    V: Annotated[int | None, _size("Head dim of v.")] = None,
    device: Annotated[
        str,
        _option(f"{', '.join(r.MACHINES)}, by the data sheet; this: the device here, measured."),
    ] = "this",
    gate: Annotated[str, _option(f"{gates.described()}.")] = "exp",
    dtype: Dtype = "",
    plot: Annotated[Path | None, _option("Draw PATH.png and PATH.svg.", default="")] = None,
    gpus: Annotated[
        int,
        _option(
            "Instead of a call: what training xLSTM 7B costs on up to so many GPUs.", default=""
        ),
    ] = 0,
    tokens: Annotated[int, _option("With --gpus: tokens on each GPU.")] = 16384,
) -> None:
    """FLOPs, bytes, intensity and least time of each kernel that a call takes, here or on a named
    device, and the best chunk of the paper's scheme beside ours. With --gpus: a model of what many
    GPUs cost each other in time and memory, as shards of the model or with one sequence over all.
    """
    if gpus:
        _scale(gpus, tokens, device)
        return
    if B is None or T is None or H is None or K is None or V is None:
        raise RunError("name B T H K V, five whole numbers, or --gpus")
    if gate not in gates.INPUT_GATES:
        raise RunError(f"--gate is {gate}; it must be {' or '.join(gates.INPUT_GATES)}")
    normalize = gates.INPUT_GATES[gate].normalize
    if device != "this" and device.lower() not in r.MACHINES:
        raise RunError(f"--device is {device}; it must be one of this, {', '.join(r.MACHINES)}")
    machine, kind = _machine(device.lower(), dtype)
    problem = Problem(B, T, H, K, V, B, False, r.SIZES[kind], "ieee")
    L: int | None = None
    if machine.device is None:
        found, chunk = r.reference_kernels(problem, normalize), r.layout.L
        how = f'backend "reference": chunk {chunk}, computed in fp32, bytes estimated'
    else:
        planned = r.for_dtype(plan(problem, machine.device), getattr(torch, kind))
        found, how = r.kernels(problem, planned, normalize), str(planned)
        chunk = L = planned.L
    bandwidth, rate = machine.bytes_per_s, machine.flops_per_s[kind]
    report.say(
        f"{machine.name} ({machine.source}): {bandwidth / 1e12:.3g} TB/s, "
        f"{rate / 1e12:,.4g} TFLOP/s in {kind}, {rate / bandwidth:,.0f} FLOP/byte{_parts(machine)}",
        how,
    )
    for part in (False, True):
        title = "backward" if part else "forward (states stored for the backward pass)"
        rows = [k for k in found if k.backward == part]
        report.table(title, report.ROOFLINE_COLUMNS, report.roofline_cells(rows, machine, kind))
        report.say(f"each kernel at its limit: {r.limit_ms(rows, machine, kind):.3f} ms")
    once = [
        f"{r.least_bytes(B * T, H, K, V, r.SIZES[kind], 8, b) / bandwidth * 1e3:.3f} ms"
        for b in (False, True)
    ]
    report.say(_memory(problem, machine, kind, gate))
    best = r.paper_best_chunk(machine, kind, K, V)
    report.say(
        f"every input read once, every output written once: forward {once[0]}, with backward "
        f"{once[1]}",
        f"chunk: ours {chunk}; best of the paper's scheme, a state in memory once a "
        f"chunk: {best:.0f} (forward of mLSTMsig, times of FLOPs and bytes added)",
    )
    if plot is not None:
        print("plots:", *plots.rooflines(found, machine, kind, K, V, L, plot))


def _parts(machine: r.Machine) -> str:
    d = machine.device
    if d is None:
        return ""
    shared = f"{d.shared_memory / 1024:.0f} KiB of shared memory a program"
    return f", {d.multiprocessors} multiprocessors, {shared}"


def _memory(problem: Problem, machine: r.Machine, kind: str, gate: str) -> str:
    """What a call of this plan allocates, in words."""
    try:
        m = counted_memory(problem, machine.device, getattr(torch, kind), gate)
    except (RuntimeError, OverflowError) as error:
        return f"memory: not counted: {' '.join(str(error).split())[:200]}"
    inputs, output, saved, forward, backward = (f"{x / 2**20:,.1f} MiB" for x in m)
    return (
        f"memory: for the backward pass stay the inputs, {inputs}, h, {output}, and {saved} beside "
        f"them; passes allocate at most {forward} forward, h among it, and {backward} backward, "
        "gradients among it"
    )


def _scale(gpus: int, tokens: int, device: str) -> None:
    name = "h100" if device == "this" else device.lower()
    if not 2 <= gpus <= 2**20 or not 1 <= tokens <= 2**40 or name not in r.MACHINES:
        raise RunError(
            f"--gpus is {gpus}, --tokens {tokens}, --device {device}; "
            "they must be 2 to 2^20, 1 to 2^40, "
            f"and one of {', '.join(r.MACHINES)}"
        )
    config, machine = XLSTMConfig.xlstm_7b(), r.MACHINES[name]
    steps = sorted({2**n for n in range(3, 11) if 2**n < gpus} | {gpus})
    costs = [scale.cost(config, n, tokens, machine) for n in steps]
    report.say(
        f"xLSTM 7B, {machine.name}, {tokens:,} tokens a GPU, bf16, blocks computed again; "
        f"{scale.REACHED:.0%} of the matmul peak: a step {costs[0].compute * 1e3:,.0f} ms, the "
        f"forward pass of a layer {costs[0].layer * 1e3:.2f} ms"
    )
    report.table("", scale.COLUMNS, scale.cells(costs, tokens))
    report.say("shards: FSDP over all. exchange: a layer and direction, all ranks in one sequence.")


def show_plan(
    B: Annotated[int, typer.Argument(help="Sequences.", min=0, show_default=False)],
    T: Annotated[int, typer.Argument(help="Tokens in each.", min=0, show_default=False)],
    H: Annotated[int, typer.Argument(help="Heads.", min=1, show_default=False)],
    K: Annotated[int, typer.Argument(help="Head dim of q and k.", min=1, show_default=False)],
    V: Annotated[int, typer.Argument(help="Head dim of v.", min=1, show_default=False)],
    device: Annotated[
        str, _option(f"this, for the GPU here, or one of {', '.join(r.MACHINES)}.")
    ] = "this",
    dtype: Annotated[str, _option("bf16, fp16 or fp32.")] = "bf16",
    tf32: Annotated[bool, _option("fp32 products in TF32, if torch is set to it.")] = False,
    packed: Annotated[int, _option("Sequences packed along T, with states; B is 1.")] = 0,
    gate: Annotated[str, _option(f"{gates.described()}.")] = "exp",
) -> None:
    """Chunk, checkpoints, splits and tiles of the kernels that serve a call: chosen from these
    integers and the device's alone, never by trial; then the launches of a forward and a backward
    pass.
    """
    if gate not in gates.INPUT_GATES:
        raise RunError(f"--gate is {gate}; it must be {' or '.join(gates.INPUT_GATES)}")
    if packed and B != 1:
        raise RunError(f"B is {B}; it must be 1 with --packed {packed}: the sequences lie along T")
    if device != "this" and device.lower() not in r.MACHINES:
        raise RunError(f"--device is {device}; it must be one of this, {', '.join(r.MACHINES)}")
    if device != "this":
        known = r.MACHINES[device.lower()].device
        assert known is not None
    elif torch.cuda.is_available():
        from tfla.kernels.planning import device_of

        known = device_of(torch.empty(0, device="cuda"))
    else:
        raise RunError("there is no GPU here; name one: --device h200")
    size = DTYPES[_dtype(dtype, False)].itemsize
    precision: Precision = "tf32" if tf32 and size == 4 else "ieee"
    problem = Problem(B, T, H, K, V, packed or B, bool(packed), size, precision)
    planned = plan(problem, known)
    print(planned)
    if error := _compat.triton_error():
        print(f"launches: the kernels need Triton ({error})")
    elif max(planned.h.slices, planned.dq.slices) > LAUNCHES:
        print(f"launches: more than {LAUNCHES} a pass")
    else:
        spec = call_of(problem, DTYPES[_dtype(dtype, False)], gate, states=bool(packed))
        for name, program in programs(spec, known)._asdict().items():
            print(f"\n{name}: {program}")


class _Session:
    """The tasks of a command, and what is printed and written of them."""

    def __init__(
        self,
        command: str,
        *,
        peers: str,
        dtype: str,
        repeats: int,
        seconds: float,
        limit: float,
        device: str,
        out: Path,
    ) -> None:

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.split(":")[0] not in ("cpu", "cuda"):
            raise RunError(f"--device is {device}; it must be auto, cpu or cuda")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RunError(f"--device is {device}; torch sees no GPU here; take --device auto")
        _at_least(1, repeats=repeats or 1)
        _at_least(0, seconds=seconds)
        _at_least(1, limit=limit)
        self.command, self.peers, self.limit, self.out = command, peers, limit, out
        self.cpu = cpu = device == "cpu"
        self.seconds = seconds or (90.0 if cpu else 3000.0)
        self.options: dict[str, Any] = {
            "device": device,
            "dtype": _dtype(dtype, cpu),
            "repeats": repeats or (5 if cpu else 30),
            "warm": 1 if cpu else 10,
        }
        self.missing = {x.name: x.missing(torch.device(device)) for x in cases.chosen(peers)}
        self.names = [name for name, reason in self.missing.items() if reason is None]
        self.tasks: list[dict[str, Any]] = []

    def take(self, dtype: str, repeats: int, seconds: float) -> None:
        """A dtype, repeats and a limit for a command in which nobody else takes part."""
        self.options |= {"dtype": dtype, "repeats": repeats}
        self.seconds = seconds
        self.missing = {}

    def add(self, kind: str, shape: Any, names: list[str] | None = None, **fields: Any) -> None:
        names = self.names if names is None else names
        self.tasks.append({"kind": kind, "shape": shape, "names": tuple(names), **fields})

    def check_room(self) -> None:
        """RunError where a result or a figure would be written over something of another."""
        plots.check_room(self.out, self.command)

    def run(self) -> None:
        began = time.time()
        self.check_room()
        [first] = work_off([Task("ceiling", **self.options)], self.limit)
        if first["status"] != "ok":
            raise RunError(f"the machine's own limits could not be measured: {first['reason']}")
        rows: list[dict[str, Any]] = []
        result = {
            "format": report.FORMAT,
            "command": self.command,
            "tfla": tfla.__version__,
            "commit": measure.commit(),
            "machine": first["machine"],
            "ceiling": first["ceiling"],
            "options": self.options,
            "missing": {n: why for n, why in self.missing.items() if why},
            "rows": rows,
        }
        report.say(*report.head(result).splitlines())
        for why in dict.fromkeys(result["missing"].values()):
            names = [name for name, reason in result["missing"].items() if reason == why]
            report.say(f"left out ({why}): {', '.join(names)}")
        seconds, until = self.seconds / max(len(self.tasks), 1) / 3, began + self.seconds
        common = {**self.options, "seconds": seconds, "until": until}
        shown: list[dict[str, Any]] = []  # the table that is being filled
        path = self.out / f"{self.command}.json"
        for row in work_off([Task(**task, **common) for task in self.tasks], self.limit):
            rows.append(row)
            report.save(path, result)  # a run that is stopped leaves what it measured
            if shown and report.title(shown[-1]) != report.title(row):
                report.show(shown, result["ceiling"])
                shown = []
            shown.append(row)
        report.show(shown, result["ceiling"])
        report.show_summary(rows)
        files = [file for file in plots.draw(result, self.out) if file.suffix == ".png"]
        print("results:", path, *files, f"(and SVG); took {time.time() - began:.0f} s")
        if any(row["status"] == "WRONG" and row.get("ours") for row in rows):
            raise typer.Exit(1)


def _machine(name: str, dtype: str) -> tuple[Any, str]:
    """A named device, or the one at hand with limits measured; and torch's name of the dtype."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = DTYPES[_dtype(dtype, name == "this" and device.type == "cpu")]
    words = str(kind).removeprefix("torch.")
    if name != "this":
        return r.MACHINES[name], words
    found = measure.ceiling(device, kind)
    planned = None
    if device.type == "cuda":
        planning: Any = importlib.import_module("tfla.kernels.planning")
        planned = planning.device_of(torch.empty(0, device=device))
    rates = {words: found["flops_per_s"]}
    described = measure.machine(device)["device"]
    return r.Machine(described, found["bytes_per_s"], rates, "measured", planned), words


def _dtype(name: str, cpu: bool) -> str:
    name = name or ("fp32" if cpu else "bf16")
    if name not in DTYPES:
        raise RunError(f"--dtype is {name}; it must be one of {', '.join(DTYPES)}")
    return name


def _at_least(least: float, **values: float) -> None:
    """RunError when an option is less, or no finite number."""
    for name, value in values.items():
        if not least <= value < math.inf:
            raise RunError(f"--{name} is {value:g}; it must be {least:g} or more")


def _reals(name: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise RunError(f"--{name} is {text}; it must be numbers with commas between them") from None
    if not all(math.isfinite(x) for x in numbers):
        raise RunError(f"--{name} is {text}; it must be finite numbers")
    return numbers


def _gates(name: str, text: str, step: float) -> tuple[float, ...]:
    """From the lowest to the highest."""
    ends = _reals(name, text)
    if len(ends) != 2 or not -LARGEST_GATE <= ends[0] < ends[1] <= LARGEST_GATE:
        raise RunError(
            f"--{name} is {text}; it must be two numbers from -{LARGEST_GATE} to {LARGEST_GATE}, "
            "the lower one first"
        )
    low, high = ends
    if not (high - low) / MOST_GATES <= step <= high - low:
        raise RunError(
            f"--step is {step:g}; it must be at most {high - low:g}, the range of --{name}, and at "
            f"least {(high - low) / MOST_GATES:g}"
        )
    return tuple(round(low + n * step, 9) for n in range(int((high - low) / step + 1e-6) + 1))


def _numbers(text: str) -> list[int]:
    words = [word for word in text.split(",") if word.strip()]
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise RunError(f"{text!r} must be whole numbers from 1 on, with commas between them")
    return [int(word) for word in words]
