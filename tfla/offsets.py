"""The offsets of packed sequences, where the host may look at their values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

SHOWN = 8  # offsets in the message of an error


def check_offsets(cu_seqlens: Any, T: int, ranks: int = 1) -> list[int]:
    """The offsets of sequences packed along T, which lies on so many ``ranks`` in equal parts.
    cu_seqlens: (N + 1,) whole numbers on the host, an array of PyTorch, JAX or NumPy. ValueError
    unless they ascend from 0 to the T of all ranks."""
    offsets = cu_seqlens.tolist()
    T *= ranks
    falls = next((n for n, (a, b) in enumerate(pairwise(offsets)) if b < a), None)
    if falls is None and offsets[0] == 0 and offsets[-1] == T:
        return offsets
    # Of many offsets those that are wrong: the first two that fall, else the ends.
    first = 0 if falls is None else max(0, min(falls - 2, len(offsets) - SHOWN))
    shown = [str(n) for n in offsets[first : first + SHOWN]]
    before = ["..."] if first else []
    behind = ["..."] if first + SHOWN < len(offsets) else []
    if behind and falls is None:
        behind.append(str(offsets[-1]))
    whole = f", that of the {ranks} ranks of group together" if ranks > 1 else ""
    raise ValueError(
        f"cu_seqlens must ascend from 0 to T = {T}{whole}; got "
        f"[{', '.join(before + shown + behind)}]. "
        "Give the offsets at which the packed sequences start, followed by T."
    )
