"""The weights of tokens for each other, chunk by chunk: all that a scan knows of gates.

Token s reaches a later token t of its chunk with weight D_ts = 2^(p_s + b_t) (``tfla.gates``; here
logarithms are binary). Where the gates of a chunk are ordinary, D is a product of two factors,

    D_ts = 2^(p_s + h) 2^(b_t - h)              h whole, in the middle of all b

which is as exact, for both are far from the ends of fp32, and saves all work on the L^2 numbers of
D but one. The state that enters such a *separable* chunk is kept times 2^h. In other chunks h = 0
and D is made as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfla import gates
from tfla.dtypes import state_dtype
from tfla.reference import layout as chunks
from tfla.reference.layout import Block, ChunkLayout, Group
from tfla.spec import CallSpec, Inputs

# Of a separable chunk, the largest |p + h| and |b - h|. Products with the least and the largest
# number of a loss are to stay within fp32: 2^40 leaves it from 2^-86 (1e-26) to 2^87 (2e26).
SEPARABLE = 40.0
# Of a separable chunk, the largest weight of a target with 1 / den in it.
LARGEST = 2.0**100
# A source below this has no share in anything: it may weigh 0 for a weight that is not.
NOTHING = -120.0
# Scales of q (and of losses) that leave separable weights within fp32.
ORDINARY = (2.0**-60, 2.0**60)


@dataclass
class GateWeights:
    """The weights of a call. Tensors of tokens are (C, H, L), those of chunks (C, H), in the dtype
    of states. What belongs to a target has scale / den in it once the scan of h has found nu."""

    spec: CallSpec
    layout: ChunkLayout
    separable: list[list[bool]]  # of each block of each group
    source: Tensor  # what a source weighs: 2^(p + h); else in the state after its chunk
    target: Tensor  # what it weighs for a target: 2^(b - h), which is also the weight of the state
    carry: Tensor  # weight of the state that enters a chunk for the one that enters the next
    enter: Tensor  # (C, H) 2^h
    # p and -b, whole, and 2^p and 2^b of the rests; None where all blocks are separable.
    between_exponents: tuple[Tensor, Tensor] | None
    between_factors: tuple[Tensor, Tensor] | None
    floor: Tensor  # exp(-m_t), the least denominator
    n: Tensor | None  # (N, H, K) of the initial state
    nu: Tensor | None  # (B, T, H) n_t . scale q_t
    m_final: Tensor  # (N, H)
    again: Callable[[], GateWeights]  # the same weights with no block separable
    n_final: Tensor | None = None  # (N, H, K)
    waiting: dict[str, Any] = field(default_factory=dict)  # scans that another one will make

    @property
    def dtype(self) -> torch.dtype:
        return state_dtype(self.spec.dtype)

    def between(self, block: Block) -> Tensor:
        """D of a block, (R, L, L). Powers of whole numbers are exact, and so are their differences.
        Select s <= t last: beyond the diagonal there may be anything."""
        assert self.between_exponents is not None and self.between_factors is not None
        source, target = (self.layout.of_block(x, block) for x in self.between_exponents)
        D = (source[:, None, :] - target[:, :, None]).exp2_()
        source, target = (self.layout.of_block(x, block) for x in self.between_factors)
        return D.mul_(source[:, None, :]).mul_(target[:, :, None]).tril_()

    def carried(self, block: Block) -> Tensor:
        """``carry`` of a block, (number, sequences * H)."""
        return self.carry[block.chunks].reshape(block.number, -1)

    def entering(self, group: Group) -> Tensor:
        """(sequences * H,) what the initial states of a group are kept times."""
        enter = self.enter.new_ones(len(self.layout.lengths), self.spec.H)
        first = self.layout.counts[0] if self.layout.counts else 0
        enter[:first] = self.enter[:first]
        return enter[group.places].flatten()

    def separate_nothing(self) -> None:
        """Turn all blocks into ones that are not separable."""
        if any(map(any, self.separable)):
            self.__dict__.update(vars(self.again()))


def gate_weights(
    x: Inputs,
    spec: CallSpec,
    saved: Tensor | None = None,
    may_separate: bool = True,
) -> GateWeights:
    """The weights of every chunk. saved: nu, (B, T, H), of an earlier call, or None."""
    q, i, f, n, m = x.q, x.i, x.f, x.n, x.m
    B, T, H, scale, normalize = spec.B, spec.T, spec.H, spec.scale, spec.normalize
    width = max(spec.K, spec.V)
    layout = ChunkLayout.make(B, T, H, x.cu_seqlens, width, q.device, chunks.L)
    dtype, N = state_dtype(spec.dtype), spec.N
    host = q.device if q.device.type != "mps" else torch.device("cpu")  # MPS has no fp64
    log_i, log_f = gates.log_gates(i.to(host, dtype), f.to(host, dtype), spec.activations)
    e = gates.exponents(
        layout.chunks_of(log_i, torch.float64, gates.LOG_I_NOTHING),
        layout.chunks_of(log_f, torch.float64),
        None if m is None else layout.by_place(m).to(host),
        layout.steps(),
        N,
        normalize,
        dtype,
    )
    low, high = ORDINARY
    p, b = e.source, -e.target  # whole powers and rests: the wholes are added first, exactly
    h, separable = _separable(layout, p[0], b[0], may_separate and low < scale < high)
    behind = torch.zeros_like(h)  # h of the next chunk
    for c in range(1, len(layout.counts)):
        here, start, count = layout.starts[c], layout.starts[c - 1], layout.counts[c]
        behind[start : start + count] = h[here : here + count]
    simple = all(map(all, separable))
    source = p[0] + h[..., None] + p[1]
    if not simple:  # there, what a source weighs in the next chunk's state
        after = p[0] + (e.end[0] + behind)[..., None] + (p[1] + e.end[1][..., None])
        source = torch.where(_spread(layout, separable, h)[..., None], source, after)

    def put(x: Tensor) -> Tensor:
        return x.to(q.device, dtype)

    info = torch.finfo(dtype)
    floor = put(gates.exp(gates.pair(-e.m * gates.LOG2E)).clamp(info.tiny, info.max))
    target = put((b[0] - h[..., None] + b[1]).exp2_().mul_(scale))
    factor = target if simple else put(b[1].exp2() * scale)
    if saved is not None and normalize:
        den = torch.maximum(layout.chunks_of(saved, dtype).abs(), floor)
        # Of a token that weighs nothing, but finite: 1 / den may be 2^126, and inf times 0 is NaN.
        factor, target = ((x / den).clamp(max=info.max / 4) for x in (factor, target))
        large = target.device.type == "cpu" and not (target < LARGEST).all()
        if any(map(any, separable)) and large:
            return gate_weights(x, spec, saved, may_separate=False)
    return GateWeights(
        spec,
        layout,
        separable,
        source=put(source.exp2_()),
        target=target,
        carry=put((e.end[0] - h + behind + e.end[1]).exp2()),
        enter=put(h.exp2()),
        between_exponents=None if simple else (put(p[0]), put(-b[0])),
        between_factors=None if simple else (put(p[1].exp2()), factor),
        floor=floor,
        n=n,
        nu=saved if normalize else None,
        m_final=layout.by_sequence(put(e.m_final)),
        again=partial(gate_weights, x, spec, saved, may_separate=False),
    )


def _separable(
    layout: ChunkLayout, p: Tensor, b: Tensor, may_separate: bool
) -> tuple[Tensor, list[list[bool]]]:
    """(h (C, H), which blocks are separable). Other devices are not asked for values; where there
    are none, as where memory is counted, gates are ordinary."""
    h = torch.zeros_like(b[..., 0])
    no = [[False] * len(group.blocks) for group in layout.groups]
    if b.device.type not in ("cpu", "meta") or not may_separate:
        return h, no
    least, most = b.aminmax(dim=-1)
    half = ((least + most) / 2).round()
    source = p + half[..., None]
    least, most = least - half, torch.maximum(most - half, source.amax(-1))
    weak = ((source < NOTHING) & (p > gates.NOTHING / 2)).any(-1)
    fits = (least >= -SEPARABLE) & (most <= SEPARABLE) & ~weak
    if b.is_meta or fits.all():
        return half, [[True] * len(group.blocks) for group in layout.groups]
    chunk_fits = fits.all(-1)
    found = [
        [bool(chunk_fits[block.chunks].all()) for block in group.blocks] for group in layout.groups
    ]
    return torch.where(_spread(layout, found, h), half, 0.0), found


def _spread(layout: ChunkLayout, separable: list[list[bool]], like: Tensor) -> Tensor:
    """(C, H) bool from what holds of the blocks."""
    out = torch.zeros_like(like, dtype=torch.bool)
    for group, found in zip(layout.groups, separable, strict=True):
        for block, value in zip(group.blocks, found, strict=True):
            out[block.chunks] = value
    return out


def saved(weights: GateWeights) -> Tensor:
    """What the backward pass needs of the forward's weights: nu, (B, T, H)."""
    return weights.carry.new_empty(0) if weights.nu is None else weights.nu


def saved_shape(spec: CallSpec) -> tuple[int, ...]:
    """The shape that ``saved`` will have."""
    return (spec.B, spec.T, spec.H) if spec.normalize else (0,)
