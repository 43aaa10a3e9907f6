"""What comes in by the public functions: the state, argument checks and dtypes.

Every error names the argument, what came and what is expected, as those of ``tfla.checks`` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tfla.jax.gates import INPUT_GATES
from tfla.offsets import check_offsets

DTYPES = tuple(map(jnp.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))
OFFSETS = tuple(map(jnp.dtype, (jnp.int32, jnp.int64)))


HEADS_FIRST = (
    " Some of the arrays seem to have their heads first, (B, H, T, ...): jnp.swapaxes(x, 1, 2) "
    "makes (B, T, H, ...) of them."
)


class State(NamedTuple):
    """The state of N sequences: all that a linear recurrent model remembers. A pytree.

    C: (N, H, K, V) memory. n: (N, H, K) normaliser and m: (N, H) gauge, or None when the layer is
    not normalised.
    fp32, or fp64 for fp64 inputs. m is a gauge: (C, n, m) and (e^-c C, e^-c n, m + c) are the same
    state, so compare C e^m and n e^m, never C and m by themselves; m carries no gradient.
    """

    C: Array
    n: Array | None
    m: Array | None

    def detach(self) -> State:
        """The same state, cut off from the derivative (truncated backpropagation through time)."""
        cut: State = jax.tree.map(lax.stop_gradient, self)
        return cut


State.__module__ = "tfla.jax"


def what(x: Any) -> str:
    if isinstance(x, (Array, np.ndarray)):
        return f"{tuple(x.shape)} {x.dtype}"
    is_plain = isinstance(x, (int, float, str, bool, type(None)))
    return f"{type(x).__name__} {x!r}" if is_plain else type(x).__name__


def array(name: str, x: Any) -> Array:
    if not isinstance(x, (Array, np.ndarray)):
        raise TypeError(f"{name} must be a jax.Array; got {what(x)}.")
    return jnp.asarray(x)


def _transposed(q: Array, v: Array) -> bool:
    """Would q (B, ., ., K) and v (B, ., ., V) fit with the heads of both, or of one, first?"""
    (B, T, G), (N, *rest) = q.shape[:3], v.shape[:3]
    return B == N and (G == rest[1] or T == rest[1] or G == rest[0])


def operands(q: Any, k: Any, v: Any, axes: Sequence[str]) -> tuple[Array, Array, Array]:
    """q, k and v. axes: their names but the last, as ("B", "T", "H")."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        last = "V" if name == "v" else "K"
        if array(name, x).ndim != len(axes) + 1:
            raise ValueError(
                f"{name} must have {len(axes) + 1} axes ({', '.join(axes)}, {last}); got {what(x)}."
            )
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64; got {what(x)}.")
        if x.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must share one dtype; got {name} {what(x)} beside q {what(q)}."
            )
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}; got {what(k)}.")
    if 0 in (*q.shape[-2:], *v.shape[-2:]):
        raise ValueError(f"H, K and V must be at least 1; got q {what(q)} and v {what(v)}.")
    if v.shape[:-2] != q.shape[:-2]:
        sizes = ", ".join([*(str(size) for size in q.shape[:-2]), "H", "V"])
        raise ValueError(
            f"v must be ({', '.join(axes)}, V) = ({sizes}) beside q {what(q)}; got {what(v)}."
            + (HEADS_FIRST if len(axes) == 3 and _transposed(q, v) else "")
        )
    G, H = q.shape[-2], v.shape[-2]
    if H % G:
        raise ValueError(
            f"the heads of v, H, must be a multiple of those of q and k, G; got H = {H} of v "
            f"{what(v)} and G = {G} of q {what(q)}."
        )
    return q, k, v


def gate(name: str, x: Any, v: Array) -> Array:
    """A gate as (B, T, H) or (B, H), the axes of v but its last."""
    shape = v.shape[:-1]
    if x is None:
        return jnp.zeros(shape, state_dtype(v))
    x = array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point; got {what(x)}.")
    if x.shape != shape:
        if name.startswith("log_") and x.shape == shape[-1:]:
            return jnp.broadcast_to(x, shape)
        per_head = " or (H,)" if name.startswith("log_") else ""
        axes = "(B, T, H)" if len(shape) == 3 else "(B, H)"
        hint = HEADS_FIRST if len(shape) == 3 and x.shape == (shape[0], shape[2], shape[1]) else ""
        raise ValueError(f"{name} must be {axes} = {tuple(shape)}{per_head}; got {what(x)}.{hint}")
    return x


