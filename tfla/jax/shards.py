"""What ``jax.shard_map`` wants to know of arrays: over which axes of the mesh they vary.

An array is the same on all devices of an axis, or it varies over it, and a loop must begin with
what it goes on with. Outside of shard_map nothing varies, and these functions change nothing.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import jax
from jax import lax


def axes_of(arrays: Any) -> frozenset[Any]:
    """The axes over which any of a tree of arrays varies."""
    return frozenset(axis for x in jax.tree.leaves(arrays) for axis in jax.typeof(x).mat.varying)


def varying(arrays: Any, axes: Set[Any]) -> Any:
    """The same arrays, varying over these axes too. What all devices share gets the sum of their
    gradients."""

    def vary(x: Any) -> Any:
        new = tuple(axes - axes_of(x))
        return lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(vary, arrays)
