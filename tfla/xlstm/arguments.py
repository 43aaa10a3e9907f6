"""Arguments that are whole numbers, of whatever make: Python's, NumPy's, tensors.

Every error names the argument, what came and what is expected. A bool, a float and a text are never
taken for an integer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def integer(name: str, x: Any, low: int, high: int) -> int:
    """x as an int from `low` to `high`."""
    value = _whole(x)
    if value is None:
        raise TypeError(f"{name} must be an integer; got {_what(x)}.")
    if not low <= value <= high:
        short = value < low and high >= 2**63 - 1
        wanted = f"at least {low}" if short else f"from {low} to {high}"
        raise ValueError(f"{name} must be {wanted}; got {value}.")
    return value


def integers(name: str, x: Any) -> list[int]:
    """The ints of x: of one, of an iterable of them, or of a tensor or array of one axis."""
    if (value := _whole(x)) is not None:
        return [value]
    wanted = f"{name} must hold integers"
    if isinstance(x, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"{wanted}, which a text is not; got {_what(x)}.")
    if isinstance(x, Mapping) or not isinstance(x, (Tensor, Iterable)):
        raise TypeError(f"{wanted}; got {_what(x)}.")
    if isinstance(x, Tensor) or hasattr(x, "__array__"):
        x = row_of(name, x).tolist()
    values = list(x)
    found = [_whole(value) for value in values]
    for value, number in zip(values, found, strict=True):
        if number is None:
            raise TypeError(f"{wanted}; got {_what(value)} among them.")
    return [number for number in found if number is not None]


def row_of(name: str, x: Any) -> Tensor:
    """x as an int64 tensor (n,), where it lies; x is a tensor, or a sequence of integers."""
    if isinstance(x, (bytes, bytearray)):
        return torch.tensor(list(x), dtype=torch.int64, device="cpu")
    if not isinstance(x, Tensor) and hasattr(x, "__array__"):
        x = tensor_of(name, x)
    if isinstance(x, Tensor):
        if not is_whole(x):
            raise TypeError(f"{name} must be integers; got {_what(x)}.")
        if x.dim() != 1:
            raise ValueError(f"{name} must be 1-d; got {tuple(x.shape)}.")
        return x.to(torch.int64)
    values = integers(name, x)
    if beyond := [value for value in values if not -(2**63) <= value < 2**63]:
        raise ValueError(f"{name} must hold integers of 64 bits; got {beyond[0]}.")
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def tensor_of(name: str, x: Any) -> Tensor:
    """An array as a tensor, any integer dtype as int64, so that none is beyond torch."""
    import numpy as np

    array = np.asarray(x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers; got an array of {array.dtype}.")
    return torch.from_numpy(array.astype(np.int64))


def is_whole(x: Tensor) -> bool:
    """Whether x is a tensor of integers."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or x.is_quantized)


def number(name: str, x: Any) -> float:
    """x as a float: of a Python number, a NumPy one or a tensor without axes, but of no bool."""
    if isinstance(x, Tensor) and x.dim() == 0 and x.dtype != torch.bool and not x.is_complex():
        return float(x)
    kind = type(x).__name__
    if isinstance(x, (bool, str, bytes, complex, Tensor)) or "bool" in kind or "complex" in kind:
        raise TypeError(f"{name} must be a number; got {_what(x)}.")
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {_what(x)}.") from None


def _whole(x: Any) -> int | None:
    """x as an int; None when it is not a single integer."""
    if isinstance(x, bool) or (isinstance(x, Tensor) and (x.dim() or x.dtype == torch.bool)):
        return None
    if getattr(x, "shape", ()) != ():  # an array of one element is an index too
        return None
    try:
        return operator.index(x)
    except TypeError:
        return None


def _what(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
