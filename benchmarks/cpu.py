"""Speed and memory of tfla.mlstm on this machine's CPU: python benchmarks/cpu.py [--quick]

Three tables: time a token over the length at a constant number of tokens (it should not depend on
the length), forward plus backward beside causal attention of the same width, and peak memory over
the length. fp32, 4 heads of 64. Each time is the median of interleaved runs. The exit status is 1
if a bound is missed.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import tfla
from tfla.bench import measure, roofline

CPU = torch.device("cpu")
H, K, V = 4, 64, 64
SAME_TIME_A_TOKEN, FASTER_THAN_ATTENTION, SAME_BYTES_A_TOKEN = 1.5, 8.0, 1.25


def inputs(B: int, T: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=g) for D in (K, K, V))
    i, f = torch.randn(2, B, T, H, generator=g)
    return [t.requires_grad_() for t in (q, k, v, i, f + 3)]


def mlstm(input_gate: str, leaves: list[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: tfla.mlstm(*leaves, input_gate=input_gate))
    dh = torch.randn_like(leaves[2])
    return lambda: torch.autograd.grad(tfla.mlstm(*leaves, input_gate=input_gate)[0], leaves, dh)


def attention(leaves: list[Tensor]) -> Callable[[], object]:
    heads_first = (t.detach().transpose(1, 2).contiguous().requires_grad_() for t in leaves[:3])
    q, k, v = heads_first
    dh = torch.randn_like(v)
    return lambda: torch.autograd.grad(
        F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), dh
    )


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median of each, measured in turns."""
    turns = {name: (lambda _, run=run: run()) for name, run in runs.items()}
    found = measure.in_turns(turns, CPU, repeats, math.inf, 1)
    for times in found.values():
        if isinstance(times, Exception):
            raise times
    return {name: statistics.median(times) / 1e3 for name, times in found.items()}


def peak_bytes(input_gate: str, T: int) -> int:
    """The most bytes of tensors that forward plus backward hold at once, inputs left out."""
    run = mlstm(input_gate, inputs(1, T), True)
    return measure.peak_bytes(lambda _: run(), CPU)


def time_table(tokens: int, lengths: list[int], repeats: int, limit: float) -> bool:
    print(f"\nTime a token at {tokens:,} tokens, ns (share of the matmul rate)\n")
    heads = ("exp fwd", "exp fwd+bwd", "sig fwd", "sig fwd+bwd")
    print(f"{'T':>8} {'B':>5}  " + " ".join(f"{head:>16}" for head in heads))
    kinds = [(gate, backward) for gate in ("exp", "sigmoid") for backward in (False, True)]
    times: dict[tuple[str, bool], list[float]] = {kind: [] for kind in kinds}
    for T in lengths:
        leaves = inputs(tokens // T, T)
        found = seconds({str(kind): mlstm(kind[0], leaves, kind[1]) for kind in kinds}, repeats)
        cells = []
        for kind in kinds:
            times[kind].append(found[str(kind)] / tokens)
            flops = roofline.function_flops(1, H, K, V, kind[1])
            share = flops / times[kind][-1] / limit
            cells.append(f"{times[kind][-1] * 1e9:9.0f} ({share:4.0%})")
        print(f"{T:8,} {tokens // T:5}  " + " ".join(f"{cell:>16}" for cell in cells), flush=True)
    spread = max(max(t) / min(t) for t in times.values())
    return verdict(
        f"slowest over fastest length: {spread:.2f}x",
        spread <= SAME_TIME_A_TOKEN,
        f"at most {SAME_TIME_A_TOKEN}x",
    )


def attention_table(T: int, repeats: int) -> bool:
    leaves = inputs(1, T)
    found = seconds(
        {
            "attention": attention(leaves),
            "mlstm exp": mlstm("exp", leaves, True),
            "mlstm sigmoid": mlstm("sigmoid", leaves, True),
        },
        repeats,
    )
    print(f"\nForward plus backward, one sequence of {T:,} tokens, beside causal attention\n")
    for name, value in found.items():
        print(f"{name:>14} {value * 1e3:10.0f} ms {found['attention'] / value:8.1f}x")
    factor = found["attention"] / max(found["mlstm exp"], found["mlstm sigmoid"])
    return verdict(
        f"faster than attention: {factor:.1f}x",
        factor >= FASTER_THAN_ATTENTION,
        f"at least {FASTER_THAN_ATTENTION:g}x",
    )


def memory_table(lengths: list[int]) -> bool:
    print("\nPeak memory over the inputs, forward plus backward, one sequence, bytes a token\n")
    print(f"{'T':>8} {'exp':>10} {'sigmoid':>10}   (inputs: {4 * H * (2 * K + V + 2):,})")
    rows = []
    for T in lengths:
        rows.append([peak_bytes(gate, T) / T for gate in ("exp", "sigmoid")])
        print(f"{T:8,} {rows[-1][0]:10,.0f} {rows[-1][1]:10,.0f}", flush=True)
    growth = max(last / first for first, last in zip(rows[0], rows[-1], strict=True))
    return verdict(
        f"a token of the longest over one of the shortest: {growth:.2f}x",
        growth <= SAME_BYTES_A_TOKEN,
        f"at most {SAME_BYTES_A_TOKEN}x",
    )


def verdict(what: str, holds: bool, bound: str) -> bool:
    print(f"\n{'ok    ' if holds else 'MISSED'} {what} (bound: {bound})", flush=True)
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the tokens, fewer lengths"
    )
    quick = parser.parse_args().quick
    limit = measure.ceiling(CPU, torch.float32)["flops_per_s"]
    print(
        f"torch {torch.__version__}, tfla {tfla.__version__}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores, matmul fp32 {limit / 1e9:.0f} GFLOP/s"
    )
    lengths = [1024, 4096, 16384] if quick else [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    holds = [
        time_table(lengths[-1], lengths, 3 if quick else 5, limit),
        attention_table(4096 if quick else 16384, 2 if quick else 3),
        memory_table(lengths if quick else [4096, 16384, 65536]),
    ]
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
