"""tfla.nn.MLSTM in place of torch.nn.LSTM: handwritten digits, read row by row.

The data are the 1,797 images of 8 x 8 pixels that scikit-learn brings (pip install scikit-learn).
Each is a sequence of 8 rows; what the layer says after the last one is to name the digit. Both
learn it; on sequences as short as these nn.LSTM takes less time. ragged.py shows where MLSTM does.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tfla.nn import MLSTM

HIDDEN, EPOCHS, BATCH = 64, 12, 64


class Reader(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        y, _ = self.layer(rows)  # (B, 8, HIDDEN), whichever layer it is
        return self.head(y[:, -1])


def study(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Train on images x (M, 8, 8) with digits y (M,); seconds that it took."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)  # tensors as small as these lose by more
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    x, y = (z[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))] for z in (x, y))
    train, test = slice(0, 1437), slice(1437, None)

    print(f"{'layer':10} {'parameters':>10} {'test accuracy':>13} {'seconds':>8}")
    for name, make in {
        "nn.LSTM": lambda: nn.LSTM(8, HIDDEN, batch_first=True),
        "tfla MLSTM": lambda: MLSTM(8, HIDDEN, 2, batch_first=True, num_heads=8),
    }.items():
        torch.manual_seed(0)
        model = Reader(make())
        seconds = study(model, x[train], y[train])
        with torch.no_grad():
            accuracy = (model(x[test]).argmax(-1) == y[test]).float().mean().item()
        size = sum(p.numel() for p in model.layer.parameters())
        print(f"{name:10} {size:10,} {accuracy:13.1%} {seconds:8.1f}")


if __name__ == "__main__":
    main()
