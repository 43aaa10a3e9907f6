"""Weights in int8 beside bf16 and fp32: python benchmarks/int8.py RUN TEXT [--device cuda]

RUN is a folder that `tfla train` wrote, of a model of bytes; TEXT a file that it has not seen. For
each kind of weights: the bytes of its parameters, the bits a byte of TEXT that it needs (windows of
--context bytes, each from an empty state), and the milliseconds of a token and of a prompt at batch
1. Needs torchao.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tfla.bench import measure
from tfla.integrations.torchao import quantize_int8
from tfla.xlstm import XLSTM, load


def size_of(model: nn.Module) -> int:
    """Bytes of the parameters, of quantized ones those of their parts."""
    tensors = []
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        names = [] if plain else parameter.__tensor_flatten__()[0]
        tensors += [parameter] if plain else [getattr(parameter, name) for name in names]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.inference_mode()
def bits_a_byte(model: XLSTM, windows: Tensor) -> float:
    total = 0.0
    for window in windows.split(8):
        logits = model(window[:, :-1])[0].flatten(0, 1)
        total += nn.functional.cross_entropy(
            logits, window[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / windows[:, 1:].numel() / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
    count = len(text) // options.context
    windows = text[: count * options.context].view(count, -1).to(options.device)
    models = {
        "fp32": load(options.run, options.device, torch.float32),
        "bf16": load(options.run, options.device, torch.bfloat16),
    }
    for name in ("fp32", "bf16"):
        models[f"int8 of {name}"] = quantize_int8(copy.deepcopy(models[name]))
    assert models["fp32"].config.vocab_size <= 257, "RUN must be a model of bytes"
    device = torch.device(options.device)
    token, prompt = windows[0, :1], windows[:1]
    times = [
        measure.in_turns({name: part(model) for name, model in models.items()}, device, 30, 60, 3)
        for part in (lambda model: step_of(model, token), lambda model: prompt_of(model, prompt))
    ]
    print(f"{options.text}, {count} windows of {options.context} bytes, on {options.device}")
    print(f"{'weights':14}{'MB':>8}{'bits a byte':>14}{'ms a token':>12}{'ms a prompt':>13}")
    for name, model in models.items():
        row = [name, size_of(model) / 1e6, bits_a_byte(model, windows)]
        row += [statistics.median(turns[name]) for turns in times]
        print("{:14}{:8.2f}{:14.4f}{:12.3f}{:13.2f}".format(*row))


def step_of(model: XLSTM, token: Tensor) -> Callable[[int], object]:
    state = model.init_state(1)

    @torch.inference_mode()
    def step(_: int) -> object:
        return model.step(token, state, inplace=True)

    return step


def prompt_of(model: XLSTM, prompt: Tensor) -> Callable[[int], object]:
    @torch.inference_mode()
    def read(_: int) -> object:
        return model(prompt)

    return read


if __name__ == "__main__":
    main()
