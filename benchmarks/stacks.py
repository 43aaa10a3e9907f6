"""Whole models beside the official stack: python benchmarks/stacks.py [--size tiny --device cpu]

An xLSTM 7B (bf16, random weights) reads a prompt of 16,384 tokens and decodes at batch 1 and 64;
one of 400M takes a training step: forward and backward. Rows: tfla.xlstm (decode steps from a CUDA
graph, as in generation), transformers and xlstm with the kernels of mlstm_kernels, the same two on
tfla. A parameter has the same values in every stack; "off" is the relative deviation from the first
row: of the logits, of the tokens of the first decode step, of the loss and a norm of gradients.

One GPU with 80 GB, one model in memory at a time. What fails or takes too long is a line that says
why. `transformers`, `xlstm` and `mlstm_kernels` only have to be importable (PYTHONPATH). The limits
are printed first: arithmetic over the rate of a matrix product, bytes over the rate of a copy.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import signal
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfla.bench import measure
from tfla.integrations.weights import names_in_checkpoint
from tfla.xlstm import XLSTM, Stream, XLSTMConfig, prefill

STACKS = OURS, HUGGING, XLSTM_LARGE, INSTALLED = "tfla", "transformers", "xlstm", "xlstm on tfla"
WARM, REPEATS, STEPS = 2, 5, 5  # calls that do not count, calls that do, decode steps a call
OFF = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # beyond it a row says WRONG


class Part(NamedTuple):
    name: str
    function: Callable[["Stack", Tensor], tuple[list[float], Tensor]]
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


# ------------------------------------------------------------------- three stacks, one face for all


class Ours:
    def __init__(self, model: XLSTM, state_dtype: torch.dtype | None = None) -> None:
        self.model, self.state_dtype = model, state_dtype

    def prefill(self, tokens: Tensor) -> Tensor:
        return prefill(self.model, tokens)[0]

    def decode(self, prompts: Tensor) -> Callable[[], Tensor]:
        stream = Stream(self.model, prompts, 1000, temperature=0, state_dtype=self.state_dtype)
        next(stream)
        return lambda: next(stream)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


class Transformers:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=True).logits[:, -1]

    def decode(self, prompts: Tensor) -> Callable[[], Tensor]:
        out = self.model(prompts, use_cache=True)
        name = "cache" if "cache" in out else "cache_params"  # from 5.24, and before
        last, cache = out.logits[:, -1].argmax(-1), out[name]

        def step() -> Tensor:
            nonlocal last
            out = self.model(last[:, None], use_cache=True, **{name: cache})
            last = out.logits[:, -1].argmax(-1)
            return last

        return step

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


class Large:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0][:, -1]

    def decode(self, prompts: Tensor) -> Callable[[], Tensor]:
        logits, state = self.model(prompts)
        last = logits[:, -1].argmax(-1)

        def step() -> Tensor:
            nonlocal last, state
            logits, state = self.model(last[:, None], state)
            last = logits[:, -1].argmax(-1)
            return last

        return step

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


Stack = Ours | Transformers | Large
Build = tuple[XLSTMConfig, torch.dtype, torch.device, bool]  # the last: to be trained


def variants(stack: str, build: Build) -> Iterator[tuple[str, Stack]]:
    """The rows of a stack: name, and what runs. They share a model where they can."""
    config, _, device, train = build
    if stack == OURS:
        ours = placed(lambda: XLSTM(config), build)
        yield stack, Ours(ours)
        if not train:
            yield "tfla, bf16 states", Ours(ours, torch.bfloat16)
        return
    on_tfla = stack == INSTALLED
    kernels = "triton" if device.type == "cuda" or on_tfla else "native"
    d, layers, mode = config.hidden_size, config.num_layers, "train" if train else "inference"
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size, "num_heads": config.num_heads, "embedding_dim": d,
        "num_blocks": layers, "ffn_proj_factor": config.ffn_factor, "mode": mode, "chunk_size": 128,
        "sequence_kernel": f"native_sequence__{kernels}", "step_kernel": kernels,
        "chunkwise_kernel": "chunkwise--"
        + ("triton_xl_chunk" if kernels == "triton" else "native_autograd"),
        "return_last_states": True,
    }  # fmt: skip
    if stack == HUGGING:
        from transformers import xLSTMConfig, xLSTMForCausalLM

        from tfla.integrations.transformers import patch

        fields |= {"hidden_size": d, "num_hidden_layers": layers}
        theirs = placed(lambda: xLSTMForCausalLM(xLSTMConfig(**fields)), build)
        yield stack, Transformers(theirs)
        yield "transformers on tfla", Transformers(patch(theirs))
        return
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    from tfla.integrations import mlstm_kernels

    if on_tfla:
        mlstm_kernels.install()
    try:
        yield stack, Large(placed(lambda: xLSTMLarge(xLSTMLargeConfig(**fields)), build))
    finally:
        mlstm_kernels.uninstall()


@torch.no_grad()
def placed(make: Callable[[], nn.Module], build: Build) -> Any:
    """A model made on the device in its dtype, no other copy at any time; the same values by the
    name that a parameter has in transformers."""
    config, dtype, device, train = build
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device).train(train)
    ours = names_in_checkpoint(config) if isinstance(model, XLSTM) else {}
    for key, parameter in model.named_parameters():
        key = "backbone.embeddings.weight" if key == "embedding.weight" and not ours else key
        parts = ours.get(key, [(key, len(parameter))])
        pieces = parameter.split([rows for _, rows in parts])
        for (name, _), piece in zip(parts, pieces, strict=True):
            draw(name, piece, config)
    return model


def draw(name: str, x: Tensor, config: XLSTMConfig) -> None:
    """Widths as the model is initialised with, but gates that differ and that do something."""
    d = config.hidden_size
    out = name.endswith(("out_proj.weight", "proj_down.weight"))
    std = 2 / (config.num_layers * d**0.5) if out else (2 / (5 * d)) ** 0.5
    mean = 0.0
    if x.dim() == 1:
        std, mean = (0.1, 1.0) if "norm" in name else (1.0, 4.0 if "fgate" in name else 0.0)
    x.normal_(mean, std, generator=torch.Generator(x.device).manual_seed(zlib.crc32(name.encode())))


# ------------------------------------------------------------------------------------- measurements


def timed(call: Callable[[], object], device: torch.device, warm: int = WARM) -> list[float]:
    """Milliseconds by the clock, each until the device is done: what a user waits for."""
    times = []
    for turn in range(warm + REPEATS):
        measure.synchronize(device)
        began = time.perf_counter()
        call()
        measure.synchronize(device)
        if turn >= warm:
            times.append((time.perf_counter() - began) * 1e3)
    return times


@torch.no_grad()
def read(stack: Stack, tokens: Tensor) -> tuple[list[float], Tensor]:
    check = stack.prefill(tokens).float().cpu()
    return timed(lambda: stack.prefill(tokens), tokens.device), check


@torch.no_grad()
def decode(stack: Stack, prompts: Tensor) -> tuple[list[float], Tensor]:
    step = stack.decode(prompts)
    check = step().clone().cpu()
    step()  # records the graph, where there is one

    def some() -> None:
        for _ in range(STEPS):
            step()

    return [ms / STEPS for ms in timed(some, prompts.device, warm=1)], check


def train(stack: Stack, tokens: Tensor) -> tuple[list[float], Tensor]:
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
    return timed(step, tokens.device), torch.stack([loss, norm]).cpu()


def parts(
    size: Size, training: bool, device_limits: dict[str, float], state_dtype: torch.dtype
) -> list[Part]:
    """Of one model: what is measured, and the limit of the device for it."""
    rate, bandwidth = device_limits["flops_per_s"], device_limits["bytes_per_s"]
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
        total = weights + 2 * config.state_bytes(B, dtype=state_dtype)  # states: read and written
        shape = (B, size.prompt)
        found.append(Part(f"decode, batch {B}", decode, shape, total / bandwidth * 1e3))
    return found


class Late(Exception):
    """A part took more than its time."""


def boxed(call: Callable[[], Any], seconds: float) -> Any:
    """call(), or Late after some seconds."""

    def ring(*_: object) -> None:
        raise Late(f"took more than {seconds:.0f} s")

    if seconds < 1:
        raise Late("left out: the time of the whole run is over")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(int(seconds))
    try:
        return call()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def off(found: Tensor, wanted: Tensor) -> float:
    if not found.is_floating_point():
        return (found != wanted).float().mean().item()
    return ((found - wanted).norm() / wanted.norm()).item()


class Run:
    """What is known so far: rows, checks of the first stack, and the time that is left."""

    def __init__(self, size: Size, device: torch.device, args: argparse.Namespace) -> None:
        self.size, self.device, self.out = size, device, args.out
        self.each, self.end = args.each, time.monotonic() + args.seconds
        self.wanted: dict[str, Tensor] = {}
        self.limits = measure.ceiling(device, size.dtype)
        machine = measure.machine(device)
        for package in ("transformers", "xlstm"):
            try:
                machine[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        self.result: dict[str, Any] = {
            "size": args.size, "dtype": str(size.dtype), "machine": machine,
            "commit": measure.commit(), "ceiling": self.limits, "rows": [],
        }  # fmt: skip

    def left(self) -> float:
        return min(self.each, self.end - time.monotonic())

    def add(self, **row: Any) -> None:
        self.result["rows"].append(row)
        print(line(row), flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def stack(self, name: str, training: bool) -> None:
        """All rows of a stack; its model is gone afterwards."""
        config = self.size.training if training else self.size.inference
        rows, row = variants(name, (config, self.size.dtype, self.device, training)), None
        try:
            while (row := boxed(lambda: next(rows, None), self.left())) is not None:
                low = getattr(row[1], "state_dtype", None)
                for part in parts(self.size, training, self.limits, low or torch.float32):
                    if not (low and part.function is read):
                        self.part(*row, part, config.vocab_size)
        except Exception as error:
            self.add(stack=name, part="all of training" if training else "all", reason=why(error))
        finally:
            row = None
            rows.close()
            self.clear()

    def part(self, name: str, stack: Stack, part: Part, vocab_size: int) -> None:
        row: dict[str, Any] = {"stack": name, "part": part.name, "limit_ms": part.limit_ms}
        tokens = torch.randint(vocab_size, part.shape, generator=torch.Generator().manual_seed(7))
        tokens = tokens.to(self.device)
        self.clear()
        try:
            times, check = boxed(lambda: part.function(stack, tokens), self.left())
            row["off"] = off(check, self.wanted.setdefault(part.name, check))
            row["wrong"] = check.is_floating_point() and not row["off"] <= OFF[self.size.dtype]
            row |= {"ms": statistics.median(times), "samples_ms": times}
            count = part.shape[0] if part.function is decode else tokens[:, 1:].numel()
            row["tokens_per_s"] = count / row["ms"] * 1e3
            if self.device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        except Exception as error:
            row["reason"] = why(error)
        stack.model.zero_grad()
        self.add(**row)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:150]


def line(row: dict[str, Any]) -> str:
    head = f"{row['stack']:<21} {row['part']:<21}"
    if "ms" not in row:
        return f"{head} {row['reason']}"
    peak = f"{row['peak_bytes'] / 2**30:7.1f}" if "peak_bytes" in row else "      -"
    share, rate, mark = row["limit_ms"] / row["ms"], row["tokens_per_s"], " WRONG" * row["wrong"]
    return f"{head} {row['ms']:9.2f} {share:7.0%} {rate:10,.0f} {peak} {row['off']:8.1e}{mark}"


HEAD = f"{'':<21} {'':<21} {'ms':>9} {'limit':>7} {'tokens/s':>10} {'GiB':>7} {'off':>8}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a JSON with every sample")
    parser.add_argument("--seconds", type=float, default=200, help="of the whole run")
    parser.add_argument("--each", type=float, default=60, help="seconds of one model or one row")
    parser.add_argument("--stacks", default=",".join(STACKS), help="some of these")
    args = parser.parse_args()
    run = Run(SIZES[args.size], torch.device(args.device), args)
    print(json.dumps(run.result["machine"]))
    rate, bandwidth = run.limits["flops_per_s"], run.limits["bytes_per_s"]
    print(f"product {rate / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s; limits in ms:")
    for training in (False, True):
        low = (torch.float32,) if training else (torch.float32, torch.bfloat16)
        for dtype in low:
            for part in parts(run.size, training, run.limits, dtype):
                note = f", {dtype} states".replace("torch.", "") if part.function is decode else ""
                if note or dtype == torch.float32:
                    print(f"  {part.name}{note}: {part.limit_ms:.2f}")
    wanted = [name.strip() for name in args.stacks.split(",")]
    print(HEAD, flush=True)
    # What matters most comes first: the time of the whole run may end before the rest.
    for names in ((OURS, HUGGING), (XLSTM_LARGE, INSTALLED)):
        for training in (False, True):
            for name in names:
                if name in wanted:
                    run.stack(name, training)
    rows = run.result["rows"]
    print("\n" + HEAD)
    for part_name in dict.fromkeys(row["part"] for row in rows):
        print("\n".join(line(row) for row in rows if row["part"] == part_name))
    return 0 if any("ms" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
