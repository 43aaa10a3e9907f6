"""What one call has on the device: its plan, the tables of packed sequences, sizes, weights, kept
states, and the buffer that holds what the backward pass needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tfla.kernels import gates
from tfla.kernels.host import launch
from tfla.kernels.layout import _clear_kernel, _offsets_kernel, _tables_kernel
from tfla.plan import Device, Plan, Problem, plan
from tfla.spec import CallSpec

_devices: dict[torch.device, Device] = {}


def device_of(x: Tensor | CallSpec) -> Device:
    """The integers of x's device; a small part where there is none (the interpreter)."""
    if x.device not in _devices:
        if x.device.type == "cuda":
            p = torch.cuda.get_device_properties(x.device)
            capability = (0, 0) if torch.version.hip else (p.major, p.minor)
            shared = getattr(p, "shared_memory_per_block_optin", 65536)
            _devices[x.device] = Device(capability, p.multi_processor_count, shared)
        else:
            _devices[x.device] = Device((0, 0), 4, 65536)
    return _devices[x.device]


_plans: dict[tuple[Any, ...], Plan] = {}


def plan_of(spec: CallSpec) -> Plan:
    """The plan that serves a call."""
    # A compiled graph is made for its sizes: int() turns symbols into guards.
    B, T, H, K, V, N = map(int, (spec.B, spec.T, spec.H, spec.K, spec.V, spec.N))
    numbers = (B, T, H, K, V, N, spec.packed, spec.dtype.itemsize, spec.precision)
    found = _plans.get((spec.device, *numbers))
    if found is None:
        found = plan(Problem(*numbers), device_of(spec))
        if len(_plans) >= 10_000:
            _plans.clear()
        _plans[spec.device, *numbers] = found
    return found


def offsets(cu_seqlens: Tensor, T: int) -> Tensor:
    """The offsets that kernels read: dense, int64, ascending within [0, T], whatever was given."""
    N = cu_seqlens.shape[0] - 1
    out = torch.empty(N + 1, dtype=torch.int64, device=cu_seqlens.device)
    launch(_offsets_kernel, (1,), (8, 1), (cu_seqlens, out), T, N, cu_seqlens.stride(0), BLOCK=2048)
    return out


def clear(offsets: Tensor, *outputs: Tensor) -> None:
    """Zeros in up to five outputs (1, T, ...) at tokens that belong to no sequence, in one launch.
    ``offsets``: those of the function of this name."""
    T, N = outputs[0].shape[1], offsets.shape[0] - 1
    missing = 5 - len(outputs)
    widths = [x.numel() // max(T, 1) for x in outputs] + [0] * missing
    launch(
        _clear_kernel,
        (device_of(offsets).multiprocessors * 2 if T else 0,),
        (4, 1),
        (offsets, *outputs, *[None] * missing),
        T,
        N,
        *widths,
        BLOCK=2048,
    )


def tables(cu_seqlens: Tensor | None, T: int, p: Plan) -> tuple[Tensor | None, ...]:
    """Of packed sequences: which one each slot of chunks, spans and segments belongs to, in one
    launch."""
    if cu_seqlens is None:
        return None, None, None
    N = cu_seqlens.shape[0] - 1
    units = (p.L, p.span, p.segment or p.span)
    sizes = [padded(T // unit + N) for unit in units]
    table = torch.empty(sum(sizes), dtype=torch.int32, device=cu_seqlens.device)
    launch(
        _tables_kernel,
        (triton.cdiv(sum(sizes), 256),),
        (4, 1),
        (cu_seqlens, table),
        N,
        *units,
        *sizes,
        BLOCK=256,
    )
    return table.split(sizes)


def padded(size: int) -> int:
    """The least multiple of 32 that is at least ``size``: what follows in a buffer is then aligned
    for every length, and no kernel is compiled anew, or slower, for want of it."""
    return -(-size // 32) * 32


def rows_of(x: Tensor, descriptor: bool = False) -> Tensor:
    """x with a contiguous last axis; where a ``descriptor`` shall walk over it, with rows that
    start at multiples of 16 bytes. Copied if it must be."""
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    if dense and (not descriptor or _aligned(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _aligned(x: Tensor) -> bool:
    size = x.element_size()
    b, t, h = x.stride()[:3]
    # Within a chunk rows are counted in 32 bits: 64 of them, 2^25 numbers apart.
    return 0 < t < 1 << 25 and x.data_ptr() % 16 == 0 and (b | t | h) * size % 16 == 0


class GateWeights(NamedTuple):
    """The weights of a problem on the device, and where they lie."""

    spec: CallSpec
    plan: Plan
    cu_seqlens: Tensor | None
    tables: tuple[Tensor | None, ...]  # of chunks, spans and segments; None unless packed
    rows: int
    slots: int  # chunks a row
    spans: int  # kept states a row
    buffer: Tensor  # everything the backward pass needs, in one piece
    vectors: Tensor  # (rows, slots, VECTORS, L), see gates.py
    undivided: Tensor | None  # the same without the denominator, where the scan of h makes it
    decay: Tensor  # (rows, slots)
    # (rows, spans, *plan.kept) C at the ends of spans, where the backward pass starts from
    C_ends: Tensor | None
    dC_ends: Tensor | None  # the same of dC
    n_chunk: Tensor | None  # (rows, slots, K) n entering each chunk
    n_final: Tensor | None  # (N, H, K)
    m_final: Tensor | None  # (N, H)
    ends: bool  # are states kept at the ends of sequences too?

    @property
    def size(self) -> int:
        return self.rows * self.slots * self.plan.L

    def chunks(self) -> int:
        """Slots of chunks in all, over which small kernels run."""
        return self.rows * self.slots

    def common(self) -> tuple[int, int, int]:
        return self.spec.T, self.spec.H, self.slots


def _geometry(spec: CallSpec, plan: Plan, ends: bool) -> tuple[int, int, int, list[int]]:
    """(rows, slots, spans, sizes): sizes of the parts of the buffer that the forward pass hands to
    the backward pass."""
    B, T, H, K, N, packed = spec.B, spec.T, spec.H, spec.K, spec.N, spec.packed
    rows = H if packed else B * H
    slots, spans = (T // unit + N if packed else -(-T // unit) for unit in (plan.L, plan.span))
    if not ends:  # fewer than pieces: where they meet
        spans = T // plan.span if packed else max(spans - 1, 0)
    kept = rows * spans * plan.kept[0] * plan.kept[1]
    kept = kept if spec.needs_grad else 0
    sizes = [gates.VECTORS.value * rows * slots * plan.L, rows * slots, kept]
    if spec.normalize:
        sizes += [rows * slots * K, N * H * K, N * H]
    return rows, slots, spans, sizes


def _split(buffer: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts of a buffer, each of its size, at aligned places."""
    parts = buffer.split([padded(size) for size in sizes])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@contextlib.contextmanager
def planned_for(device: Device) -> Iterator[None]:
    """Calls on tensors without memory (device "meta") are planned as if they lay on ``device``, and
    allocate what they would there; nothing is launched."""
    meta = torch.device("meta")
    before = _devices.get(meta)

    def forget() -> None:
        for key in [key for key in _plans if key[0] == meta]:
            del _plans[key]

    forget()
    _devices[meta] = device
    try:
        yield
    finally:
        forget()
        del _devices[meta]
        if before is not None:
            _devices[meta] = before
