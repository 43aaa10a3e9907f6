"""The scan chunk by chunk, in plain PyTorch: the backend "reference".

It runs on any device, in time and memory linear in T, in fp32 (fp64 for fp64 inputs), on chunks
that never cross a sequence. Per chunk, with the weights D of ``tfla.reference.weights``,

    P = D * (q k^T)       y = P v + w q S       nu = P 1 + w q n      h = y / max(|nu|, exp(-m))
    S' = g S + (r k)^T v                                              n likewise, with 1 for v

forward, and backward in one pass from the last chunk to the first, with dS what S' was worth,

    G = D * (dh v^T + d)    dq = G k + w (dh S^T + d n)    d: the gradient of the division
    dv = P^T dh + r k dS    dk = G^T q + r (v dS^T + dn)   dS <- g dS + (w q)^T dh

where w and r are the weights of the state for a target and of a source in the state. In a
separable chunk D_ts = w_t r_s, and all weights are in k and dh before anything is multiplied.

Dimensions: B batch, T tokens, H heads, K and V widths of q/k and v/h, L tokens of a chunk, R chunks
times heads of a block, N sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tfla import gates
from tfla.backend import ScanName
from tfla.reference.layout import Group
from tfla.reference.weights import GateWeights, saved

# A loss whose largest gradient is below this might leave the range of fp32 in a separable chunk.
LEAST = 2.0**-60

# ---------------------------------------------------------------- values between the functions


@dataclass
class Scan:
    """What a scan leaves behind. The scans of dv and dq wait for that of dk, which makes all three
    in one pass: until then theirs are not filled in."""

    operands: dict[str, Tensor | None] = field(default_factory=dict)  # of a scan that waits
    result: Tensor | None = None  # (B, T, H, X)
    final: Tensor | None = None  # (N, H, A, X) the state after the last chunk
    column: Tensor | None = None  # (N, H, X) its row that belongs to the normaliser
    dlog_i: Tensor | None = None  # (C, H, L) gradients of the log-gates, of dk
    dlog_f: Tensor | None = None

    @property
    def out(self) -> Tensor:
        assert self.result is not None, "the scans of dv and dq are made with that of dk"
        return self.result


class NormalizerGrad(NamedTuple):
    """The normaliser's share of the backward pass: a column more, [dh | d] . [v | 1]."""

    d: Tensor  # (C, H, L) -sign(nu) (dh . h) where the normaliser is active, else 0
    n: Tensor | None  # (N, H, K) entering the forward scan
    dn: Tensor | None  # (N, H, K) entering the reverse scan


def normalizer_grad(
    dh: Tensor, h: Tensor, q: Tensor, n: Tensor | None, weights: GateWeights, dv: Scan | None
) -> NormalizerGrad:
    """The gradient of the division. dh, h: (B, T, H, V). n: (N, H, K) or None. dv: its scan."""
    layout, dtype = weights.layout, weights.dtype
    d = weights.floor.new_empty(weights.floor.shape)
    if layout.rows is None:
        for group in layout.groups:
            for block in group.blocks:
                both = (layout.view(x, block).to(dtype) for x in (dh, h))
                dot = torch.mul(*both).sum(-1).flatten(0, 1)
                d[block.chunks, :, : block.size] = dot
                d[block.chunks, :, block.size :] = 0.0
    else:
        d = layout.chunks_of((dh.to(dtype) * h.to(dtype)).sum(-1), dtype)
    nu = layout.chunks_of(saved(weights), dtype)
    return NormalizerGrad(torch.where(nu.abs() > weights.floor, -nu.sign() * d, 0.0), n, None)


def with_final_grad(
    column: NormalizerGrad, dn: Tensor | None, weights: GateWeights
) -> NormalizerGrad:
    """With dn (N, H, K), what the final n was worth, for the scan of dk."""
    return column._replace(dn=dn)


