"""From tensors to launches: the call of a kernel, and calls that are played from a tape."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from tfla._compat import (
    PackedLaunch,
    TorchDispatchMode,
    can_record,
    current_stream,
    launch_by_triton,
    launches_are_watched,
    operator,
    pack_launch,
    storage_key,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, once for a kernel

_compiled: dict[tuple[Any, ...], PackedLaunch] = {}


class _Now(threading.local):
    tape: _Tape | None = None  # that is being recorded


_now = _Now()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    shape: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
    *numbers: float,
    **constants: Any,
) -> None:
    """Call ``kernel(*tensors, *numbers, **constants)`` over ``grid`` with ``shape`` = (warps,
    stages); an empty grid is no call.

    A call that was seen before goes straight to the compiled kernel: looking up what it was
    compiled for takes the compiler's own launcher 100 to 200 us. Where launches are watched (a
    profiler), and where ``_compat.pack_launch`` says so, Triton launches. Tensors without memory
    (device "meta") have nothing to launch: a call of them allocates what it would.
    """
    if 0 in grid:
        return
    pointers = [0 if x is None else x.data_ptr() for x in tensors]
    device = next(x.device for x in tensors if x is not None)
    key = (
        id(kernel),
        grid,
        shape,
        device,
        numbers,
        tuple(constants.values()),
        tuple([None if x is None else x.dtype for x in tensors]),
        *[p & 15 for p in pointers],
    )
    known = None if launches_are_watched() else _compiled.get(key)
    if known is None and device.type == "meta":
        return
    tape, _now.tape = _now.tape, None  # what goes on in the launcher is no part of the call
    # Triton launches on the current device, which need not be that of the tensors.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        if known is None:
            options = {**constants, "num_warps": shape[0], "num_stages": shape[1]}
            run: Any = functools.partial(launch_by_triton, kernel, grid, options, _allocate)
            run = functools.partial(_alone, run) if INTERPRETED else run
            compiled = run(*tensors, *numbers)
            if compiled is not None:
                values = *pointers, *numbers, *constants.values()
                whole: Any = (*grid, 1, 1)[:3]
                if packed := pack_launch(compiled, whole, device.index, values):
                    if len(_compiled) >= 10_000:  # lengths without end
                        _compiled.clear()
                    _compiled[key] = packed
            if tape is not None:
                tape.complete &= compiled is None
                tape.note(run, (*tensors, *numbers))
        else:
            there = [(p, x) for p, x in zip(pointers, tensors, strict=True) if x is not None]
            scratch = _allocate(known.scratch, 0, None) if known.scratch else None
            at = 0 if scratch is None else scratch.data_ptr()
            known(_stream(device.index), at, [p for p, _ in there])
            if tape is not None:
                tape.note(known, [x for _, x in there], launch=True)
    _now.tape = tape


_stream = current_stream
_interpreter = threading.Lock()


def _alone(run: Any, *arguments: Any) -> Any:
    """A kernel in Triton's interpreter, which keeps the number of its program in one place for all
    threads."""
    with _interpreter:
        return run(*arguments)


_scratch_device = "cpu" if INTERPRETED else "cuda"


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory for descriptors. It must live until the launch; the caching allocator keeps
    it until the stream is done with it."""
    return torch.empty(size, dtype=torch.int8, device=_scratch_device)


# ---------------------------------------------------------------- calls from a tape
#
# Small problems wait for the Python between the launches. A call that comes again with nothing but
# other addresses is recorded (the second time: lengths that never come again are not worth it) and
# played from then on: allocate, put the addresses in, launch.

Tensors = Sequence[Tensor | None]
Results = tuple[Tensor | None, ...]

_tapes: dict[tuple[Any, ...], _Tape | bool] = {}  # or: is the next call worth recording?


