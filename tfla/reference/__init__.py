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
from tfla.spec import CallSpec

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
    """``function(spec, *tensors)``: nothing is kept from call to call."""
    return function(spec, *tensors) if exchange is None else function(spec, *tensors, exchange)


def offsets(cu_seqlens: Tensor, T: int) -> Tensor:
    """Offsets as the functions above take them: any; ``ChunkLayout.make`` reads and checks them."""
    return cu_seqlens


def clear(offsets: Tensor, *outputs: Tensor) -> None:
    """Zeros at tokens that belong to no sequence: ``ChunkLayout.make`` allows none."""
