"""Dtypes of torch that go with those of tokens, and how products of them are done."""

from __future__ import annotations

from typing import Any

import torch

from tfla._compat import constant_while_tracing
from tfla.spec import Precision


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states, gates and everything else that is no token's operand, beside tokens of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@constant_while_tracing  # graphs are made anew where torch's setting is another
def products_of(dtype: torch.dtype, allow_tf32: bool = False) -> Precision:
    """How products of a dtype are done: of fp32 as torch's own matrix products on NVIDIA GPUs are
    set to be, or with the bits of TF32 or more whatever torch is set to."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    if allow_tf32:
        return "tf32"
    matmul: Any = torch.backends.cuda.matmul  # allow_tf32 raises where the newer name was used
    return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