def state_dtype(x: Array) -> Any:
    """Of states beside tokens x: fp32, or fp64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def sequences(cu_seqlens: Any, q: Array) -> tuple[Array | None, int]:
    """The offsets, and N. Values are read where the host has them; traced ones, and those on a
    device, are made to ascend within [0, T], and tokens that are then in no sequence get zeros."""
    if cu_seqlens is None:
        return None, q.shape[0]
    if not isinstance(cu_seqlens, (Array, np.ndarray)):
        array("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in OFFSETS:
        raise ValueError(
            f"cu_seqlens must be (N + 1,) int32 or int64 offsets; got {what(cu_seqlens)}."
        )
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences along T, so B must be 1; got q {what(q)}.")
    if _host_has(cu_seqlens):
        check_offsets(np.asarray(cu_seqlens), q.shape[1])
    return jnp.asarray(cu_seqlens), cu_seqlens.shape[0] - 1


def _host_has(x: Array | np.ndarray) -> bool:
    """May the host look at the values of x without waiting for a device?"""
    if isinstance(x, np.ndarray):
        return True
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in x.devices())


def state(
    given: Any,
    normalize: bool,
    v: Array,
    sizes: tuple[int | None, int, int, int],
    argument: str,
    low: bool = False,
) -> State:
    """The state, or an error that says what it should be. ``low``: C and n may be bf16."""
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise TypeError(f"{argument} must be a tfla.jax.State (C, n, m); got {what(given)}.")
    C, n, m = given
    N, H, K, V = sizes
    N = C.shape[0] if N is None and isinstance(C, (Array, np.ndarray)) and C.ndim else N
    if normalize != (n is not None) or normalize != (m is not None):
        kind = (
            "(C, n, m): this layer is normalised"
            if normalize
            else "(C, None, None): this layer is not normalised"
        )
        got = ", ".join("None" if x is None else "array" for x in given)
        raise ValueError(f"{argument} must be {kind}; got ({got}).")
    full = jnp.dtype(state_dtype(v))
    checked: list[Any] = []
    for name, x, shape in (("C", C, (N, H, K, V)), ("n", n, (N, H, K)), ("m", m, (N, H))):
        if x is None and name != "C":
            checked.append(None)
            continue
        x = array(f"{argument}.{name}", x)
        if x.shape != shape:
            raise ValueError(f"{argument}.{name} must be {shape}; got {what(x)}.")
        allowed = (full, jnp.dtype(jnp.bfloat16)) if low and name != "m" else (full,)
        if x.dtype not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise TypeError(
                f"{argument}.{name} must be {wanted} beside {v.dtype} q; got {what(x)}."
            )
        checked.append(x)
    return State(*checked)


def slots(given: Any, B: int, rows: int, inplace: bool) -> Array:
    """Rows of a state for a batch. Values are read where the host has them; elsewhere a row out of
    range is answered with NaN and touches no state."""
    is_array = isinstance(given, (Array, np.ndarray))
    if not is_array or given.shape != (B,) or given.dtype not in OFFSETS:
        raise TypeError(
            f"slots must be ({B},) int32 or int64, a row of the state for each of the {B}; "
            f"got {what(given)}."
        )
    if not inplace:
        raise ValueError(
            "slots says which rows of an in-place state the batch uses; pass inplace=True with it."
        )
    if _host_has(given):
        values = np.asarray(given).tolist()
        if any(not 0 <= value < rows for value in values) or len(set(values)) < len(values):
            raise ValueError(
                f"slots must be distinct and in the state's {rows} rows; got {values}."
            )
    return jnp.asarray(given)


def input_gate(name: Any) -> bool:
    """Is h divided by the normaliser with this input gate, where the caller does not say?"""
    if not isinstance(name, str) or name not in INPUT_GATES:
        known = " or ".join(map(repr, INPUT_GATES))
        raise ValueError(f"input_gate must be {known}; got {name!r}.")
    return INPUT_GATES[name][1]


def flags(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {what(value)}.")


def scale_of(scale: Any, K: int) -> float:
    if scale is None:
        return K**-0.5
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a Python number or None; got {what(scale)}.")
    if not abs(scale) < math.inf:
        raise ValueError(f"scale must be finite; got {scale}.")
    return float(scale)


def refuse_group(group: Any) -> None:
    if group is not None:
        raise NotImplementedError(
            "group splits T over the processes of torch.distributed, which tfla.jax does not; got "
            f"{what(group)}. B and H can be split, by jax.shard_map over the whole call."
        )
