"""Whole models beside the official stack: python benchmarks/stacks.py [--size tiny --device cpu]

An xLSTM 7B (bf16, random weights) reads a prompt of 16,384 tokens and decodes at batch 1 and 64;
one of 400M takes a training step: forward and backward. Rows: tfla.xlstm (decode steps from a CUDA
graph, as in generation), transformers and xlstm with the kernels of mlstm_kernels, the same two on
tfla. A parameter has the same values in every stack; "off" is the relative deviation from the first
row: of the logits, of the tokens of the first decode step, of the loss and a norm of gradients;
"all s" the seconds that the row took, compiling included.

One GPU with 80 GB, one model in memory at a time. On a GPU a stack has a process of its own: its
rows are kept as they come, and when a compiler or a driver ends it, another goes on behind the row
that it died in. What fails or takes too long is a line that says why. `--warm` first runs every row
with one layer, all at the same time, for the caches of compilers. `transformers`, `xlstm` and
`mlstm_kernels` only have to be importable (PYTHONPATH); see guarded.py for how the last is built.
The limits are printed first: arithmetic over the rate of a matrix product, bytes over that of a
copy.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from guarded import shallow
from stack_models import HUGGING, OURS, STACKS, Stack, variants
from torch import Tensor

from tfla.bench import measure
from tfla.xlstm import XLSTMConfig

WARM, REPEATS, STEPS = 2, 5, 5  # calls that do not count, calls that do, decode steps a call
LONG = 5.0  # seconds of calls after which 1 that does not count and 2 that do are enough
GRACE = 20.0  # seconds over its time until a process that does not answer is ended
OFF = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # beyond it a row says WRONG


class Prepared(NamedTuple):
    call: Callable[[], object]  # to be timed
    count: int  # steps in a call
    check: Tensor  # of a first one


class Part(NamedTuple):
    name: str
    function: Callable[[Stack, Tensor], "Prepared"]
    shape: tuple[int, int]  # of its tokens
    limit_ms: float


@dataclasses.dataclass(frozen=True)
class Size:
    inference: XLSTMConfig
    training: XLSTMConfig
    dtype: torch.dtype
    prefill: int  # tokens of the long prompt
    prompt: int  # tokens of each prompt before decoding
    batches: tuple[int, ...]  # sequences that are decoded at once
    batch: tuple[int, int]  # sequences and tokens of a training step


TINY = XLSTMConfig(vocab_size=256, hidden_size=128, num_layers=2, num_heads=2)
MEDIUM = XLSTMConfig(vocab_size=50304, hidden_size=1024, num_layers=24, num_heads=4)
SIZES = {
    "tiny": Size(TINY, TINY, torch.float32, 256, 64, (1, 4), (2, 128)),
    "7b": Size(XLSTMConfig.xlstm_7b(), MEDIUM, torch.bfloat16, 16384, 128, (1, 64), (8, 2048)),
}


# ------------------------------------------------------------------------------------- measurements


def read(stack: Stack, tokens: Tensor) -> Prepared:
    return Prepared(lambda: stack.prefill(tokens), 1, stack.prefill(tokens).float().cpu())


def decode(stack: Stack, prompts: Tensor) -> Prepared:
    step = stack.decode(prompts)
    check = step().clone().cpu()
    step()  # records the graph, where there is one

    def some() -> None:
        for _ in range(STEPS):
            step()

    return Prepared(some, STEPS, check)


def train(stack: Stack, tokens: Tensor) -> Prepared:
    parameters = list(stack.model.parameters())

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        logits = stack.logits(tokens[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    loss = step()
    norm = torch.stack([p.grad.float().norm() for p in parameters if p.grad is not None]).norm()
    return Prepared(step, 1, torch.stack([loss, norm]).cpu())


def parts(size: Size, training: bool, ceiling: dict[str, float], state: torch.dtype) -> list[Part]:
    """Of one model: what is measured, and the limit of the device for it."""
    rate, bandwidth = ceiling["flops_per_s"], ceiling["bytes_per_s"]
    if training:
        B, T = size.batch
        flops = B * T * size.training.flops_per_token(True)
        return [Part(f"train step {B} x {T:,}", train, (B, T + 1), flops / rate * 1e3)]
    config, T = size.inference, size.prefill
    embedding = config.vocab_size * config.hidden_size
    flops = T * config.flops_per_token() - (T - 1) * 2 * embedding  # logits after the last token
    found = [Part(f"prefill {T:,}", read, (1, T), flops / rate * 1e3)]
    weights = (config.num_parameters() - embedding) * size.dtype.itemsize  # its rows are looked up
    for B in size.batches:
        total = weights + 2 * config.state_bytes(B, dtype=state)  # states: read and written
        shape = (B, size.prompt)
        found.append(Part(f"decode, batch {B}", decode, shape, total / bandwidth * 1e3))
    return found


def boxed(call: Callable[[], Any], seconds: float) -> Any:
    """call(), or TimeoutError after some seconds."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    if seconds < 1:
        raise TimeoutError("left out: the time of the whole run is over")
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(int(seconds))
    try:
        return call()
    finally:
        signal.alarm(0)


