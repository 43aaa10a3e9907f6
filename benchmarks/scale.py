"""Training on several GPUs: speed, weak scaling, sequences split over them, and what they exchange.

    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --out runs/scale

An xLSTM of 1.3B parameters in the layout of xLSTM 7B, in bf16, with AdamW, on random tokens. Its
pieces, in this order, are

    exchange    the exchange of a call alone
    agreement   how right a split call is
    functions   how fast it is
    weak        one GPU and all of them at the same tokens a GPU, blocks compiled and, but for
                --no-eager, as they are
    context     sequences of 65,536 tokens a GPU, shared by 2, 4, 8, ... of the GPUs
    long        one sequence over all, of 524,288 and of 1,048,576 tokens a GPU, with as many layers
                as one GPU holds of its share
    checkpoint  written and read by all

A run takes those that --pieces names, ends after --seconds, whatever is left, and prints a table
last. --out keeps what was measured after each piece; a later run on as many GPUs of the same kind
and of the same commit adds its own, so that the whole may be had in several runs:

    torchrun ... benchmarks/scale.py --pieces exchange,agreement,functions,weak
    torchrun ... benchmarks/scale.py --pieces context
    torchrun ... benchmarks/scale.py --pieces long,checkpoint

Beside a figure stands what the model of `tfla roofline --gpus` says ("model"). --tiny takes seconds
on CPUs, over gloo.
"""

import argparse
import functools
import gc
import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tfla
from tfla.bench import measure
from tfla.bench import scale as model_of_scale
from tfla.xlstm import XLSTM, XLSTMConfig
from tfla.xlstm import checkpoint as checkpoints
from tfla.xlstm.parallel import Ranks
from tfla.xlstm.run import TrainOptions
from tfla.xlstm.train import Placement, TrainState, autocast, mean_nats

Row = dict[str, Any]


