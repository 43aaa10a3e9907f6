"""Functions of mlstm_kernels beside tfla under the same names: python benchmarks/registry.py

By turns in one process, the median; first h of both is compared. On a CPU their plain functions, on
a GPU (--device cuda) their Triton kernels too. Needs mlstm_kernels (pip install '.[peers]', in an
environment of its own), which is not open source: it is timed, nothing else.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from mlstm_kernels.torch.chunkwise import registry as chunkwise
from mlstm_kernels.torch.parallel import registry as parallel
from mlstm_kernels.torch.recurrent import registry_sequence, registry_step
from torch import Tensor

from tfla.bench import measure
from tfla.integrations.mlstm_kernels import KERNELS

# (B, H, T, K, V): windows of a forecaster, a longer sequence, wide heads.
SHAPES = [(32, 4, 64, 64, 64), (8, 4, 512, 64, 64), (1, 4, 2048, 128, 128)]
THEIRS = {
    "chunkwise": chunkwise,
    "parallel": parallel,
    "sequence": registry_sequence,
    "step": registry_step,
}
CPU = {
    "chunkwise": ["native_autograd", "native_custbw"],
    "parallel": ["native_autograd"],
    "sequence": ["native_sequence__native"],
    "step": ["native"],
}
GPU = {
    "chunkwise": ["triton_xl_chunk", "triton_limit_chunk", "triton_xl_chunk_siging"],
    "sequence": ["native_sequence__triton"],
    "step": ["triton"],
}


def inputs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, i, f, c, n, m."""
    B, H, T, K, V = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, K), (T, K), (T, V), (T,), (T,), (K, V), (K,), (1,)]
    x = [torch.randn(B, H, *s, generator=generator) for s in shapes]
    x[4] += 3
    return [y.to(device, dtype) for y in x[:5]] + [y.to(device) for y in x[5:]]


def calls(f: Callable[..., Any], kind: str, x: list[Tensor]) -> dict[str, Callable[[int], Any]]:
    """What is timed: without gradients, and with them."""
    if kind == "step":
        token = [y[:, :, 0] for y in x[:3]] + [y[:, :, :1] for y in x[3:5]] + x[5:]
        return {"step": lambda _: torch.no_grad()(f)(*token)}
    leaves = [y.detach().requires_grad_() for y in x[:5]]

    def both(_: int) -> object:
        return torch.autograd.grad(f(*leaves).sum(), leaves)

    return {"forward": lambda _: torch.no_grad()(f)(*x[:5]), "and backward": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair of functions")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    print(f"{'B, H, T, K, V':24}{'name':34}{'what':14}{'theirs ms':>10}{'tfla ms':>10}{'off':>10}")
    for shape in SHAPES:
        x = inputs(shape, device, dtype)
        for kind, names in (GPU if on_gpu else CPU).items():
            for name in names:
                pair = {"theirs": THEIRS[kind][name], "tfla": KERNELS[kind][name]}
                runs = {who: calls(f, kind, x) for who, f in pair.items()}
                for what in runs["tfla"]:
                    both = {who: run[what] for who, run in runs.items()}
                    a, b = (run(0)[0].float() for run in both.values())
                    off = ((a - b).abs().max() / a.abs().max()).item()
                    times = measure.in_turns(both, device, 50, options.seconds, 2)
                    row = [statistics.median(times[who]) for who in both]
                    label = f"{str(shape):24}{f'{kind} {name}':34}{what:14}"
                    print(f"{label}{row[0]:10.2f}{row[1]:10.2f}{off:10.1e}", flush=True)


if __name__ == "__main__":
    main()
