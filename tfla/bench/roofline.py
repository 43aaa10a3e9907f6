"""What a call must cost: FLOPs, bytes and limits of the function and of each kernel of its plan.

A multiply-add is two FLOPs. A scan over chunks of L tokens with contraction A and output width X
costs, a token and head,

    2 L A + 2 L X + 4 A X         scores, scores times values, state out of and into the chunk

and h, dq, dk, dv are a scan each. A plan computes X in tiles that each repeat the scores, A in
slices that each repeat the product with the values, and both are filled up to whole blocks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from tfla.plan import Device, Plan, Problem
from tfla.reference import layout

L_NOMINAL = 64  # chunk of the count that is the same for every implementation
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
FP32 = 4


@dataclass(frozen=True)
class Machine:
    """Limits of a device. `source` says where its numbers are from."""

    name: str
    bytes_per_s: float
    flops_per_s: dict[str, float]  # by dtype
    source: str
    device: Device | None = None  # None: the backend "reference"


def _named(name: str, tb: float, dense: float, fp32: float, device: Device) -> Machine:
    rates = {"bfloat16": dense * 1e12, "float16": dense * 1e12, "float32": fp32 * 1e12}
    return Machine(name, tb * 1e12, rates, "datasheet, dense", device)


# From the makers' datasheets and whitepapers: TB/s; TFLOP/s of 16-bit matrix products that are
# summed in fp32, without sparsity (GeForce: half of those summed in fp16); TFLOP/s of plain fp32;
# compute capability, multiprocessors, bytes of shared memory that one program may have.
MACHINES = {
    "a100": _named("A100 SXM 80 GB", 2.039, 312.0, 19.5, Device((8, 0), 108, 166912)),
    "l40s": _named("L40S", 0.864, 362.1, 91.6, Device((8, 9), 142, 101376)),
    "4090": _named("GeForce RTX 4090", 1.008, 165.2, 82.6, Device((8, 9), 128, 101376)),
    "5090": _named("GeForce RTX 5090", 1.792, 209.5, 104.8, Device((12, 0), 170, 101376)),
    "h100": _named("H100 SXM", 3.35, 989.4, 66.9, Device((9, 0), 132, 232448)),
    "h200": _named("H200 SXM", 4.8, 989.4, 66.9, Device((9, 0), 132, 232448)),
    "b200": _named("B200 SXM", 8.0, 2250.0, 75.0, Device((10, 0), 148, 232448)),
    "mi300x": _named("MI300X", 5.3, 1307.4, 163.4, Device((0, 0), 304, 65536)),
}


def scan_flops(A: int, X: int, L: int) -> int:
    """Of one token and head."""
    return 2 * L * (A + X) + 4 * A * X


def function_flops(tokens: int, H: int, K: int, V: int, backward: bool) -> int:
    """Of h, or of h and all gradients (three more scans), at chunks of 64, no work done twice."""
    return tokens * H * scan_flops(K, V, L_NOMINAL) * (4 if backward else 1)


def attention_flops(tokens: int, T: int, H: int, D: int, backward: bool) -> int:
    """Causal: on average T / 2 keys a token, two products forward and five backward."""
    return tokens * H * 2 * D * T * (7 if backward else 2) // 2


def least_bytes(tokens: int, H: int, K: int, V: int, size: int, gates: int, backward: bool) -> int:
    """Every input read once and every output written once, forward and, with `backward`, again.

    `size`: bytes of an element of q, k, v; `gates`: bytes of all gates of a token and head.
    """
    forward = size * (2 * K + 2 * V) + gates
    return tokens * H * (forward + backward * (size * (4 * K + 3 * V) + 2 * gates))


def step_bytes(B: int, H: int, K: int, V: int, normalize: bool, size: int) -> int:
    """Of a decode step: the fp32 state read and written, the token read, h written."""
    state = FP32 * (K * V + (K + 1 if normalize else 0))
    return B * H * (2 * state + size * (2 * K + 2 * V) + 2 * FP32)


@dataclass(frozen=True)
class Kernel:
    """The launches of one name in a call. `bytes`: each operand of a launch once, to and from main
    memory; `l2_bytes`: as often as programs ask for it."""

    name: str
    backward: bool
    launches: int
    flops: int
    bytes: int
    l2_bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte of main memory."""
        return self.flops / self.bytes

    def ms(self, machine: Machine, dtype: str) -> tuple[float, float]:
        """The least time by bytes and by arithmetic."""
        return (
            self.bytes / machine.bytes_per_s * 1e3,
            self.flops / machine.flops_per_s[dtype] * 1e3,
        )


def limit_ms(kernels: list[Kernel], machine: Machine, dtype: str) -> float:
    """Kernels run one after the other, each at its own limit."""
    return sum(max(kernel.ms(machine, dtype)) for kernel in kernels)


def for_dtype(plan: Plan, dtype: torch.dtype) -> Plan:
    """The plan as calls of a dtype follow it: of fp16 the denominator has a launch of its own."""
    return dataclasses.replace(
        plan, fuse_denominator=plan.fuse_denominator and dtype != torch.float16
    )


