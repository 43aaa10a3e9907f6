"""The CPU backend beside what one would take without it: python benchmarks/cpu_peers.py [STUDY ...]

Studies, each by turns in one process, fp32, on one thread; times are medians of the CPU time that
the process takes, which other processes disturb less than they do the clock:

    layers      nn.MLSTM beside nn.LSTM, 32 sequences of 8 features, forward and backward
    packed      the same on 32 packed sequences of 20 to 400 tokens, in both directions
    quadratic   tfla.mlstm beside twelve lines of the quadratic form under autograd, T = 100
    products    tfla.mlstm beside the products (torch.bmm) that the chunked form cannot do without
    decode      tfla.mlstm_step in place, in microseconds, beside a copy of the state
    compiled    a block of a language model, eager and under torch.compile
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import tfla
import tfla.nn
from tfla.xlstm import Block, XLSTMConfig

Runs = dict[str, Callable[[], object]]


def medians(runs: Runs, seconds: float = 4.0) -> dict[str, float]:
    """Milliseconds of each: the median over turns, so that a slow moment meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    end = time.process_time() + seconds
    while time.process_time() < end or len(next(iter(samples.values()))) < 5:
        for name, run in runs.items():
            start = time.process_time()
            run()
            samples[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def trained(module: Callable[..., Any], x: Tensor) -> Callable[[], object]:
    """A forward and a backward pass."""
    weights = list(module.parameters())  # type: ignore[attr-defined]

    def run() -> object:
        y = module(x)[0]
        y = y if isinstance(y, Tensor) else y.data
        return torch.autograd.grad(y.sum(), weights)

    return run


def layers(lengths: list[int]) -> None:
    print("\nlayers: B = 32, 8 features, forward and backward, ms\n")
    print(f"{'hidden':>7} {'T':>6} {'nn.LSTM':>9} {'MLSTM':>9} {'MLSTM / LSTM':>13}")
    for hidden in (64, 128, 256):
        for T in lengths:
            x = torch.randn(32, T, 8)
            lstm = nn.LSTM(8, hidden, batch_first=True)
            ours = tfla.nn.MLSTM(8, hidden, num_heads=4, batch_first=True)
            t = medians({"lstm": trained(lstm, x), "ours": trained(ours, x)})
            ratio = t["ours"] / t["lstm"]
            print(f"{hidden:7} {T:6} {t['lstm']:9.1f} {t['ours']:9.1f} {ratio:13.2f}", flush=True)


def packed() -> None:
    print("\npacked: 32 sequences of 20 to 400 tokens, both directions, forward and backward, ms\n")
    print(f"{'hidden':>7} {'nn.LSTM':>9} {'MLSTM':>9} {'MLSTM / LSTM':>13}")
    lengths = torch.linspace(20, 400, 32).int().tolist()
    x = pack_sequence([torch.randn(n, 8) for n in lengths], enforce_sorted=False)
    for hidden in (64, 128, 256):
        lstm = nn.LSTM(8, hidden, bidirectional=True)
        ours = tfla.nn.MLSTM(8, hidden, num_heads=4, bidirectional=True)
        t = medians({"lstm": trained(lstm, x), "ours": trained(ours, x)})  # type: ignore[arg-type]
        ratio = t["ours"] / t["lstm"]
        print(f"{hidden:7} {t['lstm']:9.1f} {t['ours']:9.1f} {ratio:13.2f}", flush=True)


def inputs(B: int, T: int, H: int, K: int, V: int) -> list[Tensor]:
    q, k, v = (torch.randn(B, T, H, D) for D in (K, K, V))
    i, f = torch.randn(B, T, H), torch.randn(B, T, H) + 3
    return [x.requires_grad_() for x in (q, k, v, i, f)]


def quadratic_form(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """mLSTMexp, all tokens at once: what one would write without this library."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    b = F.logsigmoid(f).transpose(1, 2).cumsum(-1)
    log_D = b[..., :, None] - b[..., None, :] + i.transpose(1, 2)[..., None, :]
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    log_D = log_D.masked_fill(future, -torch.inf)
    m = log_D.amax(-1, keepdim=True)
    scores = q @ k.mT * q.shape[-1] ** -0.5 * (log_D - m).exp()
    den = torch.maximum(scores.sum(-1, keepdim=True).abs(), (-m).exp())
    return (scores / den @ v).transpose(1, 2)


def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    dh = torch.randn_like(leaves[2])
    return lambda: torch.autograd.grad(function(*leaves), leaves, dh)


def mlstm(*leaves: Tensor) -> Tensor:
    return tfla.mlstm(*leaves)[0]


def quadratic() -> None:
    print("\nquadratic: B = 32, T = 100, 4 heads, forward and backward, ms\n")
    print(f"{'head':>7} {'12 lines':>9} {'mlstm':>9} {'mlstm / lines':>14}")
    for size in (16, 32, 64):
        leaves = inputs(32, 100, 4, size, size)
        torch.testing.assert_close(mlstm(*leaves), quadratic_form(*leaves), rtol=1e-3, atol=1e-4)
        t = medians({"lines": gradients(quadratic_form, leaves), "ours": gradients(mlstm, leaves)})
        ratio = t["ours"] / t["lines"]
        print(f"{size:7} {t['lines']:9.1f} {t['ours']:9.1f} {ratio:14.2f}", flush=True)


def bare_products(R: int, T: int, K: int, V: int, L: int, backward: bool) -> Callable[[], object]:
    """The products of the chunked form and nothing else, into memory that is there already.

    Of a chunk, forward: scores q k^T, their product with v, q C, and k^T v into C. Backward:
    scores q k^T and dh v^T, their products with q, k and dh; dh C^T, v dC^T, k dC; q^T dh into dC,
    and once more k^T v, for the C of every chunk.
    """
    q, k, v, y = (torch.randn(R, L, D) for D in (K, K, V, V))
    C, CT, S = torch.randn(R, K, V), torch.randn(R, V, K), torch.randn(R, L, L)
    chunks = T // L

    def forward() -> None:
        for _ in range(chunks):
            torch.bmm(q, k.mT, out=S)
            torch.bmm(S, v, out=y)
            torch.bmm(q, C, out=y)
            torch.bmm(k.mT, v, out=C)

    def both() -> None:
        forward()
        for _ in range(chunks):
            torch.bmm(k.mT, v, out=C)
            torch.bmm(q, k.mT, out=S)
            torch.bmm(y, v.mT, out=S)
            torch.bmm(S, k, out=q)
            torch.bmm(S.mT, q, out=k)
            torch.bmm(S.mT, v, out=y)
            torch.bmm(v, CT, out=q)
            torch.bmm(v, CT, out=q)
            torch.bmm(q, C, out=y)
            torch.bmm(q.mT, v, out=C)

    return both if backward else forward


def products() -> None:
    print("\nproducts: one sequence, 4 heads, ms; torch.bmm of the same shapes in chunks of L\n")
    print(f"{'K/V':>9} {'T':>6} {'L':>4} {'':>10} {'bmm':>8} {'mlstm':>8} {'mlstm / bmm':>12}")
    for K, V, T in ((64, 64, 2048), (128, 256, 2048), (128, 256, 16384)):
        leaves = inputs(1, T, 4, K, V)
        runs: Runs = {
            "forward": torch.no_grad()(lambda leaves=leaves: tfla.mlstm(*leaves)),
            "+ backward": gradients(mlstm, leaves),
        }
        for name, run in runs.items():
            for L in (64, 128):
                bare = bare_products(4, T, K, V, L, name != "forward")
                t = medians({"bmm": bare, "ours": run}, 3.0)
                print(
                    f"{K:5}/{V:<3} {T:6} {L:4} {name:>10} {t['bmm']:8.1f} {t['ours']:8.1f} "
                    f"{t['ours'] / t['bmm']:12.2f}",
                    flush=True,
                )


@torch.no_grad()
def decode() -> None:
    print("\ndecode: tfla.mlstm_step in place, one sequence, us\n")
    print(f"{'heads':>6} {'K/V':>9} {'copy of C':>10} {'step':>8} {'step / copy':>12}")
    for H, K, V in ((4, 16, 16), (4, 64, 64), (4, 128, 256), (8, 256, 512), (16, 256, 512)):
        q, k, v = torch.randn(1, H, K), torch.randn(1, H, K), torch.randn(1, H, V)
        i, f = torch.randn(1, H), torch.randn(1, H) + 3
        state = tfla.State(torch.zeros(1, H, K, V), torch.zeros(1, H, K), torch.zeros(1, H))
        other = torch.empty_like(state.C)
        runs: Runs = {
            "copy": lambda other=other, state=state: other.copy_(state.C),
            "step": lambda a=(q, k, v, i, f, state): tfla.mlstm_step(*a, inplace=True),
        }
        t = medians(runs, 2.0)
        print(
            f"{H:6} {K:5}/{V:<3} {t['copy'] * 1e3:10.1f} {t['step'] * 1e3:8.1f} "
            f"{t['step'] / t['copy']:12.2f}",
            flush=True,
        )


def compiled() -> None:
    print("\ncompiled: a block of a language model, forward and backward, ms\n")
    print(f"{'size':>6} {'heads':>6} {'B x T':>9} {'eager':>8} {'compiled':>9} {'ratio':>6}")
    for size, heads, B, T in ((128, 4, 4, 256), (256, 4, 4, 512), (512, 4, 1, 1024)):
        config = XLSTMConfig(vocab_size=16, hidden_size=size, num_layers=1, num_heads=heads)
        block, x = Block(config), torch.randn(B, T, size)
        made = torch.compile(block, fullgraph=True)
        t = medians({"eager": trained(block, x), "compiled": trained(made, x)})
        print(
            f"{size:6} {heads:6} {B:3} x {T:<4} {t['eager']:8.1f} {t['compiled']:9.1f} "
            f"{t['compiled'] / t['eager']:6.2f}",
            flush=True,
        )


STUDIES: dict[str, Callable[[], None]] = {
    "layers": lambda: layers([100, 300, 1000]),
    "packed": packed,
    "quadratic": quadratic,
    "products": products,
    "decode": decode,
    "compiled": compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    chosen = parser.parse_args().studies or list(STUDIES)
    if unknown := set(chosen) - set(STUDIES):
        parser.error(f"there is no study {', '.join(unknown)}; choose from {', '.join(STUDIES)}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, tfla {tfla.__version__}, one thread")
    for name in chosen:
        STUDIES[name]()


if __name__ == "__main__":
    main()