def recorded(
    function: Callable[..., Results],
    spec: Any,
    inputs: Tensors,
    *key: Any,
) -> Results:
    """``function(spec, *inputs)``, from a tape where there is one. What the function does may
    depend on its spec, on ``key`` and on shapes, strides, dtypes and alignment of its inputs,
    and on nothing else; where no tape can hold it, or its launches are watched, it is called every
    time."""
    if launches_are_watched() or not can_record():
        return function(spec, *inputs)
    assert (first := inputs[0]) is not None
    signature = [function, spec, *key, first.device]
    addresses = []
    for x in inputs:
        if x is None:
            addresses.append(0)
            signature.append(None)
        else:
            addresses.append(address := x.data_ptr())
            signature += (x.shape, x.stride(), x.dtype, address & 15)
    known = tuple(signature)
    found = _tapes.get(known)
    if found is None:
        if len(_tapes) >= 2_000:
            _tapes.clear()
        _tapes[known] = not first.is_meta
    if not found:
        return function(spec, *inputs)
    if found is not True:
        return found.play(inputs, addresses)
    tape = _Tape(inputs)
    results = tape.record(function, spec, inputs)
    _tapes[known] = tape if tape.complete else False
    return results


class _View(NamedTuple):
    """A tensor as a place in a buffer."""

    buffer: int
    offset: int  # in bytes
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, base: Any, start: int) -> Tensor:
        base = base if base.dtype == self.dtype else base.view(self.dtype)
        start = base.storage_offset() + (start + self.offset) // self.dtype.itemsize
        return base.as_strided(self.shape, self.stride, start)


_EMPTY = {"aten::" + name for name in ("empty", "new_empty", "empty_like", "empty_strided")}
_PURE = {"aten::" + name for name in ("clone", "_to_copy", "mul", "add", "sum")}
_PURE |= {"aten::" + name for name in ("zeros", "new_zeros", "zeros_like")}


