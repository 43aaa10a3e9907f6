"""From tensors to launches: the call of a kernel, and Programs that are played on tensors."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfla._compat import (
    PackedLaunch,
    current_stream,
    launch_by_triton,
    launches_are_watched,
    pack_launch,
)
from tfla.backend import Exchange, Results
from tfla.kernels.planning import device_of, mode, plan_of
from tfla.kernels.program import (
    DTYPES,
    NAMES,
    SAVED,
    ArrayLayout,
    Program,
    Symbol,
    build,
    dense,
    fit,
    name_of,
)
from tfla.plan import Plan
from tfla.spec import CallSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, once for a kernel
TYPES = {name: getattr(torch, long) for long, name in DTYPES.items()}

# Launches that were seen before, but for their addresses; and what Triton compiled, by all that it
# may have compiled it for, with the kernel, whose id is a part of the key.
_compiled: dict[tuple[Any, ...], PackedLaunch] = {}
_kernels: dict[tuple[Any, ...], tuple[Any, Any]] = {}
_stream = current_stream
_interpreter = threading.Lock()
_scratch_device = "cpu" if INTERPRETED else "cuda"


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory for descriptors. It must live until the launch; the caching allocator keeps
    it until the stream is done with it."""
    return torch.empty(size, dtype=torch.int8, device=_scratch_device)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    shape: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
    *numbers: float,
    **constants: Any,
) -> None:
    """Call ``kernel(*tensors, *numbers, **constants)`` over ``grid`` with ``shape`` = (warps,
    stages); an empty grid is no call. Tensors without memory (device "meta") have nothing to
    launch.

    A call that was seen before, or one like it with other numbers, goes straight to the compiled
    kernel: looking up what it was compiled for takes the compiler's own launcher 100 to 200 us.
    Where launches are watched (a profiler), and where ``_compat.pack_launch`` says so, Triton
    launches.
    """
    if 0 in grid:
        return
    device = next(x.device for x in tensors if x is not None)
    if device.type != "meta":
        with _on(device):
            _launch(kernel, grid, shape, device, tensors, numbers, constants)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    shape: tuple[int, int],
    device: torch.device,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[Any],
    constants: dict[str, Any],
) -> PackedLaunch | None:
    """The launch, and how it is made without Triton's launcher from now on, if it can be."""
    pointers = [0 if x is None else x.data_ptr() for x in tensors]
    kind = (
        id(kernel),
        shape,
        device,
        tuple(constants.values()),
        tuple([None if x is None else x.dtype for x in tensors]),
        *[p & 15 for p in pointers],
    )
    key = grid, tuple(numbers), kind
    watched = launches_are_watched()
    packed = None if watched else _compiled.get(key)
    if packed is None:
        whole: Any = (*grid, 1, 1)[:3]
        values = *pointers, *numbers, *constants.values()
        like = *[_specialized(x) for x in numbers], kind
        known = None if watched else _kernels.get(like)
        if known is not None:
            packed = pack_launch(known[1], whole, device.index, values)
        if known is None or packed is None:
            options = {**constants, "num_warps": shape[0], "num_stages": shape[1]}
            # The interpreter keeps the number of its program in one place for all threads.
            with _interpreter if INTERPRETED else contextlib.nullcontext():
                found = launch_by_triton(kernel, grid, options, _allocate, *tensors, *numbers)
            packed = found and pack_launch(found, whole, device.index, values)
            if packed is not None:
                _remember(_kernels, like, (kernel, found))
                _remember(_compiled, key, packed)
            return packed
        _remember(_compiled, key, packed)
    scratch = _allocate(packed.scratch, 0, None) if packed.scratch else None
    at = 0 if scratch is None else scratch.data_ptr()
    given = [p for p, x in zip(pointers, tensors, strict=True) if x is not None]
    packed(_stream(device.index), at, given)
    return packed


def _specialized(x: Any) -> Any:
    """Of a number that goes to a kernel, what Triton may compile anew for."""
    if type(x) is not int:
        return type(x)
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


def _remember(seen: dict[Any, Any], key: Any, value: Any) -> None:
    if len(seen) >= 10_000:  # lengths without end
        seen.clear()
    seen[key] = value


# ---------------------------------------------------------------- a Program on a device


