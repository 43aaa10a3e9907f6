"""Where tfla.nn.MLSTM is faster than nn.LSTM, and where not: a training step of each on a CPU.

First a batch as it comes from text or sensors: 32 sequences of 20 to 400 tokens, packed, read in
both directions. Then what nn.LSTM is the better choice for: few tokens, a small layer, one
direction. Times are those of the processor, on one thread.
"""

import time

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tfla.nn import MLSTM

FEATURES, HIDDEN, BATCH = 8, 64, 32


def milliseconds(layer: nn.LSTM | MLSTM, x: PackedSequence, steps: int) -> float:
    """A forward and a backward pass and a step of the optimizer: the fastest of some."""
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    taken = []
    for _ in range(steps):
        start = time.process_time()
        y, _ = layer(x)
        loss = y.data.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken.append(time.process_time() - start)
    return min(taken) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ragged = torch.linspace(20, 400, BATCH).int().tolist()
    for what, lengths, bidirectional in (
        ("packed, 20 to 400 tokens, both directions", ragged, True),
        ("20 tokens, one direction", [20] * BATCH, False),
    ):
        x = pack_sequence([torch.randn(n, FEATURES) for n in lengths], enforce_sorted=False)
        print(f"{what}, {BATCH} sequences")
        for name, make in {"nn.LSTM": nn.LSTM, "tfla MLSTM": MLSTM}.items():
            layer = make(FEATURES, HIDDEN, bidirectional=bidirectional)
            print(f"{name:12} {milliseconds(layer, x, 4):8.1f} ms", flush=True)


if __name__ == "__main__":
    main()