class _Tape(TorchDispatchMode):
    """What a call launches and allocates, and the few other things that it may do.

    Storages tell which buffer a tensor lies in, the first of which are the inputs. While recording,
    each of them has a storage of its own: that two share memory may be true of this call alone.
    What does not leave the call shares one allocation.
    """

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self.complete, self.scratch, self.launches = True, 0, False
        self.given, self.device = len(inputs), next(x.device for x in inputs if x is not None)
        self.buffers: list[Any] = []  # each in whole, a _View
        self.numbers: dict[int, int] = {}  # of the buffers, by storage
        self.bytes: dict[int, int] = {}  # of those that are only allocated
        # What to run, its arguments, (argument, buffer, place) of the tensors among them, whether
        # it takes addresses, the buffer that it makes (or 0), which of those are used no more.
        self.steps: list[tuple[Any, list[Any], list[Any], bool, int, list[int]]] = []

    def record(self, function: Callable[..., Results], spec: Any, inputs: Tensors) -> Results:
        aliases: list[Tensor | None] = []
        for x in inputs:
            if x is None:
                self.buffers.append(None)
            else:
                self.add(x := from_dlpack(to_dlpack(x.detach())).as_strided(x.shape, x.stride()))
            aliases.append(x)
        _now.tape = self
        try:
            with self:
                results = function(spec, *aliases)
        finally:
            _now.tape = None
        ends = [None if x is None else self.view(x) for x in results]
        self.ends = [end and (end, end in self.buffers) for end in ends]
        leaving = {end.buffer for end in ends if end is not None}
        self.complete &= (
            any(not step[4] for step in self.steps) and min(leaving, default=0) >= self.given
        )
        self.numbers.clear()
        life: dict[int, tuple[int, int]] = {}  # the first and the last step that uses a buffer
        for at, (_, _, views, _, made, _) in enumerate(self.steps):
            for n in [n for _, n, _ in views] + [made] * (made > 0):
                life[n] = life.get(n, (at, at))[0], at
        for made in [step[4] for step in self.steps if step[4] and step[4] not in leaving]:
            self.steps[life[made][1]][5].append(made)
        self.new = [(n, *self.buffers[n][2:]) for n in self.bytes if n in leaving]
        passing = {n: (b, *life[n]) for n, b in self.bytes.items() if n in life.keys() - leaving}
        self.offsets, self.size = _fit(passing)
        self.blank = [0] * (len(self.buffers) - self.given + 1)  # the last: of what is empty
        return results

    def add(self, x: Tensor) -> int:
        number = self.numbers[storage_key(x)] = len(self.buffers)
        self.buffers.append(self.view(x))
        return number

    def view(self, x: Tensor) -> _View:
        number = self.numbers.get(storage_key(x), -1)
        self.complete &= number >= 0
        offset = int(x.storage_offset()) * x.element_size()
        return _View(number, offset, x.dtype, x.shape, x.stride())

    def note(self, run: Any, arguments: Sequence[Any], made: int = 0, launch: bool = False) -> None:
        views = [(n, self.view(x)) for n, x in enumerate(arguments) if isinstance(x, Tensor)]
        places: list[Any] = [(n, view.buffer, view) for n, view in views]
        if launch:  # an empty tensor has no address, wherever it lies
            places = [(n, -1, 0) if 0 in v.shape else (n, v.buffer, v.offset) for n, v in views]
        rest = [None if isinstance(x, Tensor) else x for x in arguments]
        self.steps.append((run, rest, places, launch, made, []))
        self.launches |= launch
        self.scratch = max(self.scratch, run.scratch if launch else 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _now.tape is not self:
            return out
        name, changes = operator(func)
        if name in _EMPTY:
            self.complete &= out.device == self.device
            self.bytes[self.add(out)] = out.untyped_storage().nbytes()
        elif name in _PURE and not changes:
            self.complete &= not any(isinstance(x, Tensor) for x in kwargs.values())
            self.note(functools.partial(func, **kwargs), args, self.add(out))
        else:  # nothing but views of the first argument
            parts = [*(out if isinstance(out, (tuple, list)) else [out]), *args[:1]]
            tensors = [x for x in parts if isinstance(x, Tensor)]
            one = len({storage_key(x) for x in tensors}) == 1
            self.complete &= one and len(tensors) == len(parts) and not changes
            self.complete &= func is not torch.ops.aten.view.dtype
        return out

    def play(self, inputs: Tensors, addresses: list[int]) -> Results:
        device = self.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.play(inputs, addresses)
        stream = _stream(device.index) if self.launches else None
        tensors: list[Any] = [*inputs, *self.blank]
        addresses += self.blank
        shared = torch.empty(self.size + self.scratch, dtype=torch.uint8, device=device)
        start = shared.data_ptr()
        for n, offset in self.offsets.items():
            addresses[n] = start + offset
        for n, dtype, shape, stride in self.new:
            x = tensors[n] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            addresses[n] = x.data_ptr()
        for run, arguments, places, launch, made, spent in self.steps:
            if launch:
                found = [addresses[buffer] + offset for _, buffer, offset in places]
                run(stream, start + self.size, found)
            else:
                arguments = arguments.copy()
                for n, buffer, view in places:
                    passes = buffer in self.offsets
                    base = shared if passes else tensors[buffer]
                    arguments[n] = view.of(base, self.offsets[buffer] if passes else 0)
                result = run(*arguments)
                if made:
                    tensors[made], addresses[made] = result, result.data_ptr()
            for n in spent:
                tensors[n] = None
        return tuple(
            [
                end and (tensors[end[0].buffer] if end[1] else end[0].of(tensors[end[0].buffer], 0))
                for end in self.ends
            ]
        )


def _fit(uses: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets for buffers of (bytes, first step, last step), large ones first, and the size of all:
    what is never used at the same time may lie in the same place."""
    offsets: dict[int, int] = {}
    size = 0
    for n in sorted(uses, key=lambda n: -uses[n][0]):
        count, first, last = uses[n]
        beside = [o for o in offsets if uses[o][1] <= last and first <= uses[o][2]]
        at = 0
        for o in sorted(beside, key=lambda o: offsets[o]):
            if at + count <= offsets[o]:
                break
            at = max(at, -(-(offsets[o] + uses[o][0]) // 512) * 512)
        offsets[n], size = at, max(size, at + count)
    return offsets, -(-size // 512) * 512