def off(found: Tensor, wanted: Tensor) -> float:
    if not found.is_floating_point():
        return (found != wanted).float().mean().item()
    return ((found - wanted).norm() / wanted.norm()).item()


Send = Callable[[Any], None]


def apart(work: Callable[[Send], None], seconds: Callable[[], float]) -> Iterator[Any]:
    """What `work(send)` sends from a process of its own. RuntimeError if that one dies, or sends
    nothing for `seconds()`, which is asked after each message."""
    fork: Any = multiprocessing.get_context("fork")  # this process has not touched the GPU
    here, there = fork.Pipe(False)
    child = fork.Process(target=work, args=(there.send,))
    child.start()
    there.close()
    try:
        with contextlib.suppress(EOFError):
            while here.poll(wait := max(0.0, seconds())):
                yield here.recv()
            raise RuntimeError(f"its process did not answer for {wait:.0f} s")
        child.join()
    finally:
        child.kill()
        child.join()
        here.close()
    if child.exitcode:
        raise RuntimeError(f"its process ended with {child.exitcode}, see the output above")


def machine(size: Size, device: torch.device) -> tuple[dict[str, float], dict[str, Any]]:
    """The limits and the description of the device."""
    return measure.ceiling(device, size.dtype), measure.machine(device)


Key = tuple[str, str]  # name of a row or of a stack, part
WHOLE = {False: "all", True: "all of training"}  # the part of a model that is being made


