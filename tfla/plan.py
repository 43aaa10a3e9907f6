"""From the integers of a problem to the shape of its kernels: pure, cached, printable, no run-time
search.

A number below that is not arithmetic was measured; ``docs/performance/`` keeps the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Device:
    """What a plan must know of the machine. ``capability`` is (major, minor) for NVIDIA, (0, 0)
    for AMD and the interpreter."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that one program may use

    @property
    def descriptors(self) -> bool:
        """Has it a copy engine for tiles (TMA)?"""
        return self.capability[0] >= 9


@dataclass(frozen=True)
class Problem:
    """One call, in integers."""

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int  # sequences: B, or as many as are packed
    packed: bool
    bytes: int  # of an element of q, k, v
    # Of fp32 products; says nothing of 16-bit operands ("ieee").
    precision: Literal["ieee", "tf32"]
    G: int | None = None  # heads of q and k; None: as many as of v, H

    @property
    def R(self) -> int:
        """Heads of a group: those that share a head of q and k."""
        return 1 if self.G is None else self.H // self.G


@dataclass(frozen=True)
class Tile:
    """The shape of a scan: contraction A, output width X, and the constants of the kernel."""

    A: int
    X: int
    block_a: int
    block_x: int
    slices: int  # of the contraction: launches, each with block_a of it and adding to the last
    warps: int
    stages: int
    transposed: bool
    descriptor: bool
    hopper: bool = False  # by hand, hopper.py
    mma: bool = False  # by hand, mma.py
    y_ahead: bool = False  # of mma.py: is there shared memory for y of two chunks?
    parts: int = 1  # bf16 numbers that an fp32 one is split into for a product, where it is

    @property
    def tiles(self) -> int:
        return -(-self.X // self.block_x)


@dataclass(frozen=True)
class GroupTile:
    """The shape of the kernels that make dq and dk of groups of heads, groups.py."""

    block_k: int  # columns of q and k; a program makes the gradient of two chunks of their tokens
    block_v: int  # columns of v that a product takes at once
    splits: int  # programs that share the heads of a group; their sums are added in the end
    scores_warps: int
    scores_stages: int
    gradient_warps: int
    gradient_stages: tuple[int, ...]  # by the tiles between a checkpoint and the program's own


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a launch."""

    L: int  # tokens a chunk
    # Tokens between checkpoints, the stored states: dq and dk start there, and the sum of df.
    checkpoint_every: int
    split_len: int  # tokens of a split, where h and dv need several a sequence; 0: they do not
    h: Tile  # h and dv: K -> V
    dq: Tile  # dq and dk: V -> K
    block_k: int  # head dim block of the small kernels
    block_v: int
    block_c: int  # chunks that the scans over chunks take at once,
    block_n: int  # and columns of n
    small_warps: int
    gate_warps: int  # of kernels over the gates of a chunk
    fuse_denominator: bool  # the scan of h makes the denominator itself, but for fp16
    # How the denominator is summed where it is not: the products of fp32 numbers are fp32's
    # ("ieee", which 16-bit operands have too), three of TF32 each, or fp64's, sums in fp64 too.
    denominator: Literal["ieee", "tf32x3", "fp64"] = "ieee"
    group: GroupTile | None = None  # where many heads share q and k

    @property
    def checkpoint_shape(self) -> tuple[int, int]:
        """(rows, columns) of a checkpoint, whose tiles are whole."""
        return self.h.slices * self.h.block_a, self.h.tiles * self.h.block_x

    def tile(self, name: str) -> Tile:
        return self.h if name in ("h", "dv") else self.dq

    def __str__(self) -> str:
        head = f"chunk {self.L}, checkpoint every {self.checkpoint_every}"
        head += f", split {self.split_len or 'none'}"
        return "\n".join([head, f"h, dv   {self.h}", f"dq, dk  {self.group or self.dq}"])


def power_of_two(n: int, low: int = 16) -> int:
    """The least power of two that is at least n and at least ``low``."""
    return max(low, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Shape:
    """What a program can hold: its state, block_a x block_x in fp32, may take half of the
    registers and no more."""

    L: int
    block_a: int  # at most
    block_x: int  # at most
    warps: int
    stages: int
    transposed: bool = False
    hopper: bool = False
    mma: bool = False
    parts: int = 1


# By the file of the kernel and what it is for. Chosen from ahead-of-time builds: the widest that
# leave (next to) nothing on the stack and two programs a multiprocessor.
SHAPES = {
    "hopper.py": Shape(64, 256, 128, 8, 2, transposed=True, hopper=True),
    # fp32 as sums of two bf16: two stages fill the shared memory, 256 rows spill 900 bytes.
    "hopper.py, tf32": Shape(64, 128, 128, 8, 2, transposed=True, hopper=True, parts=2),
    # fp32 as sums of three bf16, 24 bits, whose tiles leave room for one stage.
    "hopper.py, ieee": Shape(64, 128, 128, 8, 1, transposed=True, hopper=True, parts=3),
    # Measured as compiled for 8.0 on an H200 (docs/performance/other_gpus.md).
    "mma.py": Shape(32, 256, 128, 8, 2, transposed=True, mma=True),
    "mma.py, tf32": Shape(32, 128, 128, 8, 2, transposed=True, mma=True, parts=2),
    "mma.py, tf32, 99 KiB": Shape(16, 128, 128, 8, 2, transposed=True, mma=True, parts=2),
    "mma.py, ieee": Shape(32, 128, 128, 8, 2, transposed=True, mma=True, parts=3),
    "mma.py, ieee, 99 KiB": Shape(16, 128, 128, 8, 2, transposed=True, mma=True, parts=3),
    # What neither can serve. fp32 on the plain units: anything wider spills kilobytes.
    "scan.py, ieee": Shape(16, 64, 16, 4, 2),
    # On 9.0 short sequences and odd head dims; at L = 64 a contraction of 256 spills 256 to 1,264
    # bytes.
    "scan.py, 9.0, narrow": Shape(64, 128, 64, 4, 2),
    "scan.py, 9.0, wide": Shape(32, 256, 64, 4, 3, transposed=True),
    "scan.py, 9.0, tf32": Shape(32, 128, 64, 4, 2, transposed=True),
    # On 8.x and 12.x, rows that are not multiples of 16 bytes.
    "scan.py, 8.x": Shape(64, 128, 64, 4, 2, transposed=True),
    "scan.py, 10.x and AMD": Shape(32, 128, 64, 4, 2),
    "scan.py, tf32": Shape(32, 64, 32, 4, 2),
}


LONG = 33  # tokens, from which on hopper.py is worth it


def _shape(p: Problem, device: Device, mean: int) -> Shape:
    major = device.capability[0]
    fp32 = f", {p.precision}" if p.bytes == 4 else ""
    if major == 9 and _descriptors(p, device) and mean >= LONG:
        return SHAPES["hopper.py" + fp32]
    if major in (8, 12) and _whole_rows(p):
        small = ", 99 KiB" if fp32 and device.shared_memory < 128 * 1024 else ""
        return SHAPES["mma.py" + fp32 + small]
    if p.bytes == 4 and p.precision == "ieee":
        return SHAPES["scan.py, ieee"]
    if p.bytes == 4:
        return SHAPES["scan.py, 9.0, tf32" if major == 9 else "scan.py, tf32"]
    if major == 9:
        return SHAPES["scan.py, 9.0, narrow" if max(p.K, p.V) <= 128 else "scan.py, 9.0, wide"]
    return SHAPES["scan.py, 10.x and AMD" if major in (0, 10) else "scan.py, 8.x"]


class StoredSizes(NamedTuple):
    """What sizes the arrays have that a forward pass saves; see ``Plan``."""

    L: int
    checkpoint_every: int
    checkpoint_shape: tuple[int, int]


def is_at_least(x: int, bound: int) -> int:
    """1 where x >= bound, else 0, for x >= 0 and bound >= 1. By arithmetic alone: in a graph that
    is being traced x may be a symbol, and a comparison would hold the graph to its answer."""
    return 1 - 1 // (1 + x // bound)


def _mean(p: Problem) -> int:
    """Tokens of a sequence; of packed ones the host knows no more than their mean."""
    return p.T // (p.N + 1 // (1 + p.N)) if p.packed else p.T


def _chunk(shape: Shape, mean: int) -> int:
    """The least power of two from 16 on that holds a sequence, up to what a program can hold."""
    L = step = 16
    while step < shape.L:
        L += step * is_at_least(mean, step + 1)
        step *= 2
    return L


def _programs(device: Device, p: Problem, shape: Shape, h: Tile, dq: Tile) -> int:
    """As many as fill the machine. A multiprocessor has registers for two of four warps, or one of
    eight; of fp32 in hopper.py one by its shared memory."""
    wide = max(h.warps, dq.warps) == 8
    one = (shape.hopper or shape.mma) and (p.bytes == 4 or wide)
    return device.multiprocessors * (1 if one else 2)


def _checkpoint_every(p: Problem, dq: Tile, programs: int) -> int:
    """Tokens between checkpoints: as many as leave enough programs for dq and dk to fill the
    machine, 2,048 at most and 256 at least."""
    mean, every, most = _mean(p), 2048, 2048
    while most > 256:
        found = -(-mean // most) * p.N * p.H * dq.tiles
        most //= 2
        every -= most * (1 - is_at_least(found, programs))
    return every


def _stored_sizes(device: Device, p: Problem, shape: Shape) -> tuple[StoredSizes, Tile, Tile]:
    """With the tiles of h and of dq."""
    h, dq = _tile(p, device, shape, p.K, p.V), _tile(p, device, shape, p.V, p.K)
    L = _chunk(shape, _mean(p))
    if p.R > FEW_HEADS:
        checkpoint_every = GROUP_CHUNKS * L
    else:
        checkpoint_every = _checkpoint_every(p, dq, _programs(device, p, shape, h, dq))
    checkpoint_shape = h.slices * h.block_a, h.tiles * h.block_x
    return StoredSizes(L, checkpoint_every, checkpoint_shape), h, dq


# Of so few heads a group the scans of dq and dk are made a head, and then added: that is the faster
# way, and what it takes is not many times dq and dk. 32 heads of 128 / 128 in 8 groups, 4 x 16,384
# tokens (H200): 1.7 ms beside 5.3.
FEW_HEADS = 4
# Chunks between the checkpoints that dq and dk of groups start from: with 4, states of 128 heads of
# 128 x 64 take 336 MiB more at 4 x 16,384 tokens; with 8, dq and dk take longer.
GROUP_CHUNKS = 6


def _group(p: Problem, device: Device, L: int) -> GroupTile | None:
    """The heads of a group are split over programs only where tokens and groups are too few to
    fill the machine. fp32 is multiplied on the plain units, or as three products of TF32, which
    want the operands in registers: with 4 warps at L = 64 up to 7,112 bytes of them spilled, with
    8 and these blocks 256 and 544 (not timed)."""
    if p.R <= FEW_HEADS or p.G is None:
        return None
    fp32, wide = p.bytes == 4, L == 64
    block = 16 if wide and p.precision == "ieee" else 32
    block_k = min(block if fp32 else 64, power_of_two(p.K))
    block_v = min(block if fp32 else 128, power_of_two(p.V))
    programs = max(1, p.N * -(-_mean(p) // (GROUP_CHUNKS * L)) * p.G * -(-p.K // block_k))
    splits = 1
    while splits < p.R and splits * programs < 8 * device.multiprocessors:
        splits *= 2
    scores = device.shared_memory // (4 * L * block_v * p.bytes) if wide else 2
    return GroupTile(
        block_k,
        block_v,
        splits,
        scores_warps=8 if wide else 4,
        scores_stages=max(1, min(5, scores - 1)),
        gradient_warps=8 if wide and (fp32 or block_v == 128) else 4,
        gradient_stages=tuple(
            _gradient_stages(p, device, L, block_k, block_v, updates)
            for updates in range(GROUP_CHUNKS // 2)
        ),
    )


def _gradient_stages(
    p: Problem, device: Device, L: int, block_k: int, block_v: int, updates: int
) -> int:
    """Heads whose operands a program holds in shared memory, so that two programs find room, or at
    least one: copies from memory take longer than the work on a head. With tiles between, Triton
    holds one head less than its stages, and one state."""
    rows, state = p.bytes * 2 * L * block_v, p.bytes * block_k * block_v
    each, rest, held = rows + state, state, 0
    if updates:
        others = updates * p.bytes * 2 * L * block_k
        each, rest, held = rows * (1 + updates), others + rows + state + 2048, 1
    for programs, least in ((2, 2), (1, 1)):
        stages = held + (device.shared_memory // programs - 2048 - rest) // each
        if stages >= least:
            return min(4, stages)
    return 1


def stored_sizes(problem: Problem, device: Device) -> list[tuple[int, StoredSizes]]:
    """(1 or 0, sizes): those of ``plan`` have the 1. B, T and N may be symbols, which are not
    compared: a graph that is traced holds for all of them."""
    mean = _mean(problem)
    short, long = (_shape(problem, device, some) for some in (0, LONG))
    if short is long:
        return [(1, _stored_sizes(device, problem, short)[0])]
    is_long = is_at_least(mean, LONG)
    return [
        (is_long, _stored_sizes(device, problem, long)[0]),
        (1 - is_long, _stored_sizes(device, problem, short)[0]),
    ]


@lru_cache(maxsize=4096)
def plan(problem: Problem, device: Device) -> Plan:
    """The kernels that serve ``problem`` on ``device``."""
    p, mean = problem, _mean(problem)
    shape = _shape(p, device, mean)
    (L, checkpoint_every, _), h, dq = _stored_sizes(device, p, shape)
    wanted = _programs(device, p, shape, h, dq)
    # h and dv are split where whole sequences leave more than a third of the machine idle.
    programs = max(p.N * p.H * h.tiles, 1)
    split_len = 0
    if 3 * programs < 2 * wanted and mean >= 8 * checkpoint_every:
        split_len = max(4 * checkpoint_every, power_of_two(-(-mean * programs // wanted)))
        split_len = -(-split_len // checkpoint_every) * checkpoint_every
    # A state of two halves leaves no registers for it (256 -> 512: 1.32 ms against 0.83 and 0.29).
    fuse_denominator = h.hopper and h.A <= 128 and h.parts < 3
    small = min(32 if p.bytes == 4 else 64, power_of_two(max(p.K, p.V)))
    # The scans over chunks: far at a stride where there is far to go, else as wide as fills the
    # machine (1,048,576 tokens 631 us, 64 and 16 at once 1,261; 64 x 1,024 tokens 49 and 65).
    block_c, block_n = 64, 16 if p.N * p.H <= device.multiprocessors else 32
    if mean >= 512 * L:
        block_c, block_n = 256, 8
    return Plan(
        L,
        checkpoint_every,
        split_len,
        h,
        dq,
        small,
        small,
        block_c,
        min(block_n, small),
        small_warps=2 if L <= 32 and shape.mma else 4,
        gate_warps=1 if L <= 32 and shape.mma else 2,
        fuse_denominator=fuse_denominator,
        denominator=_denominator(p, device),
        group=_group(p, device, L),
    )


# Capabilities whose tensor cores multiply fp64 numbers as fast as plain units do fp32 ones; most
# others have 1/64 of that rate.
FAST_FP64 = {(8, 0), (9, 0)}


def _denominator(p: Problem, device: Device) -> Literal["ieee", "tf32x3", "fp64"]:
    """It may be next to 0: of fp32 where TF32 is allowed it takes three products in place of one,
    else fp64 where that is fast."""
    if p.bytes != 4:
        return "ieee"
    if p.precision == "tf32":
        return "tf32x3"
    return "fp64" if device.capability in FAST_FP64 else "ieee"


def _descriptors(p: Problem, device: Device) -> bool:
    """Can the copy engine read the rows? They must be multiples of 16 bytes."""
    return device.descriptors and _whole_rows(p)


def _whole_rows(p: Problem) -> bool:
    """Are rows of q, k and v multiples of 16 bytes, what one thread copies at once?"""
    return p.K * p.bytes % 16 == 0 and p.V * p.bytes % 16 == 0


def _tile(p: Problem, device: Device, shape: Shape, A: int, X: int) -> Tile:
    block_a = min(shape.block_a, power_of_two(A))
    block_x = min(shape.block_x, power_of_two(X, 64 if shape.hopper or shape.mma else 16))
    warps, stages = shape.warps, shape.stages
    if shape.hopper:
        warps = block_x // 16
        stages += shape is SHAPES["hopper.py"] and block_a <= 128 and block_x == 128
    if shape.mma:  # half of the registers of a program hold the state, or less
        warps = 4 if block_a * block_x <= 8192 else shape.warps
        stages += p.bytes == 2 and block_a * block_x <= 4096
    return Tile(
        A,
        X,
        block_a,
        block_x,
        slices=-(-A // block_a),
        warps=warps,
        stages=stages,
        # The transposed form has block_x rows, of which a warp-group product needs 64.
        transposed=shape.transposed and block_x >= 64,
        descriptor=_descriptors(p, device),
        hopper=shape.hopper,
        mma=shape.mma,
        y_ahead=shape.mma and shape.parts < 3 and device.shared_memory >= 128 * 1024,
        parts=shape.parts,
    )