def kernels(p: Problem, plan: Plan, normalize: bool, train: bool = True) -> list[Kernel]:
    """The kernels of a call on a GPU, gates in fp32, no initial state; forward alone if not
    `train`."""
    rows, e, g = p.N * p.H, p.bytes, 2 * FP32
    tokens = p.B * p.T * p.H
    chunks = rows * math.ceil(p.T / plan.L) if not p.packed else p.H * (p.T // plan.L + p.N)
    every = plan.checkpoint_every
    checkpoints = p.H * (p.T // every) if p.packed else rows * max(math.ceil(p.T / every) - 1, 0)
    state = plan.checkpoint_shape[0] * plan.checkpoint_shape[1] * FP32
    vector = FP32 * tokens
    n_chunk = FP32 * chunks * p.K
    fused = normalize and plan.fuse_denominator
    found: list[Kernel] = []

    def small(name: str, backward: bool, flops: int, bytes: int) -> None:
        found.append(Kernel(name, backward, 1, flops, bytes, bytes))

    def scan(name: str, dots: bool) -> None:
        tile, backward = plan.tile(name), name != "h"
        column = normalize and name in ("dq", "dk")
        flops = moved = through = 0
        filled = tile.tiles * tile.block_x
        inner = max(tile.slices - 2, 0)
        # (how many, is it the first, is it the last): K = 10^9 has 8 million slices.
        alike = [(1, True, tile.slices == 1), (inner, False, False), (tile.slices > 1, False, True)]
        for count, first, last in alike:
            width = tile.A - (tile.slices - 1) * tile.block_a if last else tile.block_a
            flops += (
                count
                * tokens
                * (
                    2 * plan.L * tile.tiles * tile.block_a
                    + filled * (2 * plan.L + 4 * tile.block_a)
                )
            )
            shared = tokens * 2 * width * e + 6 * vector  # a, b and the weights: every tile's
            own = tokens * tile.X * (e + (e if last else FP32) + (0 if first else FP32))
            if last:
                own += tokens * tile.X * e + tile.tiles * vector if dots else 0
                own += vector + n_chunk if column else 0
                own += n_chunk + 8 * vector * train if name == "h" and fused else 0
            moved += count * (shared + own)
            through += count * (tile.tiles * shared + own)
        if train:  # checkpoints: h and dv write them, dq and dk start from them
            moved += checkpoints * state
            through += checkpoints * state
        found.append(Kernel(name, backward, tile.slices, flops, moved, through))
        if plan.split_len and name in ("h", "dv"):  # at most: what has faded is not read
            flops = tokens * 2 * tile.slices * tile.block_a * tile.tiles * tile.block_x
            ends = math.ceil(p.T / plan.split_len) * rows * state
            shared, own = tokens * tile.A * e + 2 * vector, tokens * tile.X * e * tile.slices
            moved, through = shared + own + 3 * ends, tile.tiles * shared + own + 3 * ends
            launches = 2 * tile.slices
            found.append(Kernel(f"{name}: splits", backward, launches, flops, moved, through))

    if normalize:
        moved = tokens * (p.K * e + g) + 8 * vector + n_chunk + 16 * chunks
        small("sums", False, 2 * tokens * p.K, moved)
        own = 16 * vector if fused else 4 * chunks  # the vectors that wait for the gauge, or it
        small("gauge", False, 4 * chunks * p.K, 2 * n_chunk + 20 * chunks + own)
    if not fused:
        if normalize:
            moved = 2 * tokens * p.K * e + n_chunk + 15 * vector + 24 * chunks
            small("denominator", False, 2 * tokens * p.K * (plan.L + 1), moved)
        else:
            small("weights", False, 0, tokens * g + 7 * vector + 4 * chunks)
    scan("h", False)
    if not train:
        return found
    if normalize:
        with_dv = plan.h.hopper  # dh . h comes with dv
        width = p.K if with_dv else 2 * p.V + p.K
        moved = tokens * width * e + (4 + plan.h.tiles * with_dv) * vector + n_chunk
        small("column", True, tokens * (width + p.K), moved)
        small("column states", True, 4 * chunks * p.K, 2 * n_chunk)
    scan("dv", normalize and plan.h.hopper)
    scan("dq", True)
    scan("dk", True)
    moved = (2 * plan.dq.tiles + 1) * vector + 2 * tokens * g + 2 * checkpoints * state
    small("gate gradients", True, 2 * checkpoints * state // FP32, moved)
    return found


def reference_kernels(p: Problem, normalize: bool) -> list[Kernel]:
    """The scans of the backend "reference". It works in fp32 whatever the operands are; scores and
    the states of all chunks lie in memory, so its bytes are counted as torch's operators move them.
    """
    L, tokens = layout.L, p.B * p.T * p.H
    found = []
    for name, A, X in (
        *([("nu", p.K, 1)] if normalize else []),
        ("h", p.K, p.V),
        ("dv", p.K, p.V),
        ("dq", p.V, p.K),
        ("dk", p.V, p.K),
    ):
        moved = 2 * (2 * A + X) + 3 * (A + X) + 8 * L + 6 * A * X // L + 5 * X
        moved *= tokens * FP32
        backward = name not in ("nu", "h")
        found.append(Kernel(name, backward, 1, tokens * scan_flops(A, X, L), moved, moved))
    return found


# ---------------------------------------------------------------- the paper's scheme


def paper_cost(L: float, K: int, V: int, size: int) -> tuple[float, float]:
    """(FLOPs, bytes) a token and head of the forward pass of mLSTMsig at chunk L in the scheme of
    arXiv 2503.14376: one kernel writes the fp32 state of every chunk to memory, a second one reads
    it back and works inside the chunks, half of whose scores are masked away.
    """
    flops = L * (K + V) + 4 * K * V + 2 * K * V / L
    moved = size * (K + V) + size * (2 * K + 2 * V) + 4 * FP32 + 2 * FP32 * K * V / L
    return flops, moved


def paper_best_chunk(machine: Machine, dtype: str, K: int, V: int) -> float:
    """The L that makes FLOPs / rate + bytes / bandwidth of `paper_cost` least (both in full, as
    the paper adds them): sqrt(K V (2 + 8 I) / (K + V)), I the machine's FLOPs a byte."""
    intensity = machine.flops_per_s[dtype] / machine.bytes_per_s
    return math.sqrt(K * V * (2 + 2 * FP32 * intensity) / (K + V))
