"""A pass of the kernels as a value: named buffers, and the launches that read and write them.

A ``Program`` is made once for a kind of call, by running the pass of ``tfla.algorithm`` over
``Symbol``s: arrays that have a shape, strides and a dtype, and no memory. Nothing here knows torch
or a device. ``tfla.kernels.runtime`` plays a Program on tensors; the roofline, ahead-of-time builds
and labels of a profile read it; whoever has arrays of another make can lower it.

Three rules keep it plain. A launch takes whole buffers: where a contraction is cut, the offset is a
number. Its kernel takes what it reads, then what it updates in place, then what it writes, then
numbers, then constants. A buffer that a launch updates in place has one element more than it holds:
XLA fuses a call in a loop with the slices around it and then forgets that the buffer was to be
updated, but only slices whose size is a multiple of 128 bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tfla.plan import Device
from tfla.spec import CallSpec, Inputs

Role = Literal["input", "output", "saved", "workspace"]
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8, "i32": 4, "i64": 8}
SAVED = -1  # in place of a buffer: all that is saved
DTYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int32": "i32",
    "int64": "i64",
}
# What a forward pass takes, the first nine, and a backward pass, all of them.
NAMES = (*Inputs._fields, "h", "saved", "dh", "dC", "dn")
ALIGNMENT = 32  # numbers; parts of one allocation begin at multiples of it


class Buffer(NamedTuple):
    """One array of a Program."""

    name: str
    role: Role
    dtype: str  # a key of BYTES
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements; dense but for inputs
    aligned: bool = True  # does it begin at a multiple of 16 bytes?
    updated: bool = False  # is it written by one launch and updated in place by another?

    @property
    def elements(self) -> int:
        """That it has, in memory of its own."""
        spare = self.updated and self.role in ("saved", "workspace")
        return math.prod(self.shape) + spare

    @property
    def bytes(self) -> int:
        return self.elements * BYTES[self.dtype]


class Parameters(NamedTuple):
    """The arguments of a launch by their names in the kernel."""

    reads: dict[str, int | None]
    updates: dict[str, int | None]
    writes: dict[str, int | None]
    numbers: dict[str, int | float | None]
    constants: dict[str, Any]


class Launch(NamedTuple):
    """One call of a kernel. reads, updates and writes say which buffer of the Program each is, or
    None; together with numbers and constants they are all parameters of the kernel, in its order.
    """

    label: str  # what the pass calls it: "h", "dq", "weights", ...
    kernel: Any  # a Triton or Gluon function
    grid: tuple[int, ...]
    warps: int
    stages: int
    reads: tuple[int | None, ...]
    updates: tuple[int | None, ...]
    writes: tuple[int | None, ...]
    numbers: tuple[int | float | None, ...]
    constants: tuple[Any, ...]

    @property
    def buffers(self) -> tuple[int | None, ...]:
        """In the kernel's order."""
        return self.reads + self.updates + self.writes

    @property
    def parameters(self) -> Parameters:
        names, at = self.kernel.arg_names, 0
        sides: list[dict[str, Any]] = []
        for values in (self.reads, self.updates, self.writes, self.numbers, self.constants):
            sides.append(dict(zip(names[at : at + len(values)], values, strict=True)))
            at += len(values)
        return Parameters(*sides)

    def __str__(self) -> str:
        constants = self.parameters.constants
        shown = {k: v for k, v in constants.items() if v is not None and v is not False}
        words = " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in shown.items())
        name = self.kernel.__name__.strip("_")
        return f"{self.label}: {name}{self.grid} {self.warps} warps {words}"


@dataclass(frozen=True)
class Program:
    """Launches, and what lies around them.

    inputs, outputs: buffers that come from outside and go there; a buffer of the role "saved" is
    one or the other. Where a pass is cut by an exchange between processes its Programs share one
    list of buffers, and what one leaves for another is an output of the one.
    """

    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def workspace(self) -> dict[int, tuple[int, int, int]]:
        """Of buffers that no other Program knows: (bytes, first launch, last launch)."""
        outside = {*self.inputs, *self.outputs}
        life: dict[int, tuple[int, int]] = {}
        for at, launch in enumerate(self.launches):
            for n in launch.buffers:
                if n is not None and n not in outside:
                    life[n] = life.get(n, (at, at))[0], at
        return {n: (self.buffers[n].bytes, *ends) for n, ends in life.items()}

    def __str__(self) -> str:
        sizes = {role: 0 for role in ("input", "output", "saved", "workspace")}
        for buffer in self.buffers:
            sizes[buffer.role] += buffer.bytes
        sizes["workspace"] = fit(self.workspace)[1]
        head = ", ".join(f"{role} {size / 2**20:,.1f} MiB" for role, size in sizes.items())
        return "\n".join([head, *map(str, self.launches)])


