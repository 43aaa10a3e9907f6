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
    """The shape of one scan: contraction A, output width X, and the constants of the kernel."""

    A: int
    X: int
    block_a: int
    block_x: int
    splits: int  # the contraction is done in so many launches, each adding to the last
    warps: int
    stages: int
    transposed: bool
    descriptor: bool


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a launch."""

    L: int  # tokens a chunk
    span: int  # tokens after which the running sum of the forget gate's gradient restarts
    h: Tile
    dq: Tile
    dk: Tile
    dv: Tile
    block_k: int  # head dim block of the small kernels
    block_v: int
    small_warps: int
    segment: int  # tokens a piece of a cut sequence, 0 where none is cut

    def __str__(self) -> str:
        lines = [f"chunk {self.L}, span {self.span}, segment {self.segment}, blocks {self.block_k} / {self.block_v}"]
        for name in ("h", "dq", "dk", "dv"):
            lines.append(f"{name:3s} {getattr(self, name)}")
        return "\n".join(lines)


def power_of_two(n: int, low: int = 16) -> int:
    """The least power of two that is at least n and at least ``low``."""
    return max(low, 1 << (n - 1).bit_length())


@lru_cache(maxsize=4096)
def plan(problem: Problem, device: Device) -> Plan:
    """The kernels that serve ``problem`` on ``device``."""
    p = problem
    L = min(64 if p.bytes == 2 else 32, power_of_two(max(_mean(p), 1)))
    small = min(128, power_of_two(max(p.K, p.V)))
    shapes = {"h": (p.K, p.V), "dq": (p.V, p.K), "dk": (p.V, p.K), "dv": (p.K, p.V)}
    tiles = {name: _tile(p, device, a, x) for name, (a, x) in shapes.items()}
    segment = max(_segment(p, device, tile) for tile in tiles.values())
    return Plan(L=L, span=1024, block_k=small, block_v=small, small_warps=4, segment=segment, **tiles)


def _mean(p: Problem) -> int:
    """Tokens a sequence, on average: all that the host can know of packed ones."""
    return p.T // max(p.N, 1) if p.packed else p.T


def _tile(p: Problem, device: Device, A: int, X: int) -> Tile:
    limit = 256 if p.bytes == 2 else 128
    splits = -(-A // limit)
    block_a = power_of_two(-(-A // splits))
    block_x = min(64 if p.bytes == 2 else 32, power_of_two(X))
    aligned = p.K * p.bytes % 16 == 0 and p.V * p.bytes % 16 == 0
    return Tile(A, X, block_a, block_x, splits, 4, 2, False, device.descriptors and aligned)


def _segment(p: Problem, device: Device, tile: Tile) -> int:
    """Cut where whole sequences leave multiprocessors idle: into pieces of a power of two of tokens, enough for all of them."""
    programs = p.N * p.H * -(-tile.X // tile.block_x)
    wanted = (3 * device.multiprocessors) // 2
    if programs == 0 or programs >= wanted or _mean(p) < 4096:
        return 0
    pieces = min(-(-wanted // programs), _mean(p) // 2048)
    return max(2048, power_of_two(-(-_mean(p) // pieces)))
