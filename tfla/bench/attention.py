"""Causal attention with rotary positions, the baseline of `tfla bench language`.

    q, k, v = W x                                        (B, T, H, D) each; no biases
    y = W_out softmax(D^(-1/2) rot(q) rot(k)^T, causal) v

As a mixer of `tfla.xlstm.XLSTM` it stands where the mLSTM layer does, and all else of the model is
the same. Its four matrices of width d x d are as large as those of the mLSTM layer with K = V / 2,
which has the gates' weights besides, and one weight a channel in its norm.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfla.xlstm.config import XLSTMConfig

BASE = 10_000.0  # of the rotary frequencies


class CausalAttention(nn.Module):
    """The mixer. It keeps no state: a sequence is read in whole.

    Raises:
        ValueError: naming what came and what is expected, when `hidden_size` is no even number for
            each of `num_heads`, or a state is given or asked for.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from tfla.bench.attention import CausalAttention
        >>> from tfla.xlstm import XLSTM, XLSTMConfig
        >>> config = XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2)
        >>> model = XLSTM(config, partial(CausalAttention, num_heads=2))
        >>> logits, _ = model(torch.randint(256, (3, 100)))                       # (3, 100, 256)
    """

    def __init__(self, config: XLSTMConfig, num_heads: int) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, num_heads
        if num_heads < 1 or width % (2 * num_heads):
            raise ValueError(
                f"hidden_size must be an even number for each of num_heads = {num_heads}; got "
                f"{width}."
            )
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        state: None = None,
        *,
        output_final_state: bool = False,
        cu_seqlens: None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """x (B, T, d) -> y (B, T, d), and None in place of a state."""
        if x.dim() != 3 or state is not None or output_final_state or cu_seqlens is not None:
            raise ValueError(
                f"attention reads whole sequences x (B, T, d), without states and not packed; got "
                f"x {tuple(x.shape)}."
            )
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in self.qkv(x).chunk(3, -1))
        q, k, v = (y.transpose(1, 2) for y in (rotated(q), rotated(k), v))  # (B, H, T, D)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h.transpose(1, 2).flatten(-2)), None


def rotated(x: Tensor, first: int = 0) -> Tensor:
    """x (B, T, H, D) with its positions, which begin at `first`, written into it.

    Channels j and j + D/2 are a plane, in which token t is turned by the angle t BASE^(-2j/D), so a
    product of two rotated vectors depends on their distance alone (Su et al., arXiv 2104.09864).
    Computed in fp32 (fp64 for fp64 x), returned in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = _rotation(first, x.shape[1], x.shape[-1], dtype, x.device)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


@functools.lru_cache(maxsize=4)
def _rotation(
    first: int, T: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, (T, 1, D / 2). Kept, as all layers and steps need the same."""
    t = torch.arange(first, first + T, dtype=torch.float64, device=device)
    planes = torch.arange(D // 2, dtype=torch.float64, device=device)
    angles = (t[:, None] * BASE ** (-2 * planes / D))[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