class Session:
    """The ranks, the clock that they share, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.began, self.options, self.tiny = time.monotonic(), options, options.tiny
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.place = Ranks(self.device)
        self.device, self.world = self.place.device, dist.get_world_size()
        self.main = self.place.main
        self.piece, self.rows = "", list[Row]()
        Ranks.drawn_on = self.device  # faster
        # Should a rank hang or run out of memory, what was measured until then is shown.
        self.alarm = threading.Timer(options.seconds + 20, self.give_up)
        self.alarm.daemon = True
        self.alarm.start()
        small = XLSTMConfig(vocab_size=257, hidden_size=32, num_layers=2, num_heads=2)
        large = XLSTMConfig(vocab_size=50304, hidden_size=2048, num_layers=24, num_heads=4)
        self.config = small if self.tiny else large
        dtype = torch.float32 if self.tiny else torch.bfloat16
        self.peak = measure.ceiling(self.device, dtype)["flops_per_s"]
        self.peak = min(self.all(self.peak))

    def all(self, x: Any) -> list[Any]:
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, x)
        return out

    def left(self) -> float:
        """Seconds, by the clock of rank 0."""
        return self.place.elapsed(self.options.seconds - (time.monotonic() - self.began))

    def alone(self, act: Callable[[], Row]) -> Row:
        """By each rank for itself, all at once. The slowest counts, as it does where they work
        together: GPUs of a kind differ by some percent."""
        rows = self.all(act())
        return max(rows, key=lambda row: row.get("seconds_a_step", float("inf")))

    def give_up(self) -> None:
        if self.main:
            self.show()
            print("stopped: the time was up", flush=True)
        os._exit(3)

    @property
    def path(self) -> Path:
        return self.options.out / "scale.json"

    def result(self) -> Row:
        return {
            "machine": measure.machine(self.device),
            "tfla": tfla.__version__,
            "commit": measure.commit(),
            "gpus": self.world,
            "peak_flops_per_s": self.peak,
        }

    def earlier(self, pieces: Sequence[str]) -> None:
        """Takes up rows of other pieces that a run of the same kind left in --out."""
        if not (self.main and self.path.is_file()):
            return
        found, own = json.loads(self.path.read_text()), self.result()
        kind = ("commit", "gpus", "tfla")
        if [found[x] for x in kind] != [own[x] for x in kind] or (
            found["machine"].get("device") != own["machine"].get("device")
        ):
            sys.exit(
                f"scale.py: {self.path} is of another commit or of other GPUs; name another --out"
            )
        self.rows = [row for row in found["rows"] if row["piece"] not in pieces]

    def keep(self) -> None:
        """Writes what was measured so far."""
        if self.main:
            self.options.out.mkdir(parents=True, exist_ok=True)
            rows = sorted(self.rows, key=lambda row: list(PIECES).index(row["piece"]))
            part = self.path.with_suffix(".tmp")
            part.write_text(json.dumps(self.result() | {"rows": rows}, indent=1, default=str))
            part.replace(self.path)

    def show(self) -> None:
        self.keep()
        print(
            f"\n{measure.machine(self.device).get('device')} x {self.world}; "
            f"{self.peak / 1e12:.4g} TFLOP/s measured; "
            f"{time.monotonic() - self.began:.0f} s; {self.path}"
        )
        skip = {"piece", "name", "steps", "loss", "seconds_a_step"}
        for row in json.loads(self.path.read_text())["rows"]:
            rest = ", ".join(f"{k} {v}" for k, v in row.items() if k not in skip)
            print(f"{row['name']:28} {rest}")

    def add(self, row: Row) -> None:
        if self.main:
            self.rows.append({"piece": self.piece} | row)
            print(json.dumps(row), flush=True)


def timed_steps(
    session: Session,
    place: Placement,
    config: XLSTMConfig,
    tokens: tuple[int, int],
    together: bool,
    seconds: float,
) -> Row:
    """Steps of training on (B, T) tokens a GPU, or the reason why there are none."""
    device = place.device
    torch.manual_seed(0)
    row: Row = {"B": tokens[0], "T": tokens[1], "layers": config.num_layers}
    row["hidden"] = config.hidden_size
    state: Any = None

    def agreed(x: float) -> float:
        return session.place.elapsed(x) if together else x

    try:
        options = TrainOptions(steps=1, precision="fp32" if session.tiny else "bf16")
        with torch.device(device):  # where initial weights are drawn faster
            model = place.build(config, options.precision)
        state = TrainState(model, options, place)
        del model
        shape = tokens[0], tokens[1] + 1
        windows = torch.randint(config.vocab_size, shape, device=device)

        def steps(number: int) -> float:
            """Seconds of each. As in training, the host does not wait for the device in between."""

            def run() -> None:
                nonlocal loss
                for _ in range(number):
                    with autocast(options.precision, device):
                        loss = mean_nats(state.model, windows[:, :-1], windows[:, 1:])
                    loss.backward()
                    loss = place.clip(state, loss.detach(), 1.0)[0]
                    state.step(1e-4)

            return measure.until_done(run, device, 1, 0)[0] / 1e3 / number

        began, loss = time.monotonic(), torch.zeros(())
        first = steps(1)  # with it comes what is compiled and what is allocated
        row["seconds_of_the_first_step"] = round(first, 2)
        number = 1 + int(min(2.0, seconds / 6 / agreed(steps(1))))
        left = agreed(seconds - (time.monotonic() - began))
        times = [steps(number)]
        while len(times) < 5 and left > (len(times) + 1) * number * agreed(times[0]):
            times.append(steps(number))
        row |= {"seconds_a_step": statistics.median(times), "steps": number * len(times)}
        row["loss"] = loss.item()
        if device.type == "cuda":
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            torch.cuda.reset_peak_memory_stats()
    except torch.OutOfMemoryError:
        row["reason"] = "out of memory"
    state = None
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def speed(
    session: Session, row: Row, config: XLSTMConfig, name: str, gpus: int, tokens: int
) -> Row:
    """tokens: of a step, on all GPUs together."""
    out = {"name": name, "gpus": gpus} | row
    if "seconds_a_step" in row:
        each = tokens / row["seconds_a_step"] / gpus
        share = each * config.flops_per_token(training=True) / session.peak
        out |= {"tokens_per_s": round(each * gpus, 1), "us_a_token_and_gpu": round(1e6 / each, 4)}
        out["share_of_matmul_peak"] = round(share, 4)
    return out


def fitting(session: Session, tokens: int) -> XLSTMConfig:
    """The model with as many layers as a GPU holds for so many tokens; narrower, if it holds less
    than two. Held are the fp32 inputs of all blocks, and about 105 bytes a channel of one block."""
    free = min(session.all(torch.cuda.mem_get_info()[1])) * 0.9 - 10e9  # of which logits
    whole = session.config
    for part in (1, 2, 4):
        d = whole.hidden_size // part
        fixed = 105 * d * tokens + 16 * 2 * whole.vocab_size * d
        layer = 4 * d * tokens + 16 * 12.2 * d * d
        layers = min(whole.num_layers, int((free - fixed) / layer))
        if layers >= 2:
            break
    fields = {"num_layers": max(layers, 1), "hidden_size": d, "num_heads": whole.num_heads // part}
    return XLSTMConfig.from_dict(whole.to_dict() | fields)


def weak_scaling(session: Session) -> None:
    B, T = (2, 32) if session.tiny else session.options.batch
    config, world = session.config, session.world
    kinds = [(False, ""), (True, ", compiled")][not session.options.eager :]
    kinds = kinds[:1] if session.tiny else kinds  # the compiler takes longer than all the rest
    limit = session.options.seconds / 12

    def single(compile: bool, name: str) -> Row:
        place = Placement(session.device, compile)
        row = timed_steps(session, place, config, (B, T), False, limit)
        return speed(session, row, config, f"train{name}", 1, B * T)

    one = {}
    for compile, name in kinds:
        one[name] = session.alone(functools.partial(single, compile, name))
        session.add(one[name])
    for compile, name in reversed(kinds):  # what counts comes first
        place = Ranks(session.device, compile=compile)
        row = timed_steps(session, place, config, (B, T), True, limit)
        every = speed(session, row, config, f"train, sharded{name}", world, B * T * world)
        alone = one[name]
        if "tokens_per_s" in alone and "tokens_per_s" in every:
            ratio = every["tokens_per_s"] / alone["tokens_per_s"] / world
            every["of_one_gpu_times_n"] = round(ratio, 4)
            own = alone["seconds_a_step"]
            predicted = own / model_of_scale.step_of(own, config, world, B * T)
            every["model"] = round(predicted, 4)
        session.add(every)


def shared_sequences(
    session: Session, config: XLSTMConfig, own: int, context: Sequence[int], seconds: float
) -> None:
    """Sequences of `own` tokens a GPU, each shared by so many GPUs as `context` says one after the
    other, beside one GPU with as many tokens for itself: the inputs of blocks (fp32) and what one
    block computes are held, the rest is computed again."""
    world = session.world
    each = seconds / (len(context) + 1)
    if session.left() < each:
        session.add({"name": f"sequences of {own:,} a GPU", "reason": "no time left"})
        return

    def single() -> Row:
        row = timed_steps(session, Alone(session.device), config, (1, own), False, each)
        return speed(session, row, config, f"one sequence of {own:,}", 1, own)

    one = session.alone(single)
    session.add(one)
    for ranks in context:
        name = f"{world // ranks} x {ranks * own:,} over {ranks}"
        if session.left() < each:
            session.add({"name": name, "gpus": world, "reason": "no time left"})
            continue
        place = Ranks(session.device, context_ranks=ranks, recompute=True)
        row = timed_steps(session, place, config, (1, own), True, each)
        split = speed(session, row, config, name, world, own * world)
        if "tokens_per_s" in one and "tokens_per_s" in split:
            ratio = split["us_a_token_and_gpu"] / one["us_a_token_and_gpu"]
            split["time_a_token_of_one_gpu"] = round(ratio, 4)
            alone = one["seconds_a_step"]
            predicted = model_of_scale.step_of(alone, config, world, own, ranks) / alone
            split["model"] = round(predicted, 4)
        session.add(split)


def context(session: Session) -> None:
    own = 64 if session.tiny else 65536
    config = session.config if session.tiny else fitting(session, own)
    ranks = [n for n in (2, 4, 8, 16, 32) if session.world % n == 0]
    shared_sequences(session, config, own, ranks, session.left())


def long(session: Session) -> None:
    lengths = (128,) if session.tiny else (524288, 1048576)
    for left, own in enumerate(lengths):
        config = session.config if session.tiny else fitting(session, own)
        seconds = session.left() / (len(lengths) - left)
        shared_sequences(session, config, own, [session.world], seconds)


def checkpoint(session: Session) -> None:
    """Bytes of the parameters and both moments, written and read by all ranks at once. The folder
    is removed again."""
    options = TrainOptions(steps=1, precision="fp32" if session.tiny else "bf16")
    place, folder = Ranks(session.device), session.options.out / "checkpoint"
    state = TrainState(place.build(session.config, options.precision), options, place)
    for own in state.own.values():
        own.grad = torch.zeros_like(own)
    state.step(0.0)  # moments there are after a step
    size = 12 * session.config.num_parameters()

    def timed(act: Callable[[], object]) -> float:
        dist.barrier()
        began = time.monotonic()
        act()
        return float(max(session.all(time.monotonic() - began)))

    def write() -> None:
        place.save(folder, {"step": 1, "config": session.config.to_dict()}, state, {})
        place.finish()

    def read() -> None:
        """Rank 0 reads every byte against its checksum, then all read what they hold."""
        found: list[Any] = [None]
        if session.main:
            saved = checkpoints.load(folder)
            found = [(saved.path, saved.meta)]
        dist.broadcast_object_list(found)
        place.load(checkpoints.opened(*found[0]), state)

    if session.main:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoints").mkdir(parents=True)
    written, loaded = timed(write), timed(read)
    session.add(
        {
            "name": "checkpoint",
            "gpus": session.world,
            "gb": round(size / 1e9, 2),
            "write_s": round(written, 2),
            "read_s": round(loaded, 2),
        }
    )
    dist.barrier()
    if session.main:
        shutil.rmtree(folder)


class Alone(Placement):
    """One process that computes again what ``Ranks`` does with recompute=True."""

    def build(self, config: XLSTMConfig, precision: str) -> torch.nn.Module:
        with torch.device(self.device):
            model: Any = XLSTM(config)
        for block in model.blocks:
            block.forward = recomputed(block.forward)
        return model


def recomputed(call: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **options: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            call, *args, use_reentrant=False, preserve_rng_state=False, **options
        )

    return forward


def agreement(session: Session) -> None:
    """Relative errors of `tfla.mlstm` split, and in brackets whole, against the whole in fp64."""
    config, world, rank = session.config, session.world, dist.get_rank()
    dtype = torch.float32 if session.tiny else torch.bfloat16
    own = 32 if session.tiny else 4096
    torch.manual_seed(1)  # the same numbers on all ranks
    shapes = [[config.K], [config.K], [config.V], [], [], [config.V]]
    size = 1, own * world, config.num_heads
    x = [torch.randn(*size, *d, device=session.device) for d in shapes]
    x = [y.to(dtype) if y.dim() == 4 else y + 8 * (n == 4) for n, y in enumerate(x)]
    part = slice(rank * own, (rank + 1) * own)
    whole = slice(None)
    found = []
    for rows, group, kind in (
        (whole, None, torch.float64),
        (whole, None, None),
        (part, dist.group.WORLD, None),
    ):
        *inputs, dh = (y[:, rows].to(kind or y.dtype, copy=True).requires_grad_() for y in x)
        backend = "reference" if kind else None
        h, _ = tfla.mlstm(*inputs, group=group, backend=backend)
        found.append([h.detach(), *torch.autograd.grad(h, inputs, dh.detach())])
    errors = {}
    for name, *results in zip(("h", "dq", "dk", "dv", "di", "df"), *found, strict=True):
        true, one, split = (y if y.shape[1] == own else y[:, part] for y in results)
        off = [((y.double() - true).norm() / true.norm()).item() for y in (split, one)]
        errors[name] = "{:.1e} ({:.1e})".format(*map(max, zip(*session.all(off), strict=True)))
    session.add({"name": "mlstm, split (whole)", "gpus": world, **errors})


def functions(session: Session) -> None:
    """`tfla.mlstm` alone, forward and backward: a share of the tokens on one GPU, and split."""
    config, world = session.config, session.world
    dtype = torch.float32 if session.tiny else torch.bfloat16
    for own in (32,) if session.tiny else (16384, 65536, 524288):
        if session.left() < 10 and not session.tiny:
            return
        shapes = [[config.K], [config.K], [config.V], [], []]
        x = [torch.randn(1, own, config.num_heads, *d, device=session.device) for d in shapes]
        x = [y.to(dtype).requires_grad_() for y in x[:3]] + [y.requires_grad_() for y in x[3:]]
        dh = torch.randn_like(x[2])
        found = {}
        for name, group in (("alone", None), ("split", dist.group.WORLD)):

            def call(group: Any = group, x: Any = x, dh: Any = dh) -> None:
                h, _ = tfla.mlstm(*x, group=group)
                torch.autograd.grad(h, x, dh)

            found[name] = max(session.all(milliseconds(session, call)))
        session.add(
            {
                "name": f"mlstm, {own:,} tokens a GPU",
                "gpus": world,
                "alone_ms": found["alone"],
                "split_ms": found["split"],
                "ratio": round(found["split"] / found["alone"], 4),
            }
        )


def exchange(session: Session) -> None:
    """The all-gather of a call alone, as each layer and direction makes it for one sequence."""
    config = session.config
    numbers = model_of_scale.states_of(config) // 4
    into = 4 * numbers * (session.world - 1)
    x = torch.randn(numbers, device=session.device)
    out = x.new_empty(session.world * numbers)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    ms = max(session.all(milliseconds(session, lambda: gather(out, x))))
    session.add(
        {
            "name": "exchange",
            "gpus": session.world,
            "bytes_of_a_rank": 4 * numbers,
            "microseconds": round(ms * 1e3, 2),
            "gb_per_s": round(4 * numbers * (session.world - 1) / ms / 1e6, 2),
            "model": round(1e6 * model_of_scale.collective(into, session.world), 2),
        }
    )


def milliseconds(session: Session, call: Callable[[], object]) -> float:
    """The median of 20 calls, after 5, that all ranks begin together."""
    return round(
        statistics.median(measure.until_done(call, session.device, 20, 5, before=dist.barrier)), 4
    )


PIECES: dict[str, Callable[[Session], None]] = {
    "exchange": exchange,
    "agreement": agreement,
    "functions": functions,
    "weak": weak_scaling,
    "context": context,
    "long": long,
    "checkpoint": checkpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--seconds", type=float, default=450.0, help="for everything together")
    parser.add_argument("--pieces", default=",".join(PIECES), help="with commas; default: all")
    parser.add_argument("--batch", type=int, nargs=2, default=(8, 2048), metavar=("B", "T"))
    parser.add_argument(
        "--eager", action=argparse.BooleanOptionalAction, default=True, help="without compile too"
    )
    parser.add_argument("--tiny", action="store_true", help="a test of this program, on CPUs")
    options = parser.parse_args()
    pieces = options.pieces.split(",")
    unknown = [piece for piece in pieces if piece not in PIECES]
    if unknown:
        parser.error(f"--pieces has {unknown[0]!r}, wanted some of {', '.join(PIECES)}")
    session = Session(options)
    session.earlier(pieces)
    for piece, measured in PIECES.items():
        if piece in pieces and session.left() > 0:
            session.piece = piece
            measured(session)
            session.keep()
    if session.main:
        session.show()
    session.alarm.cancel()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