class Run:
    """What is known so far: rows, checks of the first stack, and the time that is left."""

    def __init__(self, size: Size, device: torch.device, args: argparse.Namespace) -> None:
        self.size, self.device, self.out = size, device, args.out
        self.profile = args.profile
        self.each, self.end = args.each, time.monotonic() + args.seconds
        self.wanted: dict[str, Tensor] = {}
        self.tried: set[Key] = set()
        self.send: Send | None = None  # to the process that keeps the rows
        self.apart = device.type == "cuda"
        known = self.away(lambda send: send(machine(size, device))) if self.apart else None
        self.limits, described = list(known)[0] if known else machine(size, device)
        self.result: dict[str, Any] = {
            "size": args.size,
            "dtype": str(size.dtype),
            "machine": described,
            "commit": measure.commit(),
            "ceiling": self.limits,
            "rows": [],
        }

    def left(self) -> float:
        return min(self.each, self.end - time.monotonic())

    def away(self, work: Callable[[Send], None]) -> Iterator[Any]:
        return apart(work, lambda: self.left() + GRACE)

    def add(self, **row: Any) -> None:
        if self.send:
            return self.send((row, {name: x.numpy() for name, x in self.wanted.items()}))
        self.result["rows"].append(row)
        print(line(row, details=True), flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def begin(self, key: Key) -> None:
        if self.send:
            self.send(key)

    def stack(self, name: str, seconds: float) -> None:
        """All rows of a stack, in this time."""
        end = self.end
        self.end = min(end, time.monotonic() + seconds)
        if not self.apart:
            self.rows(name)
        while self.apart and self.goes_on(name) and self.left() > 1:
            pass
        self.end = end

    def goes_on(self, name: str) -> bool:
        """What is left of a stack, in one process; whether that died in something to leave out."""
        begun = None

        def work(send: Send) -> None:
            self.send = send
            self.rows(name)

        try:
            for first, second in self.away(work):
                if isinstance(first, str):
                    begun = (first, second)
                    if second == WHOLE[True]:
                        self.tried.add((name, WHOLE[False]))
                    elif second != WHOLE[False]:
                        self.tried.add(begun)
                else:
                    self.wanted = {name: torch.from_numpy(x) for name, x in second.items()}
                    self.add(**first)
        except RuntimeError as error:
            stack, part = begun or (name, "all")
            self.add(stack=stack, part=part, reason=why(error))
            self.tried.add((stack, part))
            return begun is not None
        return False

    def rows(self, name: str) -> None:
        for training in (False, True):
            if (name, WHOLE[training]) not in self.tried:
                self.begin((name, WHOLE[training]))
                self.model(name, training)

    def model(self, name: str, training: bool) -> None:
        """The rows of one model; it is gone afterwards."""
        config = self.size.training if training else self.size.inference
        rows, row = variants(name, (config, self.size.dtype, self.device, training)), None
        try:
            while (row := boxed(lambda: next(rows, None), self.left())) is not None:
                for part in self.parts(row[1], training):
                    if (row[0], part.name) not in self.tried:
                        self.begin((row[0], part.name))
                        self.part(*row, part, config.vocab_size)
        except Exception as error:
            self.add(stack=name, part=WHOLE[training], reason=why(error))
        finally:
            row = None
            rows.close()
            self.clear()

    def parts(self, stack: Stack, training: bool) -> list[Part]:
        low = getattr(stack, "state_dtype", None)
        found = parts(self.size, training, self.limits, low or torch.float32)
        return [part for part in found if not (low and part.function is read)]

    def part(self, name: str, stack: Stack, part: Part, vocab_size: int) -> None:
        row: dict[str, Any] = {"stack": name, "part": part.name, "limit_ms": part.limit_ms}
        self.clear()
        began, known = time.monotonic(), len(shallow)
        try:
            tokens = self.tokens(part, vocab_size)
            boxed(lambda: self.measure(row, part, stack, tokens), self.left())
        except Exception as error:
            row["reason"] = why(error)
        stack.model.zero_grad()
        row["seconds"] = time.monotonic() - began
        if found := sorted(set(shallow[known:])):
            row["note"] = "LLVM's SLP vectorizer, which aborts, cut to depth 1: " + ", ".join(found)
        self.add(**row)

    def warm(self, names: list[str]) -> None:
        """Every row with one layer and few words, each in a process of its own at the same time:
        what is compiled for it stays in the caches of Triton and of torch."""

        def work(name: str, training: bool, index: int) -> None:
            config = self.size.training if training else self.size.inference
            config = dataclasses.replace(config, num_layers=1, vocab_size=256)
            null = os.open(os.devnull, os.O_WRONLY)  # the rows themselves say what fails
            for stream in (1, 2):
                os.dup2(null, stream)
            for _, stack in variants(name, (config, self.size.dtype, self.device, training)):
                for part in self.parts(stack, training)[-1 - index :][:1]:
                    with torch.set_grad_enabled(training):
                        part.function(stack, self.tokens(part, config.vocab_size))

        fork: Any = multiprocessing.get_context("fork")
        count = {
            training: len(parts(self.size, training, self.limits, torch.float32))
            for training in (False, True)
        }
        children = [
            fork.Process(target=work, args=(name, training, index))
            for training in (False, True)
            for index in range(count[training])
            for name in names
        ]
        for child in children:
            child.start()
        end = time.monotonic() + self.left()
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
            if child.exitcode is None:
                child.kill()
                child.join()

    def tokens(self, part: Part, vocab_size: int) -> Tensor:
        draw = torch.Generator().manual_seed(7)
        return torch.randint(vocab_size, part.shape, generator=draw).to(self.device)

    def measure(self, row: dict[str, Any], part: Part, stack: Stack, tokens: Tensor) -> None:
        with torch.set_grad_enabled(part.function is train):
            call, count, check = part.function(stack, tokens)
            found = measure.until_done(call, self.device, REPEATS, WARM, seconds=LONG)
            times = [ms / count for ms in found]
            row["off"] = off(check, self.wanted.setdefault(part.name, check))
            row["wrong"] = check.is_floating_point() and not row["off"] <= OFF[self.size.dtype]
            number = part.shape[0] if part.function is decode else tokens[:, 1:].numel()
            row["tokens_per_s"] = number / statistics.median(times) * 1e3
            if self.device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            row |= {"ms": statistics.median(times), "samples_ms": times}
            if self.profile and row["stack"] == OURS:
                spent_on = measure.by_kernel(call, self.device)
                row["kernels"] = [(name, n / count, ms / count) for name, n, ms in spent_on]

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:150]


