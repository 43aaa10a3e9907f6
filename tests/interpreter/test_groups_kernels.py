"""dq and dk of groups of heads by their own kernels, in Triton's interpreter."""

import dataclasses

import checks
import pytest
import torch
from planned import planned
from problems import Case, packed, variants

from tfla.plan import GroupTile, Plan

SMALL = {"T": 53, "B": 1, "H": 3, "groups": 1, "K": 12, "V": 20, "backend": "triton"}
SMALL |= {"dtype": torch.float32}


@variants
def test_every_variant(input_gate: str, normalize: bool | None) -> None:
    """Three heads of a group; a span of two tiles, so that a state is made between them."""
    with planned(span=64):
        checks.check_against_recurrence(
            Case(**SMALL | {"T": 150}, input_gate=input_gate, normalize=normalize)
        )
