"""Good input to be spoilt one argument at a time, and what a refusal must say."""

import re
from collections.abc import Callable

import pytest
import torch
from problems import Case, make_inputs
from torch import Tensor

import tfla

B, T, H, K, V = 2, 5, 3, 8, 6


def good() -> dict[str, Tensor]:
    x = make_inputs(Case(T=T, B=B, H=H, K=K, V=V, dtype=torch.float32))
    return {"q": x.q, "k": x.k, "v": x.v, "i": x.i, "f": x.f}


def good_state() -> tfla.State:
    return tfla.State(torch.zeros(B, H, K, V), torch.zeros(B, H, K), torch.zeros(B, H))


def refuses(
    error: type[Exception], call: Callable[[], object], *, names: str, came: str, wanted: str
) -> None:
    """The message holds the argument's name as a word, and what came and what is wanted."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert re.search(rf"(?<![\w.]){re.escape(names)}(?!\w)", message), (
        f"{names!r} not in: {message}"
    )
    for part in (came, wanted):
        assert part in message, f"{part!r} not in: {message}"
    assert "\n" not in message and message.endswith("."), message
