"""model.generate of a transformers xLSTM on tfla: python benchmarks/generate.py [--small]

An xLSTM 7B (bf16, random weights) of transformers, patched, by its own ``generate``, greedily: ms a
token at each batch size, as the difference of a long and a short run of the same prompts, so that
the prompt, the token that is read block by block and the recording of the graph count in neither;
then with nothing recorded, whose tokens must be the same; then a long prompt. Every line appears as
it is measured. `--small` is a model that a CPU runs, where nothing is recorded.
"""

import argparse
import gc
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from stack_models import placed
from torch import Tensor, nn

from tfla.bench import measure
from tfla.integrations import inference
from tfla.integrations.transformers import patch
from tfla.xlstm import XLSTMConfig

SMALL = XLSTMConfig(vocab_size=256, hidden_size=128, num_layers=2, num_heads=2)


def made(config: XLSTMConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """An xLSTMForCausalLM of these dimensions, on the device."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "ffn_proj_factor": config.ffn_factor,
        "eos_token_id": None,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    return placed(lambda: xLSTMForCausalLM(xLSTMConfig(**fields)), (config, dtype, device, False))


def text(batch: int, length: int, vocab: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.randint(vocab, (batch, length), generator=draw).to(device)


def generated(model: nn.Module, prompts: Tensor, count: int) -> tuple[Tensor, float]:
    """The new tokens of each prompt, and the seconds that they took."""
    measure.synchronize(prompts.device)
    began = time.perf_counter()
    out = model.generate(prompts, max_new_tokens=count, do_sample=False)
    measure.synchronize(prompts.device)
    return out[:, prompts.shape[1] :], time.perf_counter() - began


def token_ms(
    model: nn.Module, prompts: Tensor, few: int, many: int
) -> tuple[list[Tensor], list[float]]:
    """The tokens of three long runs, and ms for each that they have more than short ones."""
    generated(model, prompts, few)
    found, times = [], []
    for _ in range(3):
        _, short = generated(model, prompts, few)
        tokens, long = generated(model, prompts, many)
        found.append(tokens)
        times.append((long - short) / (many - few) * 1e3)
    return found, times


def agreement(found: list[Tensor], wanted: Tensor) -> str:
    """How many of the runs are `wanted`, as far as that goes, and where another one leaves it."""
    parted = [run[:, : wanted.shape[1]] != wanted for run in found]
    text = f"{sum(not bool(p.any()) for p in parted)} of {len(parted)} with the same tokens"
    for n, p in enumerate(parted):
        if p.any():
            first = p.int().argmax(1)[p.any(1)]  # of each row that leaves it
            text += f"; run {n}: {len(first)} rows, from token {int(first.min())}"
    return text


def decode(model: nn.Module, prompts: Tensor, many: int, name: str, plain: bool) -> bool:
    """The lines of a batch size; whether both ways came to the same tokens."""
    before = torch.cuda.memory_allocated() if prompts.is_cuda else 0
    found, times = token_ms(model, prompts, 16, many)
    line = f"{name}, batch {len(prompts)}: {statistics.median(times):.2f} ms a token"
    line += f" ({', '.join(f'{ms:.2f}' for ms in sorted(times))})"
    if prompts.is_cuda:
        left = torch.cuda.memory_allocated() - before
        line += f"; {left / 2**20:.1f} MiB more are in use afterwards"
    print(line, flush=True)
    if not plain:
        return True
    nothing = mock.patch.object(inference, "can_record", lambda x: False)
    with nothing if prompts.is_cuda else nullcontext():
        plain_runs, times = token_ms(model, prompts, 4, 16)
    print(f"  nothing recorded: {statistics.median(times):.2f} ms a token", flush=True)
    print(
        f"  recorded {agreement(found, plain_runs[0])}; not {agreement(plain_runs, plain_runs[0])}"
    )
    return all(torch.equal(run[:, :16], plain_runs[0]) for run in (*found, *plain_runs))


@torch.no_grad()
def prefill(model: nn.Module, tokens: Tensor) -> list[float]:
    def read() -> None:
        model(tokens, use_cache=True)

    return measure.until_done(read, tokens.device, 3, 1)


@torch.no_grad()
def launches(model: nn.Module, prompts: Tensor) -> None:
    """Where the device's time for a token goes."""
    few, many = (
        {
            name: (count, ms)
            for name, count, ms in measure.by_kernel(
                lambda n=n: model.generate(prompts, max_new_tokens=n, do_sample=False),  # type: ignore[misc]
                prompts.device,
            )
        }
        for n in (8, 12)
    )
    rows = []
    for name, (count, ms) in many.items():
        count, ms = count - few.get(name, (0, 0))[0], ms - few.get(name, (0, 0.0))[1]
        rows.append((ms / 4, count / 4, name))
    rows.sort(reverse=True)
    busy, number = sum(row[0] for row in rows), sum(row[1] for row in rows)
    print(f"  {number:.0f} launches a token, {busy:.2f} ms:")
    for ms, count, name in rows[:14]:
        print(f"    {count:6.1f} x {ms / max(count, 1) * 1e3:8.1f} us = {ms:6.3f} ms  {name[:90]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small model, on any device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="fewer of them, to fill caches of compilers")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--tokens", type=int, default=144)
    parser.add_argument("--prefill", type=int, default=16384, help="0: none")
    parser.add_argument("--profile", action="store_true", help="also what the device does")
    args = parser.parse_args()
    device = torch.device(args.device)
    config = SMALL if args.small else XLSTMConfig.xlstm_7b()
    if args.layers:
        config = XLSTMConfig.from_dict({**config.to_dict(), "num_layers": args.layers})
    dtype = torch.float32 if args.small and device.type == "cpu" else torch.bfloat16
    began = time.perf_counter()
    model = patch(made(config, dtype, device))
    measure.synchronize(device)
    print(
        f"commit {measure.commit()}; model made in {time.perf_counter() - began:.1f} s", flush=True
    )
    same = True
    for size in map(int, args.batches.split(",")):
        prompts = text(size, 128, config.vocab_size, device)
        same &= decode(model, prompts, args.tokens, "states in fp32", plain=True)
        if args.profile and device.type == "cuda":
            launches(model, prompts)
        if size > 1:
            patch(model, state_dtype=torch.bfloat16)
            same &= decode(model, prompts, args.tokens, "states in bf16", plain=False)
            patch(model, state_dtype=torch.float32)
        gc.collect()
    if args.prefill:
        times = prefill(model, text(1, args.prefill, config.vocab_size, device))
        ms = f"{statistics.median(times):.1f} ms ({', '.join(f'{t:.1f}' for t in sorted(times))})"
        print(f"prompt of {args.prefill:,}: {ms}", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