def line(row: dict[str, Any], details: bool = False) -> str:
    head = f"{row['stack']:<21} {row['part']:<21}"
    if "ms" not in row:
        return f"{head} {row['reason']}"
    peak = f"{row['peak_bytes'] / 2**30:7.1f}" if "peak_bytes" in row else "      -"
    share, rate, mark = row["limit_ms"] / row["ms"], row["tokens_per_s"], " WRONG" * row["wrong"]
    text = f"{head} {row['ms']:9.2f} {share:7.0%} {rate:10,.0f} {peak} {row['off']:8.1e}"
    text += f" {row['seconds']:6.1f}{mark}"
    if "note" in row:
        text += f"\n  {row['note']}"
    return "\n".join([text, *spent(row)]) if details and "kernels" in row else text


def spent(row: dict[str, Any]) -> list[str]:
    """Where the time of a call (of a decode step) goes, by kernel."""
    found = row["kernels"]
    launches, busy = (sum(entry[at] for entry in found) for at in (1, 2))
    head = f"{launches:10.1f} launches, {busy:.3f} ms of {row['ms']:.3f} ms, limit"
    lines = [f"{head} {row['limit_ms']:.3f} ms; us each, ms, share of the row:"]
    for name, count, ms in found[:20]:
        each, share = ms / count * 1e3, ms / row["ms"]
        lines.append(f"{count:10.1f} x {each:9.1f} us {ms:9.3f} ms {share:4.0%}  {name[:100]}")
    if rest := found[20:]:
        lines.append(
            f"{sum(entry[1] for entry in rest):10.1f} others, "
            f"{sum(entry[2] for entry in rest):.3f} ms"
        )
    return lines


HEAD = (
    f"{'':<21} {'':<21} {'ms':>9} {'limit':>7} {'tokens/s':>10} {'GiB':>7} {'off':>8} {'all s':>6}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a JSON with every sample")
    parser.add_argument("--seconds", type=float, default=270, help="of the whole run")
    parser.add_argument("--each", type=float, default=60, help="seconds of one model or one row")
    parser.add_argument("--stacks", default=",".join(STACKS), help="some of these, with commas")
    parser.add_argument("--warm", action="store_true", help="fill the caches of compilers first")
    parser.add_argument("--profile", action="store_true", help="also where tfla's own time goes")
    args = parser.parse_args()
    wanted = [name.strip() for name in args.stacks.split(",")]
    if unknown := [name for name in wanted if name not in STACKS]:
        parser.error(f"--stacks knows {', '.join(STACKS)}; got {', '.join(unknown)}")
    # The few small kernels that mlstm_kernels has from torch.compile need no pool of processes,
    # each of which imports torch first.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    run = Run(SIZES[args.size], torch.device(args.device), args)
    print(json.dumps(run.result["machine"]))
    rate, bandwidth = run.limits["flops_per_s"], run.limits["bytes_per_s"]
    print(f"product {rate / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s; limits in ms:")
    for training, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.float32)):
        found = parts(run.size, training, run.limits, dtype)
        kind = "training" if training else f"states in {dtype}".replace("torch.", "")
        print(f"  {kind}: " + "; ".join(f"{part.name} {part.limit_ms:.2f}" for part in found))
    names = [name for name in STACKS if name in wanted]
    if args.warm and run.apart:
        began = time.monotonic()
        run.warm(names)
        print(f"caches filled in {time.monotonic() - began:.0f} s")
    print(HEAD, flush=True)
    while names:  # each has its share of what is left
        shares = [2 if name == HUGGING else 1 for name in names]  # two rows for each part
        run.stack(names.pop(0), (run.end - time.monotonic()) * shares[0] / sum(shares))
    rows = run.result["rows"]
    print("\n" + HEAD)
    for part_name in dict.fromkeys(row["part"] for row in rows):
        print("\n".join(line(row) for row in rows if row["part"] == part_name))
    return 0 if any("ms" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
