"""The CPU backend, "reference", in plain PyTorch: any device, time and memory linear in T.

    recurrence.py   the specification, a page: the mLSTM token by token
    layout.py       where the chunks lie, and which are worked on at once
    weights.py      the weights of tokens for each other, from the gates
    chunked.py      the scan, forward and backward
    decode.py       one token

This module is the backend: it has the functions of ``tfla.backend``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tfla.backend import Exchange, Results
from tfla.dtypes import state_dtype
from tfla.reference.chunked import (
    NormalizerGrad,
    Scan,
    gate_gradients,
    initial_gradients,
    initial_state_decay,
    normalizer_grad,
    scan,
    with_final_grad,
)
from tfla.reference.decode import update
from tfla.reference.recurrence import recurrence, step
from tfla.reference.weights import GateWeights, gate_weights, saved, saved_shape
from tfla.shapes import each_head
from tfla.spec import CallSpec, Inputs

__all__ = [
    "FOLDS_PACKING",
    "GateWeights",
    "NormalizerGrad",
    "Scan",
    "clear",
    "execute",
    "fold_packing",
    "gate_gradients",
    "gate_weights",
    "initial_gradients",
    "initial_state_decay",
    "normalizer_grad",
    "offsets",
    "recurrence",
    "saved",
    "saved_shape",
    "scan",
    "step",
    "update",
    "with_final_grad",
]

FOLDS_PACKING = False  # chunks never cross a sequence


def fold_packing(f: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("this backend takes packed sequences one by one")


def execute(
    function: Callable[..., Results],
    spec: CallSpec,
    tensors: tuple[Any, ...],
    exchange: Exchange | None = None,
) -> Results:
    """``function(spec, *tensors)``: nothing is kept from call to call. Of groups, q and k go in as
    all H heads of v have them, and dq and dk are summed over a group; with G = 1 those are views,
    else copies."""
    more = () if exchange is None else (exchange,)
    if spec.G == spec.H:
        return function(spec, *tensors, *more)
    q, k, *rest = tensors
    spread = (each_head(x, spec.H) for x in (q, k))
    results = function(spec.but(G=spec.H), *spread, *rest, *more)
    if len(tensors) == len(Inputs._fields):  # a forward pass
        return results
    return *(_sum_of_groups(x, spec) for x in results[:2]), *results[2:]


def _sum_of_groups(x: Tensor | None, spec: CallSpec) -> Tensor:
    """(B, T, G, K) of x (B, T, H, K), in its dtype."""
    assert x is not None
    return x.unflatten(2, (spec.G, spec.R)).sum(3, dtype=state_dtype(spec.dtype)).to(x.dtype)


def offsets(cu_seqlens: Tensor, T: int) -> Tensor:
    """Offsets as the functions above take them: any; ``ChunkLayout.make`` reads and checks them."""
    return cu_seqlens


def clear(offsets: Tensor, *outputs: Tensor) -> None:
    """Zeros at tokens that belong to no sequence: ``ChunkLayout.make`` allows none."""
