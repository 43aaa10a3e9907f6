"""From the integers of a problem to the shape of its kernels: pure, cached, printable, no run-time search.

A number below that is not arithmetic was measured; ``docs/performance.md`` keeps the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Device:
    """What a plan must know of the machine. ``capability`` is (major, minor) for NVIDIA, (0, 0) for AMD and the interpreter."""

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
    precision: str  # of fp32 products: "ieee" or "tf32"; "ieee" for 16-bit operands, where it says nothing


@dataclass(frozen=True)
class Tile:
    """The shape of a scan: contraction A, output width X, and the constants of the kernel."""

    A: int
    X: int
    block_a: int
    block_x: int
    splits: int  # the contraction is done in so many launches of block_a each, each adding to the last
    warps: int
    stages: int
    transposed: bool
    descriptor: bool

    @property
    def tiles(self) -> int:
        return -(-self.X // self.block_x)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a launch."""

    L: int  # tokens a chunk
    span: int  # tokens after which states are kept: there dq and dk start, and the gradient of the forget gate restarts
    segment: int  # tokens a piece where h and dv are cut to fill the machine, 0 where they are not
    h: Tile  # h and dv: K -> V
    dq: Tile  # dq and dk: V -> K
    block_k: int  # head dim block of the small kernels
    block_v: int
    small_warps: int

    @property
    def kept(self) -> tuple[int, int]:
        """(rows, columns) of a kept state, tiles filled up."""
        return self.h.splits * self.h.block_a, self.h.tiles * self.h.block_x

    def tile(self, name: str) -> Tile:
        return self.h if name in ("h", "dv") else self.dq

    def __str__(self) -> str:
        head = f"chunk {self.L}, span {self.span}, segment {self.segment or 'none'}"
        return "\n".join([head, f"h, dv   {self.h}", f"dq, dk  {self.dq}"])


def power_of_two(n: int, low: int = 16) -> int:
    """The least power of two that is at least n and at least ``low``."""
    return max(low, 1 << (n - 1).bit_length())


@lru_cache(maxsize=4096)
def plan(problem: Problem, device: Device) -> Plan:
    """The kernels that serve ``problem`` on ``device``."""
    p = problem
    mean = p.T // max(p.N, 1) if p.packed else p.T  # of packed sequences the host knows no more
    L = min(64 if p.bytes == 2 else 32, power_of_two(max(mean, 1)))
    h, dq = _tile(p, device, p.K, p.V), _tile(p, device, p.V, p.K)
    wanted = 2 * device.multiprocessors
    # Kept states: as few as leave enough pieces for dq and dk to fill the machine.
    span = 2048
    while span > max(4 * L, 256) and -(-mean // span) * p.N * p.H * dq.tiles < wanted:
        span //= 2
    # h and dv are cut where whole sequences leave more than a third of the machine idle.
    programs = max(p.N * p.H * h.tiles, 1)
    segment = 0
    if 3 * programs < wanted * 2 and mean >= 8 * span:
        segment = max(4 * span, power_of_two(-(-mean * programs // wanted)))
    small = min(128, power_of_two(max(p.K, p.V)))
    return Plan(L, span, segment, h, dq, small, small, 4)


def _tile(p: Problem, device: Device, A: int, X: int) -> Tile:
    limit = 128 if p.bytes == 2 else 64
    splits = -(-A // limit)
    block_a = limit if splits > 1 else power_of_two(A)
    block_x = min(64 if p.bytes == 2 else 32, power_of_two(X))
    aligned = p.K * p.bytes % 16 == 0 and p.V * p.bytes % 16 == 0
    return Tile(A, X, block_a, block_x, splits, 4, 2, False, device.descriptors and aligned)