class _Made(NamedTuple):
    """A tensor that a Program allocates for those outside."""

    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Part(NamedTuple):
    """Where a buffer lies: in which tensor, the bytes before it, and what it is."""

    place: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, tensors: Sequence[Any]) -> Tensor:
        flat: Tensor = tensors[self.place].view(-1).view(torch.uint8)
        size = math.prod(self.shape) * self.dtype.itemsize
        return flat[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class _PackedLaunches(NamedTuple):
    """The launches of a Program that lack addresses alone."""

    scratch: int  # bytes that the neediest of them takes
    steps: list[tuple[PackedLaunch, list[tuple[int, int]]]]  # each, and where its tensors lie


class _Player:
    """A Program on a device: allocates, fills addresses in, launches.

    It works on a list of tensors and one of their addresses, whose last place is the workspace: one
    allocation, in which buffers that are never used at the same time share memory.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        parts: dict[int, _Part],
        made: list[_Made],
        last: int,
    ) -> None:
        offsets, self.size = fit(program.workspace)
        self.program, self.device, self.made, self.last = program, device, made, last
        self.parts = dict(parts)
        for n, offset in offsets.items():
            buffer = program.buffers[n]
            self.parts[n] = _Part(last, offset, TYPES[buffer.dtype], buffer.shape)
        # Once no launch needs Triton's launcher. Set at once: other threads may be playing.
        self.ready: _PackedLaunches | None = None

    def play(self, tensors: list[Any], addresses: list[int]) -> None:
        device = self.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.play(tensors, addresses)
        for place, shape, dtype in self.made:
            x = tensors[place] = torch.empty(shape, dtype=dtype, device=device)
            addresses[place] = x.data_ptr()
        ready = None if launches_are_watched() else self.ready
        size = self.size if ready is None else self.size + ready.scratch
        shared = tensors[self.last] = torch.empty(size, dtype=torch.uint8, device=device)
        start = addresses[self.last] = shared.data_ptr()
        if ready is None:
            self._launch(tensors)
        else:
            stream = _stream(device.index)
            scratch = start + self.size
            for run, places in ready.steps:
                run(stream, scratch, [addresses[place] + offset for place, offset in places])
        tensors[self.last] = None

    def _launch(self, tensors: list[Any]) -> None:
        """One by one, by Triton's launcher where it was not seen before."""
        if self.device.type == "meta":
            return
        pointers: dict[int, Tensor] = {}
        shared = tensors[self.last]

        def pointer(n: int) -> Tensor:
            """As a kernel takes it: where it begins, and a dtype."""
            found = pointers.get(n)
            if found is None:
                part = self.parts[n]
                found = tensors[part.place]
                if part.place == self.last:
                    found = shared[part.offset : self.size].view(part.dtype)
                elif part.offset or found.dtype != part.dtype:  # a part of what is saved
                    found = found.view(part.dtype)[part.offset // part.dtype.itemsize :]
                pointers[n] = found
            return found

        steps = []
        for x in self.program.launches:
            given = [None if n is None else pointer(n) for n in x.buffers]
            packed = _launch(
                x.kernel,
                x.grid,
                (x.warps, x.stages),
                self.device,
                given,
                x.numbers,
                x.parameters.constants,
            )
            parts = [self.parts[n] for n in x.buffers if n is not None]
            steps.append((packed, [(part.place, part.offset) for part in parts]))
        ready = [(packed, places) for packed, places in steps if packed is not None]
        if len(ready) == len(steps):
            self.ready = _PackedLaunches(
                max((packed.scratch for packed, _ in ready), default=0), ready
            )


# ---------------------------------------------------------------- calls


DENSE = ("n", "m", "dn")  # kernels know no strides of these
ROWS = ("q", "k", "v", "h", "dh")  # nor of the last axis of these

_passes: dict[tuple[Any, ...], _Pass] = {}


def execute(
    function: Callable[..., Results],
    spec: CallSpec,
    tensors: tuple[Any, ...],
    exchange: Exchange | None = None,
) -> Results:
    """``function(spec, *tensors)``, or with ``exchange`` behind them, by the Programs that it is
    for arrays of these layouts. They are made once; see ``tfla.backend``."""
    addresses = []
    layouts: list[Any] = [function, spec, mode(), exchange is None]
    for x in tensors:
        if x is None:
            addresses.append(0)
            layouts.append(None)
        else:
            addresses.append(address := x.data_ptr())
            layouts += (x.stride(), x.dtype, address & 15)
    key = tuple(layouts)
    found = _passes.get(key)
    if found is None:
        if len(_passes) >= 2_000:  # lengths without end
            _passes.clear()
        found = _passes[key] = _Pass(function, spec, tensors, exchange is not None)
    return found.run(list(tensors), addresses, exchange)


class _Pass:
    """A forward or a backward pass for arrays of certain layouts: its Programs on a device."""

    def __init__(
        self, function: Callable[..., Results], spec: CallSpec, tensors: tuple[Any, ...], cut: bool
    ) -> None:
        plan, device = plan_of(spec), tensors[0].device
        names = NAMES[: len(tensors)]
        # Of the tensors, those that kernels cannot take as they are.
        self.copies = [
            place
            for place, (name, x) in enumerate(zip(names, tensors, strict=True))
            if x is not None and is_copied(name, x, plan)
        ]
        layouts = [
            None if x is None else _layout(x, place in self.copies)
            for place, x in enumerate(tensors)
        ]
        built = build(function, spec, dict(zip(names, layouts, strict=True)), device_of(spec), cut)
        self.programs, self.given = built.programs, built.given
        parts: dict[int, _Part] = {}
        for place, symbol in enumerate(built.symbols):
            if symbol is not None and symbol.buffer != SAVED:
                parts[symbol.buffer] = _Part(place, 0, tensors[place].dtype, symbol.shape)
        # Behind the tensors that are given lie those that arrive, those that are made, and the
        # workspace.
        places = len(tensors)
        self.arrives = places
        for symbol in built.arrived:
            parts[symbol.buffer] = _Part(places, 0, torch.float32, symbol.shape)
            places += 1
        saved = names.index("saved") if "saved" in names else None
        made: list[list[_Made]] = []
        for program in self.programs:
            made.append([])
            for n in program.outputs:
                if n not in built.saved:
                    buffer = program.buffers[n]
                    dtype = TYPES[buffer.dtype]
                    parts[n] = _Part(places, 0, dtype, buffer.shape)
                    made[-1].append(_Made(places, buffer.shape, dtype))
                    places += 1
                elif saved is None:
                    saved = places
                    made[-1].append(_Made(places, (built.saved_elements,), torch.float32))
                    places += 1
        buffers = built.programs[0].buffers
        for n, first in built.saved.items():
            assert saved is not None
            dtype = TYPES[buffers[n].dtype]
            parts[n] = _Part(saved, 4 * first, dtype, buffers[n].shape)
        self.parts = parts
        self.blank = places + 1 - len(tensors)
        self.players = [
            _Player(program, device, parts, own, places)
            for program, own in zip(self.programs, made, strict=True)
        ]
        # Of each result its tensor, or the part of what is saved that is copied for it.
        self.results: list[int | _Part | None] = []
        for x in built.results:
            if x is None or x.buffer == SAVED:
                self.results.append(None if x is None else saved)
            else:
                part = parts[x.buffer]
                self.results.append(part if x.buffer in built.saved else part.place)

    def run(self, tensors: list[Any], addresses: list[int], exchange: Exchange | None) -> Results:
        for n in self.copies:
            x = tensors[n] = tensors[n].clone(memory_format=torch.contiguous_format)
            addresses[n] = x.data_ptr()
        tensors += [None] * self.blank
        addresses += [0] * self.blank
        if exchange is None:
            self.players[0].play(tensors, addresses)
        else:
            self._run_split(tensors, addresses, exchange)
        return tuple(
            [
                x if x is None else tensors[x] if type(x) is int else x.view(tensors).clone()  # type: ignore[union-attr]
                for x in self.results
            ]
        )

    def _run_split(self, tensors: list[Any], addresses: list[int], exchange: Exchange) -> None:
        begin, middle, end = self.players
        begin.play(tensors, addresses)
        weights, column = self.given
        wait = exchange(self._bound(weights, tensors), self._bound(column, tensors))
        middle.play(tensors, addresses)
        for n, x in enumerate([y for y in wait() if y is not None]):
            x = tensors[self.arrives + n] = x.contiguous()
            addresses[self.arrives + n] = x.data_ptr()
        end.play(tensors, addresses)

    def _bound(self, value: Any, tensors: list[Any]) -> Any:
        """A value with tensors in place of its symbols; None where there is none outside of a
        Program."""
        if isinstance(value, Symbol):
            part = self.parts.get(value.buffer)
            there = part is not None and tensors[part.place] is not None
            return part.view(tensors) if part is not None and there else None
        if isinstance(value, tuple):
            items = [self._bound(item, tensors) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value


def _layout(x: Tensor, copied: bool) -> ArrayLayout:
    shape = tuple(x.shape)
    strides = dense(shape) if copied else x.stride()
    return ArrayLayout(name_of(x.dtype), shape, strides, copied or x.data_ptr() % 16 == 0)


def is_copied(name: str, x: Tensor, plan: Plan) -> bool:
    """Does a pass of this plan take a copy of x, with other strides? A kernel takes rows of q, k, v
    and h that are dense, and where a descriptor or a thread reads 16 bytes at once, such as begin
    at multiples of them."""
    if name in DENSE:
        return not x.is_contiguous()
    if name not in ROWS:
        return False
    if not (x.stride(-1) == 1 or x.shape[-1] == 1):
        return True
    whole = plan.h.descriptor or plan.h.mma
    return whole and not _are_whole_rows(x)


def _are_whole_rows(x: Tensor) -> bool:
    size = x.element_size()
    b, t, h = x.stride()[:3]
    # Within a chunk rows are counted in 32 bits: 64 of them, 2^25 numbers apart.
    return 0 < t < 1 << 25 and x.data_ptr() % 16 == 0 and (b | t | h) * size % 16 == 0
