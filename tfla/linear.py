"""Linear layers whose sums are exact enough for gates, and when a kernel may read what a module
holds in place of calling it.

Adapters, hooks, pruning, parametrizations and quantisation all act when a module is *called*. So
models call their modules; only where nothing of that kind is there may a fused kernel take the
weights and leave the module out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfla._compat import is_hooked
from tfla.ops import no_autocast


class PreciseLinear(nn.Linear):
    """An nn.Linear that computes and answers in fp32 (fp64 for fp64 x), whatever the dtype of its
    weights, also under autocast: for gates, where an error acts on all later tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return precise(x, self.weight, self.bias)


def precise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias as a ``PreciseLinear`` has it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device.type):
        if _sums_in_fp32(x, weight):  # products of 16 bits are exact in fp32: no copies in fp32
            y = torch.mm(x.flatten(0, -2), weight.T, out_dtype=dtype).unflatten(0, x.shape[:-1])
            return y if bias is None else y + bias
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _sums_in_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of x with weight can be had in fp32, which torch has without gradients."""
    low = x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    compiling = torch.compiler.is_compiling()
    usable = low and x.is_cuda and x.numel() > 0 and _is_plain_tensor(weight)
    return usable and not (torch.is_grad_enabled() or compiling)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """May a kernel read the weight of this module in place of calling it? Only if it is exactly of
    this class (adapters and parametrizations are others), computes by the forward of its class,
    its weight is a tensor of torch's own, and no hook hangs on it."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not is_hooked(module)
        and _is_plain_tensor(getattr(module, "weight", None))
    )


def _is_plain_tensor(weight: object) -> bool:
    return weight is None or type(weight) in (nn.Parameter, Tensor)
