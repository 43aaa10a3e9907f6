"""What comes in by the public functions: argument checks and dtypes.

Every error names the argument, what came and what is expected.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tfla import ops
from tfla.dtypes import state_dtype
from tfla.offsets import check_offsets
from tfla.spec import State

# Read by torch.load with weights_only=True, by the name in files of older versions, too.
torch.serialization.add_safe_globals([State, (State, "tfla.checks.State")])

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def what(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    return (
        f"{type(x).__name__} {x!r}"
        if isinstance(x, (int, float, str, bool, type(None)))
        else type(x).__name__
    )


def tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {what(x)}.")
    return x


HEADS_FIRST = (
    " Some of the tensors seem to have their heads first, (B, H, T, ...): x.transpose(1, 2) makes "
    "(B, T, H, ...) of them, without a copy."
)


def _transposed(q: Tensor, v: Tensor) -> bool:
    """Would q (B, ., ., K) and v (B, ., ., V) fit with the heads of both, or of one, first?"""
    (B, T, G), (N, *rest) = q.shape[:3], v.shape[:3]
    return B == N and (G == rest[1] or T == rest[1] or G == rest[0])


def operands(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        last = "V" if name == "v" else "K"
        if tensor(name, x).dim() != len(axes) + 1:
            raise ValueError(
                f"{name} must have {len(axes) + 1} axes ({', '.join(axes)}, {last}); got {what(x)}."
            )
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (
            x.to(low) if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x
            for x in (q, k, v)
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64; got {what(x)}.")
        if x.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must share one dtype; got {name} {what(x)} beside q {what(q)}."
            )
        if x.device != q.device:
            raise ValueError(
                f"q, k and v must be on one device; got {name} {what(x)} beside q {what(q)}."
            )
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}; got {what(k)}.")
    if q.shape[-1] == 0 or v.shape[-1] == 0 or q.shape[-2] == 0 or v.shape[-2] == 0:
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


def gate_tensor(name: str, x: Tensor | None, v: Tensor) -> Tensor:
    """A gate as (B, T, H) or (B, H) beside v (B, T, H, V) or (B, H, V)."""
    shape = v.shape[:-1]
    if x is None:
        return v.new_zeros((), dtype=state_dtype(v.dtype)).expand(shape)
    tensor(name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point; got {what(x)}.")
    if x.device != v.device:
        raise ValueError(f"{name} must be on the device of q, {v.device}; got {what(x)}.")
    if x.shape != shape:
        if name.startswith("log_") and x.shape == shape[-1:]:
            return x.expand(shape)
        per_head = " or (H,)" if name.startswith("log_") else ""
        axes = "(B, T, H)" if len(shape) == 3 else "(B, H)"
        hint = HEADS_FIRST if len(shape) == 3 and x.shape == (shape[0], shape[2], shape[1]) else ""
        raise ValueError(f"{name} must be {axes} = {tuple(shape)}{per_head}; got {what(x)}.{hint}")
    return x


def expanded(x: Tensor | None, v: Tensor) -> Tensor:
    """A gate that was checked before, as ``gate_tensor`` returns it."""
    if x is None:
        return v.new_zeros((), dtype=state_dtype(v.dtype)).expand(v.shape[:-1])
    return x if x.dim() > 1 else x.expand(v.shape[:-1])


def host_has_values(x: Tensor) -> bool:
    """May the host look at the values of x: without waiting for a device, and where there are any
    (not in a graph that is being traced, not under FakeTensorMode)?"""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or ops.by_operator(x))


def sequences(cu_seqlens: Tensor | None, q: Tensor, ranks: int = 1) -> int:
    """N. T is split over ``ranks``. Values are read where the host has them; on a GPU the kernels
    make any offsets ascend within [0, T], and tokens that are then in no sequence get zeros."""
    if cu_seqlens is None:
        return q.shape[0]
    tensor("cu_seqlens", cu_seqlens)
    if (
        cu_seqlens.dim() != 1
        or cu_seqlens.shape[0] < 2
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"cu_seqlens must be (N + 1,) int32 or int64 offsets; got {what(cu_seqlens)}."
        )
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be on the device of q, {q.device}; got {what(cu_seqlens)}."
        )
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences along T, so B must be 1; got q {what(q)}.")
    if host_has_values(cu_seqlens):
        check_offsets(cu_seqlens, q.shape[1], ranks)
    return cu_seqlens.shape[0] - 1


def check_state(
    state: Any,
    normalize: bool,
    q: Tensor,
    sizes: tuple[int | None, int, int, int],
    argument: str,
    low: bool = False,
) -> State:
    """The state, or an error that says what it should be. ``low``: C and n may be bf16."""
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        raise TypeError(f"{argument} must be a tfla.State (C, n, m); got {what(state)}.")
    state = State(*state)
    N, H, K, V = sizes
    N = state.C.shape[0] if N is None and isinstance(state.C, Tensor) and state.C.dim() else N
    if normalize != (state.n is not None) or normalize != (state.m is not None):
        kind = (
            "(C, n, m): this layer is normalised"
            if normalize
            else "(C, None, None): this layer is not normalised"
        )
        got = ", ".join("None" if t is None else "tensor" for t in state)
        raise ValueError(f"{argument} must be {kind}; got ({got}).")
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, t, shape in (
        ("C", state.C, (N, H, K, V)),
        ("n", state.n, (N, H, K)),
        ("m", state.m, (N, H)),
    ):
        if t is None and name != "C":
            continue
        if tensor(f"{argument}.{name}", t).shape != shape:
            raise ValueError(f"{argument}.{name} must be {shape}; got {what(t)}.")
        allowed = (full, torch.bfloat16) if low and name != "m" else (full,)
        if t.dtype not in allowed:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(
                f"{argument}.{name} must be {wanted} beside {q.dtype} q; got {what(t)}."
            )
        if t.device != q.device:
            raise ValueError(
                f"{argument}.{name} must be on the device of q, {q.device}; got {what(t)}."
            )
    return state


def check_slots(slots: Any, B: int, rows: int, q: Tensor, inplace: bool) -> None:
    """Rows of a state for a batch. Values are read where the host has them; elsewhere a row out of
    range is answered with NaN and touches no state."""
    kinds = (torch.int32, torch.int64)
    if not isinstance(slots, Tensor) or slots.shape != (B,) or slots.dtype not in kinds:
        raise TypeError(
            f"slots must be ({B},) int32 or int64, a row of the state for each of the {B}; "
            f"got {what(slots)}."
        )
    if slots.device != q.device:
        raise ValueError(f"slots must be on the device of q, {q.device}; got {what(slots)}.")
    if not inplace:
        raise ValueError(
            "slots says which rows of an in-place state the batch uses; pass inplace=True with it."
        )
    check_slot_values(slots, rows)


def check_slot_values(slots: Tensor, rows: int) -> None:
    """The values of slots, where the host has them."""
    if not host_has_values(slots):
        return
    values = slots.tolist()
    if any(not 0 <= value < rows for value in values) or len(set(values)) < len(values):
        raise ValueError(f"slots must be distinct and in the state's {rows} rows; got {values}.")


def group_of(group: Any) -> Any:
    """The process group over which T is split, or None."""
    if group is None:
        return None
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f'group must be a DeviceMesh of one dimension, as mesh["context"]; got {group}.'
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed process group that this rank is in, or None; got "
            f"{what(group)}."
        )
    return group


def check_writable(state: State) -> None:
    """Is there one place in memory for each number of an in-place state? Views of one row, or of
    rows that overlap, have none, and torch would say so when C is overwritten already, or a kernel
    not at all."""
    for name, t in state._asdict().items():
        if t is None:
            continue
        reach = 0  # of the axes with smaller strides, which the next one has to step beyond
        for step, size in sorted(zip(t.stride(), t.shape, strict=True)):
            if size < 2:
                continue
            if step > reach:
                reach += step * (size - 1)
                continue
            raise ValueError(
                f"state.{name} is overwritten with inplace=True, so it must not be an expanded "
                f"tensor, nor have rows that overlap; got strides {t.stride()} of {what(t)}. "
                "Call .clone() first."
            )


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


def requires_grad(*tensors: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    flat = [
        t
        for x in tensors
        if x is not None
        for t in (x if isinstance(x, tuple) else (x,))
        if t is not None
    ]
    return any(t.requires_grad for t in flat)


def interpreted() -> bool:
    """Does Triton's interpreter run the kernels? Not cached: torch.compile warns of a cache."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(q: Tensor) -> str | None:
    """Why the backend "triton" cannot serve q, or None if it can: of what q says, its device and
    its dtype."""
    if q.dtype == torch.float64:
        return 'it computes in fp16, bf16 and fp32; for fp64 use backend="reference".'
    if q.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the program "
                "starts, or move them to a GPU."
            )
    elif q.device.type != "cuda":
        return f"it needs an NVIDIA or AMD GPU; the tensors are on {q.device}."
    elif torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        name = torch.cuda.get_device_name(q.device)
        return f"it needs compute capability 8.0 or later; {name} has {major}.{minor}."
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f'Triton cannot be imported ({error}); install it with: pip install "triton>=3.6".'
    return None