def initial_state_decay(
    weights: GateWeights, column: NormalizerGrad | None, first: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(B, T, H) each: the weight of a sequence's initial state at its tokens, exp(b_t + m_0 - m_t)
    scale / den_t, and d of the column. first: (1,) the only sequence that matters, if packed."""
    layout, spec, weight = weights.layout, weights.spec, weights.target.clone()
    before = weights.enter[: len(layout.lengths)].clone()
    for start, number in zip(layout.starts, layout.counts, strict=True):
        chunk = slice(start, start + number)
        weight[chunk].mul_(before[:number, :, None])
        before[:number] *= weights.carry[chunk]
    d = None if column is None else layout.tokens_of(column.d, spec.B, spec.T)
    return layout.tokens_of(weight, spec.B, spec.T), d


# ---------------------------------------------------------------- the scan


def scan(
    name: ScanName,
    a: Tensor,
    b: Tensor,
    x: Tensor,
    weights: GateWeights,
    state: Tensor | None = None,
    *,
    column: NormalizerGrad | None = None,
    dot: Tensor | None = None,
    final: bool = True,
) -> Scan:
    """The primitive: every output and every gradient of every variant is one call.

        out_t = sum_{s<=t} D_ts (a_t . b_s) x_s + w_t a_t^T S_0  D_ts = exp(p_s - M_t) scale / den_t
        out_s = sum_{t>=s} D_ts (a_s . b_t) x_t + w_s a_s^T S_T  reverse: the same D, other index

    name: which of the calls this is: "h", "dv", "dq" or "dk"; dv and dk run in reverse.
    a, b: (B, T, H, A). x: (B, T, H, X), dtype of out. state: (N, H, A, X) or None. column: part of
    the contraction. dot: (B, T, H, X), for gate gradients; h with dv, which may return dh . h (not
    here). final: is the state after the last chunk wanted?

    Those of dv and dq return at once and are filled in by that of dk, which is always the last.
    """
    if name == "h":
        return _forward(a, b, x, weights, state, final)
    if name == "dv":
        weights.waiting["dv"] = Scan({"q": b, "dC": state})
        return weights.waiting["dv"]
    if name == "dq":
        weights.waiting["dq"] = Scan({"C": None if state is None else state.mT})
        return weights.waiting["dq"]
    dv, dq = weights.waiting.pop("dv"), weights.waiting.pop("dq")
    C, dC = dq.operands["C"], dv.operands["dC"]
    tensors = _Backward(x, dot, a, b, C, dC, column)  # type: ignore[arg-type]
    return _backward(tensors, weights, dq, dv)


def initial_gradients(dv: Scan, dk: Scan) -> tuple[Tensor, Tensor | None]:
    """(dC_0, dn_0): what the reverse scans leave at the start of the sequences."""
    assert dv.final is not None
    return dv.final, dk.column


def gate_gradients(
    i: Tensor,
    f: Tensor,
    dq: Scan,
    dk: Scan,
    weights: GateWeights,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor]:
    """(di, df) of (B, T, H), computed in fp32 (fp64), in these dtypes.

    With G_rs = D_rs (q_r . k_s) (dh_r . v_s + d_r), what flows from token s to token r,
    dlog_i_s = sum_{r>=s} G_rs = k_s . dk_s and dlog_f_t = sum_{r>=t>s} G_rs, summed as it stands:
    as a difference of sums, q . dq - k . dk, it is lost where the gates forget."""
    assert dk.dlog_i is not None and dk.dlog_f is not None
    spec = weights.spec
    dlog_i, dlog_f = (weights.layout.tokens_of(x, spec.B, spec.T) for x in (dk.dlog_i, dk.dlog_f))
    i, f = i.to(weights.dtype), f.to(weights.dtype)
    di, df = gates.gate_gradients(dlog_i, dlog_f, i, f, spec.activations)
    return di.to(dtypes[0]).contiguous(), df.to(dtypes[1]).contiguous()


# ---------------------------------------------------------------- states along the chunks


class _State(NamedTuple):
    """The states of the heads of a group, or their gradients, beside the chunks of a block. None is
    a state of zeros."""

    C: Tensor | None  # (R, K, V)
    n: Tensor | None  # (R, K, 1)

    def rows(self, start: int, stop: int | None) -> _State:
        return _State(*(None if x is None else x[start:stop] for x in self))

    @staticmethod
    def of(C: Tensor | None, n: Tensor | None, group: Group, weights: GateWeights) -> _State:
        """Of the sequences of a group, from (N, H, ...) by sequence."""
        by_place = weights.layout.by_place
        C, n = (None if x is None else by_place(x)[group.places].flatten(0, 1) for x in (C, n))
        return _State(C, None if n is None else n[..., None])

    def times(self, factor: Tensor) -> _State:
        """factor: (R,)."""
        return _State(*(None if x is None else x * factor[:, None, None] for x in self))

    def put(self, C: Tensor | None, n: Tensor | None, group: Group) -> None:
        """Into (N, H, ...) by place; zeros where there is no state: sequences of no tokens."""
        for x, out in ((self.C, C), (self.n, n)):
            if out is None:
                continue
            part = out[group.places].flatten(0, 1)
            known = 0 if x is None else len(x)
            part[known:].zero_()
            if x is not None:
                part[:known].copy_(x.view(part[:known].shape))


def _joined(x: Tensor | None, more: Tensor | None, rows: int) -> Tensor | None:
    """x, then those of ``more`` from ``rows`` on, which have no part in the block."""
    if x is None or more is None or len(more) == rows:
        return x
    return torch.cat([x, more[rows:]])


def _added(S: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """S + k^T v, in place. A product of one column is slower than a sum."""
    if v.shape[-1] > 1:
        return torch.bmm(k.mT, v) if S is None else S.baddbmm_(k.mT, v)
    total = (k * v).sum(-2)[..., None]
    return total if S is None else S.add_(total)


def _next(S: Tensor | None, k: Tensor, v: Tensor, weight: Tensor, separable: bool) -> Tensor:
    """The state behind a chunk, in place of that before it. k, with its weights: (R, L, K). v:
    (R, L, V). weight: (1, R) of a state for the next one; of a separable chunk also of what the
    chunk adds."""
    weight = weight.view(-1, 1, 1)
    if separable:
        return _added(S, k, v).mul_(weight)
    return _added(None if S is None else _kept(S, weight).mul_(weight), k, v)


def _next_of(
    S: Tensor | None, k: Tensor, v: Tensor, weight: Tensor, separable: bool
) -> tuple[Tensor | None, Tensor]:
    """(S, the state behind the chunk), which does not take its place."""
    return S, _next(None if S is None else S.clone(), k, v, weight, separable)


def _before(worth: Tensor | None, q: Tensor, dh: Tensor, weight: Tensor, separable: bool) -> Tensor:
    """What the state before a chunk was worth, in place of what the chunk's k^T v was. dh has its
    weights."""
    if worth is not None and not separable:
        worth = _kept(worth, weight.view(-1, 1, 1)).mul_(weight.view(-1, 1, 1))
    return _added(worth, q, dh)


def _walk(
    S: Tensor | None, k: Tensor, v: Tensor, weight: Tensor, separable: bool
) -> tuple[Tensor, Tensor]:
    """The same along several chunks: (the states that enter each, that behind the last). weight:
    (number, rows)."""
    number, rows = weight.shape
    weight = weight.view(number, rows, 1, 1)
    after = _added(None, k, v).view(number, rows, k.shape[-1], v.shape[-1])
    before = S
    for c in range(number):
        if separable:
            if before is not None:
                after[c].add_(before)
            after[c].mul_(weight[c])
        elif before is not None:
            after[c].addcmul_(_kept(before, weight[c]), weight[c])
        before = after[c]
    first = torch.zeros_like(after[0]) if S is None else S
    return torch.cat([first[None], after[:-1]]).flatten(0, 1), after[-1]


def _walk_back(
    dS: Tensor | None, q: Tensor, dh: Tensor, weight: Tensor, separable: bool
) -> tuple[Tensor, Tensor]:
    """The same in reverse: (what each chunk's k^T v was worth, what the state before the first
    was). dh has its weights."""
    number, rows = weight.shape
    weight = weight.view(number, rows, 1, 1)
    before = _added(None, q, dh).view(number, rows, q.shape[-1], dh.shape[-1])
    worth = torch.empty_like(before)
    for c in reversed(range(number)):
        if dS is None:
            worth[c].zero_()
        elif separable:
            torch.mul(dS, weight[c], out=worth[c])
            before[c].add_(worth[c])
        else:
            worth[c].copy_(dS)
            before[c].addcmul_(_kept(dS, weight[c]), weight[c])
        dS = before[c]
    return worth.flatten(0, 1), before[0]


def _ones(x: Tensor) -> Tensor:
    """(R, L, X) -> (R, L, 1), what the normaliser has in the place of v."""
    return x.new_ones(1, 1, 1).expand(*x.shape[:-1], 1)


def _kept(S: Tensor, weight: Tensor) -> Tensor:
    """S, and 0 where it weighs nothing, whatever it is."""
    if S.device.type == "cpu" and weight.all():
        return S
    return S.masked_fill(weight == 0.0, 0.0)


# ---------------------------------------------------------------- products


def _product(weights: Tensor, x: Tensor, select: bool) -> Tensor:
    """weights (R, L, L) times x (R, L, X). select: what has a weight of 0 is 0, also where x is not
    finite."""
    if not select:
        return weights @ x
    bad = ~x.isfinite()
    reached = (weights != 0.0).to(x.dtype) @ bad.to(x.dtype) > 0.0
    return torch.where(reached, weights @ x, weights @ x.masked_fill(bad, 0.0))


def _weighted(x: Tensor, weight: Tensor, select: bool) -> Tensor:
    """x times weight, in place, and 0 where that is 0."""
    x.mul_(weight)
    return x.masked_fill_(weight == 0.0, 0.0) if select else x


def _is_finite(*tensors: Tensor | None) -> bool:
    """Nothing is inf or NaN (a sum may overflow too, which costs time only). Devices are not asked,
    and where there are no values they are finite."""
    return all(
        x is None or x.is_meta or (x.device.type == "cpu" and math.isfinite(x.sum()))
        for x in tensors
    )


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """(R, L, D) twice -> (R, L)."""
    return (a * b).sum(-1)


def _crossing(flow: Tensor) -> Tensor:
    """What flows across the border before each token t: sum_{r>=t>s} flow_rs. flow: (R, L, L), 0
    above the diagonal."""
    up_to = flow.cumsum(-1)  # faster than a product with ones
    return pad(up_to.tril_(-1).sum(-2)[:, :-1], (1, 0))


# ---------------------------------------------------------------- forward


def _forward(
    q: Tensor, k: Tensor, v: Tensor, weights: GateWeights, C: Tensor | None, final: bool
) -> Scan:
    found = _forward_pass(q, k, v, weights, C, final)
    if found is None:  # not finite, or it overflowed
        weights.separate_nothing()
        found = _forward_pass(q, k, v, weights, C, final)
    assert found is not None
    return found


def _forward_pass(
    q: Tensor, k: Tensor, v: Tensor, weights: GateWeights, C: Tensor | None, final: bool
) -> Scan | None:
    """h, the final state, and nu (which goes to ``weights``). None if what the separable chunks
    gave is not finite."""
    layout, spec, dtype = weights.layout, weights.spec, weights.dtype
    N, H, K, V = spec.N, spec.H, spec.K, spec.V
    out = layout.outputs(v, spec.B, spec.T)
    nu = torch.empty_like(weights.floor) if spec.normalize else None
    C_T = weights.floor.new_empty(N, H, K, V) if final else None
    n_T = weights.floor.new_empty(N, H, K) if spec.normalize else None
    for group, separable in zip(layout.groups, weights.separable, strict=True):
        S = _State.of(C, weights.n, group, weights).times(weights.entering(group))
        sums = []
        for block, simple in zip(group.blocks, separable, strict=True):
            rows = (block.places.stop - block.places.start) * H
            r = layout.of_block(weights.source, block)
            w = layout.of_block(weights.target, block)
            q_, v_ = (layout.operand(x, dtype, block) for x in (q, v))
            k_ = layout.operand(k, dtype, block, r if simple else None)
            kr = k_ if simple else k_ * r[..., None]
            weight = weights.carried(block)
            active = S.rows(0, rows)
            before_C, before_n, C_after, n_after = *active, None, None
            needed = final or block is not group.blocks[-1]
            if block.number > 1:
                before_C, C_after = _walk(before_C, kr, v_, weight, simple)
                if spec.normalize:
                    before_n, n_after = _walk(before_n, kr, _ones(kr), weight, simple)
            states = _State(before_C, before_n)
            if simple:
                y, d = _separable_outputs(q_, k_, v_, states, spec.normalize)
                sums.append(y.sum())
                if d is None:
                    layout.store(y, out, block, w)
                else:
                    d = d.mul_(w)
                    factor = w / torch.maximum(d.abs(), layout.of_block(weights.floor, block))
                    sums.append(factor.sum())
                    layout.store(y, out, block, factor)
            else:
                D = weights.between(block)
                y, d = _outputs(q_, k_, v_, states, D, w, spec.normalize, False)
                if not _is_finite(y):
                    y, d = _outputs(q_, k_, v_, states, D, w, spec.normalize, True)
                if d is not None:
                    den = torch.maximum(d.abs(), layout.of_block(weights.floor, block))
                    y.div_(den[..., None])
                layout.store(y, out, block)
            if d is not None and nu is not None:
                nu[block.chunks, :, : block.size] = d.view(-1, H, block.size)
            if block.number == 1 and needed:
                C_after = _next(before_C, kr, v_, weight, simple)
            if block.number == 1 and spec.normalize:
                n_after = _next(before_n, kr, _ones(kr), weight, simple)
            S = _State(_joined(C_after, S.C, rows), _joined(n_after, S.n, rows))
        if any(separable) and not _is_finite(torch.stack(sums), S.C, S.n):
            return None
        S.put(C_T, n_T, group)
    if nu is not None and n_T is not None:
        weights.nu = layout.tokens_of(nu, spec.B, spec.T).contiguous()
        weights.n_final = layout.by_sequence(n_T)
    last = None if C_T is None else layout.by_sequence(C_T)
    return Scan(result=out[:, : spec.T], final=last)


def _separable_outputs(
    q: Tensor, k: Tensor, v: Tensor, states: _State, normalize: bool
) -> tuple[Tensor, Tensor | None]:
    """(y (R, L, V), nu (R, L) if normalised) of a separable block, but for the targets' weights. k
    has those of the sources."""
    P = torch.bmm(q, k.mT).tril_()
    y, nu = torch.bmm(P, v), P.sum(-1) if normalize else None
    if states.C is not None:
        y.baddbmm_(q, states.C)
    if nu is not None and states.n is not None:
        nu.add_((q * states.n.mT).sum(-1))
    return y, nu


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: _State,
    D: Tensor,
    w: Tensor,
    normalize: bool,
    select: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same of any block, with all weights. select: what has a weight of 0 is 0, also where it
    is not finite."""
    P = torch.bmm(q, k.mT).mul_(D)
    if select:
        P.masked_fill_(D == 0.0, 0.0)
    y, nu = _product(P, v, select), P.sum(-1) if normalize else None
    if states.C is not None:
        y.add_(_weighted(torch.bmm(q, states.C), w[..., None], select))
    if nu is not None and states.n is not None:
        from_n = (q * states.n.mT).sum(-1)
        nu.add_(_weighted(from_n, w, select))
    return y, nu


# ---------------------------------------------------------------- backward


class _Backward(NamedTuple):
    """What the backward pass reads."""

    q: Tensor  # (B, T, H, K)
    k: Tensor
    v: Tensor  # (B, T, H, V)
    dh: Tensor
    C: Tensor | None  # (N, H, K, V) the initial state
    dC: Tensor | None  # (N, H, K, V) what the final state was worth
    column: NormalizerGrad | None


class _Grads(NamedTuple):
    """Gradients of a block, all (R, L, ...). dots: the share of the state in q . dq and k . dk."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dot_q: Tensor | None
    dot_k: Tensor | None
    flow: Tensor  # (R, L, L) from s (column) to r


def _backward(t: _Backward, weights: GateWeights, dq: Scan, dv: Scan) -> Scan:
    """The scan of dk; fills in those of dq and dv."""
    if _least(t.dh) or not (dk := _backward_pass(t, weights, dq, dv)):
        weights.separate_nothing()
        dk = _backward_pass(t, weights, dq, dv)
    assert dk is not None
    return dk


def _backward_pass(t: _Backward, weights: GateWeights, dq: Scan, dv: Scan) -> Scan | None:
    """As ``_forward_pass``."""
    layout, spec, dtype = weights.layout, weights.spec, weights.dtype
    B, T, N, H, K, V = spec.B, spec.T, spec.N, spec.H, spec.K, spec.V
    dq_, dk_, dv_ = (layout.outputs(x, B, T) for x in (t.q, t.k, t.v))
    dlog_i, dlog_f = torch.empty_like(weights.floor), torch.empty_like(weights.floor)
    dC_0 = None if t.C is None else weights.floor.new_zeros(N, H, K, V)
    dn_0 = None if t.C is None or t.column is None else weights.floor.new_zeros(N, H, K)
    n, dn, d = (None, None, None) if t.column is None else (t.column.n, t.column.dn, t.column.d)
    dC = t.dC if t.dC is not None or dn is None else weights.floor.new_zeros(N, H, K, V)
    for group, separable in zip(layout.groups, weights.separable, strict=True):
        entering = _entering(t, weights, n, group, separable)
        ends = _State.of(dC, dn, group, weights)
        dS, sums = ends.rows(0, 0), []
        for block, simple, states in zip(
            reversed(group.blocks), reversed(separable), reversed(entering), strict=True
        ):
            rows = (block.places.stop - block.places.start) * H
            dS = _grown(dS, ends, rows)
            r = layout.of_block(weights.source, block)
            w = layout.of_block(weights.target, block)
            weight = weights.carried(block)
            q, v = (layout.operand(x, dtype, block) for x in (t.q, t.v))
            k = layout.operand(t.k, dtype, block, r if simple else None)
            dh = layout.operand(t.dh, dtype, block, w if simple else None)
            d_ = None if d is None else layout.of_block(d, block)
            wd = None if d_ is None else d_ * w
            wdh = dh if simple else dh * w[..., None]
            before_C, before_n = None, None
            worth = dS
            if block.number > 1:
                worth_C, before_C = _walk_back(dS.C, q, wdh, weight, simple)
                worth_n = None
                if wd is not None:
                    worth_n, before_n = _walk_back(dS.n, q, wd[..., None], weight, simple)
                worth = _State(worth_C, worth_n)
            elif simple:
                worth = _State(*(None if x is None else x.mul_(weight.view(-1, 1, 1)) for x in dS))
            if simple:
                g = _separable_gradients(q, k, v, dh, wd, states, worth)
                sums += [g.dq.sum(), g.dk.sum(), g.dv.sum()]
                layout.store(g.dk, dk_, block, r)
            else:
                of_block = _Weights(weights.between(block), w, r)
                operands = q, k, v, dh, d_, states, worth, of_block
                g = _gradients(*operands, select=False)
                if not _is_finite(g.dq, g.dk, g.dv):
                    g = _gradients(*operands, select=True)
                layout.store(g.dk, dk_, block)
            layout.store(g.dq, dq_, block)
            layout.store(g.dv, dv_, block)
            di, df = _log_gate_gradients(g, _through(states, worth, weight, simple))
            dlog_i[block.chunks, :, : block.size] = di.view(-1, H, block.size)
            dlog_f[block.chunks, :, : block.size] = df.view(-1, H, block.size)
            if simple:
                sums.append(df.sum())
            if block.number == 1:
                before_C = _before(worth.C, q, wdh, weight, simple)
                if wd is not None:
                    before_n = _before(worth.n, q, wd[..., None], weight, simple)
            dS = _State(before_C, before_n)
        dS = _grown(dS, ends, (group.places.stop - group.places.start) * H)
        if sums and not _is_finite(torch.stack(sums), dS.C, dS.n):
            return None
        if dC_0 is not None:
            dS.times(weights.entering(group)).put(dC_0, dn_0, group)
    dq.result, dv.result = dq_[:, :T], dv_[:, :T]
    dv.final = None if dC_0 is None else layout.by_sequence(dC_0)
    column = None if dn_0 is None else layout.by_sequence(dn_0)
    return Scan(result=dk_[:, :T], column=column, dlog_i=dlog_i, dlog_f=dlog_f)


def _entering(
    t: _Backward, weights: GateWeights, n: Tensor | None, group: Group, separable: list[bool]
) -> list[_State]:
    """The states that enter the chunks of each block of a group, once more."""
    layout, dtype, H = weights.layout, weights.dtype, weights.spec.H
    S, found = _State.of(t.C, n, group, weights).times(weights.entering(group)), []
    for block, simple in zip(group.blocks, separable, strict=True):
        rows = (block.places.stop - block.places.start) * H
        active = S.rows(0, rows)
        if block is group.blocks[-1] and block.number == 1:  # what follows is not needed
            found.append(active)
            break
        k = layout.operand(t.k, dtype, block, layout.of_block(weights.source, block))
        v, weight = layout.operand(t.v, dtype, block), weights.carried(block)
        advance = _walk if block.number > 1 else _next_of
        C, C_after = advance(active.C, k, v, weight, simple)
        n_, n_after = None, None
        if t.column is not None:
            n_, n_after = advance(active.n, k, _ones(k), weight, simple)
        found.append(_State(C, n_))
        S = _State(C_after, n_after)
    return found


def _grown(dS: _State, ends: _State, rows: int) -> _State:
    """dS of ``rows`` heads: those that it has not yet end here."""
    parts = []
    for x, end in zip(dS, ends, strict=True):
        if x is None or len(x) == 0:
            parts.append(None if end is None else end[:rows].clone())
        elif len(x) < rows:
            more = x.new_zeros(rows - len(x), *x.shape[1:]) if end is None else end[len(x) : rows]
            parts.append(torch.cat([x, more]))
        else:
            parts.append(x)
    return _State(*parts)


def _least(dh: Tensor) -> bool:
    """Might separable weights take dh out of its range? Other devices are not asked."""
    if dh.device.type != "cpu" or dh.numel() == 0:
        return False
    most = max(-dh.amin().item(), dh.amax().item())
    return 0.0 < most < LEAST


def _separable_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dh: Tensor,
    d: Tensor | None,
    states: _State,
    worth: _State,
) -> _Grads:
    """Of a separable block; k, dh and d have their weights, and dk lacks that of k."""
    P = torch.bmm(q, k.mT).tril_()
    G = torch.bmm(dh, v.mT) if d is None else torch.baddbmm(d[..., None], dh, v.mT)
    G.tril_()
    dot_q, dot_k = None, None
    dv = torch.bmm(P.mT, dh)
    if states.C is None:
        dq = torch.bmm(G, k)
    else:
        dq = torch.bmm(dh, states.C.mT)
        if d is not None and states.n is not None:
            dq.addcmul_(d[..., None], states.n.mT)
        dot_q = _dots(dq, q)
        dq.baddbmm_(G, k)
    if worth.C is None:
        dk = torch.bmm(G.mT, q)
    else:
        dv.baddbmm_(k, worth.C)
        dk = torch.bmm(v, worth.C.mT)
        if worth.n is not None:
            dk.add_(worth.n.mT)
        dot_k = _dots(dk, k)
        dk.baddbmm_(G.mT, q)
    return _Grads(dq, dk, dv, dot_q, dot_k, P.mul_(G))


class _Weights(NamedTuple):
    """Of a block: D (R, L, L), w of a target and r of a source in the state, (R, L)."""

    D: Tensor
    w: Tensor
    r: Tensor


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dh: Tensor,
    d: Tensor | None,
    states: _State,
    worth: _State,
    weights: _Weights,
    *,
    select: bool,
) -> _Grads:
    """Of any block, from operands without weights. select: as in ``_outputs``."""
    D, w, r = weights
    none = D == 0.0
    scores = torch.bmm(q, k.mT)
    G = torch.bmm(dh, v.mT)
    G = (G if d is None else G.add_(d[..., None])).mul_(D)
    flow, P = scores * G, scores.mul_(D)
    if select:
        G.masked_fill_(none, 0.0)
        P.masked_fill_(none, 0.0)
    flow.masked_fill_(G == 0.0, 0.0)
    dq, dk, dv = _product(G, k, select), _product(G.mT, q, select), _product(P.mT, dh, select)
    dot_q, dot_k = None, None
    if states.C is not None:
        from_state = torch.bmm(dh, states.C.mT)
        if d is not None and states.n is not None:
            from_state.addcmul_(d[..., None], states.n.mT)
        from_state = _weighted(from_state, w[..., None], select)
        dot_q = _dots(from_state, q)
        dq.add_(from_state)
    if worth.C is not None:
        dv.add_(_weighted(torch.bmm(k, worth.C), r[..., None], select))
        from_state = torch.bmm(v, worth.C.mT)
        if worth.n is not None:
            from_state.add_(worth.n.mT)
        from_state = _weighted(from_state, r[..., None], select)
        dot_k = _dots(from_state, k)
        dk.add_(from_state)
    return _Grads(dq, dk, dv, dot_q, dot_k, flow)


def _through(states: _State, worth: _State, weight: Tensor, separable: bool) -> Tensor | None:
    """(R,) what flows through each chunk, from before it to behind it."""
    if states.C is None or worth.C is None:
        return None
    found = (states.C * worth.C).sum((-2, -1))
    if states.n is not None and worth.n is not None:
        found.add_((states.n * worth.n).sum((-2, -1)))
    if separable:
        return found
    weight = weight.flatten()
    return found.mul_(weight).masked_fill_(weight == 0.0, 0.0)


def _log_gate_gradients(g: _Grads, through: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dlog_i, dlog_f) of a block, (R, L)."""
    dlog_i, dlog_f = g.flow.sum(-2), _crossing(g.flow)
    if g.dot_k is not None:
        dlog_i += g.dot_k
        dlog_f[:, 1:] += g.dot_k[:, :-1].cumsum(-1)
    if g.dot_q is not None:
        dlog_f += g.dot_q.flip(-1).cumsum(-1).flip(-1)
    return dlog_i, dlog_f if through is None else dlog_f.add_(through[:, None])
