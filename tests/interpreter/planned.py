"""Plans for problems that are small enough for Triton's interpreter."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import checks

from tfla.kernels import planning
from tfla.plan import Plan, Tile


@contextlib.contextmanager
def short_scans() -> Iterator[None]:
    """Plans as they are, but for the length of the scans of gates, over 4 chunks in place of 64 and
    64 tokens in place of 256: the interpreter runs them number by number, beyond the end too."""
    with planning.changed(_short):
        yield


def _short(p: Plan) -> Plan:
    return dataclasses.replace(p, block_c=4, checkpoint_every=min(p.checkpoint_every, 64))


@contextlib.contextmanager
def planned(tile: dict[str, object] | None = None, **fields: object) -> Iterator[None]:
    """Pin fields of the plan: short chunks and many checkpoints, for problems that are small."""

    def change(t: Tile) -> Tile:
        t = dataclasses.replace(t, **tile or {})  # type: ignore[arg-type]
        return dataclasses.replace(t, slices=-(-t.A // t.block_a))

    def pinned(p: Plan) -> Plan:
        changed = {"L": 16, "checkpoint_every": 32, "block_c": 4} | fields
        return dataclasses.replace(p, h=change(p.h), dq=change(p.dq), **changed)  # type: ignore[arg-type]

    # The rule is a mean over rows (a sequence of a head each), and what fits the interpreter has
    # three or four: the mean of so few ratios of rounding errors scatters by a factor of 2, hence 4
    # in place of 2. The rule itself is held to on a GPU, in test_gpu.py; mistakes are off by 10^3
    # and more.
    with (
        planning.changed(pinned),
        mock.patch.object(checks, "RATIO", 4.0),
    ):
        yield