def padded(size: int) -> int:
    """The least multiple of ``ALIGNMENT`` that is at least ``size``, which may be a symbol: what
    follows in an allocation is then aligned for every length, and no kernel is compiled anew, or
    slower, for want of it."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def fit(uses: Mapping[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets for buffers of (bytes, first use, last use), large ones first, and the size of all:
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


# ---------------------------------------------------------------- how it is made


class Symbol:
    """An array without memory: a buffer of a Program that is being made, in whole."""

    __slots__ = ("buffer", "builder", "dtype", "shape", "strides")

    def __init__(
        self,
        builder: Builder,
        buffer: int,
        dtype: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        self.builder, self.buffer, self.dtype = builder, buffer, dtype
        self.shape, self.strides = shape, strides

    @property
    def mT(self) -> Symbol:
        """Its last two axes exchanged."""
        (*shape, a, b), (*strides, c, d) = self.shape, self.strides
        return Symbol(self.builder, self.buffer, self.dtype, (*shape, b, a), (*strides, d, c))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@functools.cache
def name_of(dtype: Any) -> str:
    """Ours of a dtype of torch or NumPy, a key of BYTES."""
    return DTYPES[str(dtype).rsplit(".", 1)[-1]]


class ArrayLayout(NamedTuple):
    """What a Program may depend on of an array that comes in."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool = True


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous array."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class Builder:
    """What a pass allocates and launches, as it goes."""

    def __init__(self, device: Device) -> None:
        self.device = device  # what is launched may depend on its size
        self.buffers: list[Buffer] = []
        self.names: dict[str, int] = {}  # how many buffers have one
        self.updated: set[int] = set()  # of the buffers
        self.launches: list[Launch] = []
        self.cuts: list[int] = []  # launches before each exchange
        self.given: list[int] = []  # the buffers that come in
        self.saved: dict[int, int] = {}  # what is saved: buffer -> element of one allocation
        self.saved_elements = 0  # of that allocation

    def _add(self, buffer: Buffer) -> Symbol:
        count = self.names[buffer.name] = self.names.get(buffer.name, 0) + 1
        if count > 1:
            buffer = buffer._replace(name=f"{buffer.name} {count}")
        self.buffers.append(buffer)
        at = len(self.buffers) - 1
        return Symbol(self, at, buffer.dtype, buffer.shape, buffer.strides)

    def input(self, name: str, x: ArrayLayout, role: Role = "input") -> Symbol:
        found = self._add(Buffer(name, role, x.dtype, x.shape, x.strides, x.aligned))
        self.given.append(found.buffer)
        return found

    def new(self, name: str, *shape: int, dtype: str = "fp32", role: Role = "workspace") -> Symbol:
        """A dense array that nobody has written yet."""
        return self._add(Buffer(name, role, dtype, shape, dense(shape)))

    def launch(
        self,
        label: str,
        kernel: Any,
        grid: tuple[int, ...],
        warps: int,
        stages: int,
        *,
        reads: Mapping[str, Symbol | None],
        updates: Mapping[str, Symbol | None] | None = None,
        writes: Mapping[str, Symbol | None],
        numbers: Mapping[str, int | float | None],
        constants: Mapping[str, Any],
    ) -> None:
        """Note a launch; an empty grid is none."""
        updates = updates or {}
        given = [*reads, *updates, *writes, *numbers, *constants]
        if given != list(kernel.arg_names):
            wanted = ", ".join(kernel.arg_names)
            raise TypeError(f"{kernel.__name__} takes {wanted}; got {', '.join(given)}.")
        if 0 in grid:
            return
        self.updated.update(x.buffer for x in updates.values() if x is not None)

        def places(side: Mapping[str, Symbol | None]) -> tuple[int | None, ...]:
            return tuple([None if x is None else x.buffer for x in side.values()])

        self.launches.append(
            Launch(
                label,
                kernel,
                grid,
                warps,
                stages,
                places(reads),
                places(updates),
                places(writes),
                tuple(numbers.values()),
                tuple(constants.values()),
            )
        )

    def cut(self) -> None:
        """Here one Program ends and another begins."""
        self.cuts.append(len(self.launches))

    def part(self, name: str, *shape: int, given: bool) -> Symbol:
        """One of the arrays, fp32, that a forward pass saves for its backward pass. given: this is
        the backward pass. Whoever wants them in one allocation has ``saved`` for it."""
        role: Role = "saved"
        if given:
            x = self.input(name, ArrayLayout("fp32", shape, dense(shape)), role)
        else:
            x = self.new(name, *shape, role=role)
        self.saved[x.buffer] = self.saved_elements
        self.saved_elements += padded(x.numel + 1)
        return x

    @property
    def whole(self) -> Symbol:
        """All that is saved, as one argument or result of a pass."""
        shape = (self.saved_elements,)
        return Symbol(self, SAVED, "fp32", shape, (1,))

    def programs(self, outputs: Iterable[Symbol]) -> list[Program]:
        """One, or with exchanges one more than there are cuts. outputs: what leaves the pass."""
        leaving = {x.buffer for x in outputs if x.buffer != SAVED}
        for n in leaving | self.updated:
            found = self.buffers[n]
            out = n in leaving and found.role == "workspace"
            role: Role = "output" if out else found.role
            self.buffers[n] = found._replace(role=role, updated=n in self.updated)
        given, buffers = set(self.given), tuple(self.buffers)
        leaving |= {n for n in self.saved if n not in given}
        edges = [0, *self.cuts, len(self.launches)]
        parts = [tuple(self.launches[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        outside, made = given, set[int]()
        uses = [{n for x in part for n in x.buffers if n is not None} for part in parts]
        programs = []
        for at, part in enumerate(parts):
            used, later = uses[at], set[int]().union(*uses[at + 1 :])
            takes = tuple(sorted(used & (outside | made)))
            fresh = used - outside - made
            last = at + 1 == len(parts)
            # What nothing writes (there are no tokens) is allocated at the end.
            gives = (fresh & (leaving | later)) | ((leaving - outside - made) if last else set())
            made |= gives
            programs.append(Program(buffers, part, takes, tuple(sorted(gives))))
        return programs


class Built(NamedTuple):
    """What ``build`` makes of a pass."""

    programs: list[Program]
    symbols: list[Symbol | None]  # of the arrays that it takes
    results: tuple[Symbol | None, ...]
    saved: dict[int, int]  # buffers of what is saved: their first element in one allocation
    saved_elements: int  # of that allocation
    # With an exchange: what it begins with (weights and the normaliser's gradient), what it brings.
    given: tuple[Any, Any]
    arrived: list[Symbol]


def build(
    function: Callable[..., Any],
    spec: CallSpec,
    layouts: Mapping[str, ArrayLayout | None],
    device: Device,
    exchange: bool = False,
) -> Built:
    """The Programs of ``function(spec, *arrays)``, a pass of ``tfla.algorithm``, on a device.

    layouts: of its arrays, in their order; of "saved" only whether it is there. exchange: the pass
    is cut by one, see ``tfla.backend.Exchange``.
    """
    builder = Builder(device)
    symbols = [
        None if x is None else builder.whole if name == "saved" else builder.input(name, x)
        for name, x in layouts.items()
    ]
    arrival = _Arrival(builder, spec)
    results = function(spec, *symbols, *([arrival] if exchange else []))
    leaving = [x for x in results if x is not None] + _written(arrival.given)
    return Built(
        builder.programs(leaving),
        symbols,
        results,
        builder.saved,
        builder.saved_elements,
        arrival.given,
        arrival.arrived,
    )


class _Arrival:
    """An exchange between processes while a pass becomes Programs: it cuts them."""

    def __init__(self, builder: Builder, spec: CallSpec) -> None:
        self.builder, self.spec = builder, spec
        self.given: tuple[Any, Any] = None, None
        self.arrived: list[Symbol] = []

    def __call__(self, weights: Any, column: Any) -> Callable[[], tuple[Any, Any]]:
        self.builder.cut()
        self.given = weights, column
        return self._wait

    def _wait(self) -> tuple[Symbol, Symbol | None]:
        self.builder.cut()
        s = self.spec
        shapes = {"dC": (s.N, s.H, s.K, s.V)} | ({"dn": (s.N, s.H, s.K)} if s.normalize else {})
        self.arrived = [
            self.builder.input(name, ArrayLayout("fp32", shape, dense(shape)))
            for name, shape in shapes.items()
        ]
        dC, *dn = self.arrived
        return dC, dn[0] if dn else None


def _written(value: Any) -> list[Symbol]:
    """All symbols in a value that a launch has written already."""
    if isinstance(value, Symbol):
        launches = value.builder.launches
        written = {n for x in launches for n in x.updates + x.writes}
        return [value] if value.buffer in written else []
    if isinstance(value, tuple):
        return [symbol for item in value for symbol in _written(item)]
    return []
