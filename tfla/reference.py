"""The truth and the CPU backend: the recurrence token by token, and the scan chunk by chunk.

``recurrence`` is the specification (run it in fp64). The rest is the backend "reference" in plain
PyTorch, with the functions of ``tfla.backend``. It runs on any device, in time and memory linear in
T, in fp32 (fp64 for fp64 inputs), on chunks that never cross a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tfla import gates
from tfla.backend import Exchange, Results, ScanName
from tfla.gates import Activations
from tfla.offsets import check_offsets
from tfla.spec import CallSpec, Inputs

# Tokens a chunk. On a CPU (AVX2, heads of 64) chunks of 32 and 128 take 1.5 and 1.4 times as long.
L = 64
# Numbers in each matrix of the chunks that are worked on at once: few enough that memory is reused
# (1.6 times as fast at 65,536 tokens as all at once), enough that threads meet rarely.
BLOCK = 2**20


# ---------------------------------------------------------------- the specification


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    scale: float,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One token of the recurrence, in the dtype of the operands; n, m are None when not normalised.
    ``inplace``: C' lies where C lay.

        m' = max(log_f + m, log_i)
        C' = exp(log_f + m - m') C + exp(log_i - m') k v^T        n' likewise with k
        h  = C'^T (scale q) / max(|n' . scale q|, exp(-m'))

    q, k: (N, H, K). v: (N, H, V). log_i, log_f, m: (N, H). C: (N, H, K, V). n: (N, H, K). Without
    the normaliser m = 0, h = C'^T (scale q). Source: arXiv 2503.14376, equations 3 to 9.

    Log-gates may be infinite (``tfla.gates.limited``). What is decayed to 0 is 0, whatever it was;
    where nothing is left of a state, log_i = log_f = -inf, its gauge is 0."""
    q, log_i, log_f = q * scale, *gates.limited(log_i, log_f)
    m_next = None
    if m is not None:
        carried = log_f + m
        m_next = torch.maximum(carried, log_i)
        m_next = m_next.masked_fill(m_next < gates.EMPTY, 0.0)
        log_f, log_i = gates.difference(log_f, m, m_next), log_i - m_next
    decay, weight = log_f.exp(), log_i.exp()
    erased, k = (decay == 0.0)[..., None], weight[..., None] * k
    if inplace:
        C = C.mul_(decay[..., None, None])
        if C.device.type != "cpu" or erased.any():
            C.masked_fill_(erased[..., None], 0.0)
    else:
        C = (decay[..., None, None] * C).masked_fill(erased[..., None], 0.0)
    C = C.addcmul_(k[..., :, None], v[..., None, :])
    h = (q[..., None, :] @ C).squeeze(-2)
    if n is None or m_next is None:
        return h, C, None, None
    n = (decay[..., None] * n).masked_fill(erased, 0.0) + k
    most = -math.log(torch.finfo(q.dtype).tiny)
    floor = (-m_next).clamp(-most, most).exp()
    return h / torch.maximum((q * n).sum(-1).abs(), floor)[..., None], C, n, m_next


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``step`` over the T axis of (B, T, H, ...): the specification that all is held against."""
    h = torch.empty_like(v)
    for t in range(q.shape[1]):
        i, f = log_i[:, t], log_f[:, t]
        h[:, t], C, n, m = step(q[:, t], k[:, t], v[:, t], i, f, C, n, m, scale)
    return h, C, n, m


# ---------------------------------------------------------------- chunks


class Block(NamedTuple):
    """Chunks that are worked on at once."""

    chunks: slice
    steps: list[slice]  # the ranks of their sequences, run by run


class Layout(NamedTuple):
    """Where the chunks lie: the first one of every sequence, then all second ones and so on, always
    in the order of falling length (its *rank*): a run continues a slice of all states."""

    tokens: Tensor  # (C, L) row of B * T; B * T past the end of a sequence
    ragged: bool  # is there anything past an end?
    rank: Tensor  # (N,) sequence of each rank
    rank_of: Tensor  # (N,) rank of each sequence
    blocks: list[Block]
    whole: Block

    @staticmethod
    def make(B: int, T: int, cu_seqlens: Any, numbers: int, device: torch.device) -> Layout:
        """numbers: those in the largest matrix of a chunk, all heads."""
        cpu = torch.device("cpu")  # whatever torch's default device is
        if cu_seqlens is None:
            start = torch.arange(B, device=cpu) * T
            length = torch.full((B,), T, device=cpu)
        else:
            offsets = torch.tensor(check_offsets(cu_seqlens, T), device=cpu)
            start, length = offsets[:-1], offsets.diff()
        length, rank = length.sort(descending=True, stable=True)
        longest = int(length[0]) if len(length) else 0
        size = min(L, max(longest, 1))
        first = torch.arange(0, longest, size, device=cpu)
        counts = torch.searchsorted(-length, -first)  # how many sequences are longer than that
        ranks = torch.cat([torch.arange(n, device=cpu) for n in [0, *counts.tolist()]])
        position = first.repeat_interleave(counts)[:, None] + torch.arange(size, device=cpu)
        past = position >= length[ranks, None]
        index = torch.where(past, B * T, start[rank[ranks], None] + position)
        room, C = max(BLOCK // numbers, 1), len(ranks)
        blocks = [Block(slice(c, min(c + room, C)), []) for c in range(0, C, room)]
        starts = ((ranks == 0) | (torch.arange(C, device=cpu) % room == 0)).nonzero()[:, 0]
        ends = [*starts[1:].tolist(), C]
        for c, end, r in zip(starts.tolist(), ends, ranks[starts].tolist(), strict=False):
            blocks[c // room].steps.append(slice(r, r + end - c))
        whole = Block(slice(0, C), [step for block in blocks for step in block.steps])
        index, rank, rank_of = (x.to(device) for x in (index, rank, rank.argsort()))
        return Layout(index, bool(past.any()), rank, rank_of, blocks, whole)

    def cut(self, x: Tensor, dtype: torch.dtype, block: Block, fill: float = 0.0) -> Tensor:
        """(B, T, H, ...) -> (C, H, L, ...), contiguous, in ``dtype``; ``fill`` past the end."""
        rows, index = x.flatten(0, 1), self.tokens[block.chunks].to(x.device)
        past = index == len(rows)
        if self.ragged:
            index = index.masked_fill(past, 0)
        rows = rows.index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])
        if self.ragged:
            rows.masked_fill_(past.view(*past.shape, *[1] * (x.dim() - 2)), fill)
        return rows.transpose(1, 2).to(dtype).contiguous()

    def join(self, x: Tensor, out: Tensor, block: Block) -> None:
        """(C, H, L, ...) into the rows of out (B * T + 1, H, ...): the inverse of ``cut``."""
        rows = x.transpose(1, 2).flatten(0, 1).to(out.dtype)
        out.index_copy_(0, self.tokens[block.chunks].flatten(), rows)


class Side(NamedTuple):
    """One side of the weights D_ts = 2^(whole_s - whole_t) factor_s factor_t; all (C, H, L). edge:
    what a source weighs in the state after its chunk, or the one before it for a target."""

    whole: Tensor
    factor: Tensor
    edge: Tensor


@dataclass
class GateWeights:
    """The weights of a problem, chunk by chunk: what ``scan`` needs to know of the gates.
    Those of the target side are multiplied with scale / den, once the scan of h has found nu."""

    spec: CallSpec
    layout: Layout
    source: Side
    target: Side
    decay: Tensor  # (C, H) weight of the state that enters the chunk for the one that leaves it
    floor: Tensor  # (C, H, L) exp(-m_t), the least denominator
    n: Tensor | None  # (N, H, K)
    nu: Tensor | None  # (B, T, H) n_t . scale q_t
    m_final: Tensor  # (N, H)
    n_final: Tensor | None = None  # (N, H, K)

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.state_dtype

    def between(self, c: slice) -> Tensor:
        """D_ts of some chunks, (., H, L, L). Powers of whole numbers are exact, and so are their
        differences. Select s <= t last: beyond the diagonal there may be anything."""
        source, target = self.source, self.target
        D = (source.whole[c][..., None, :] - target.whole[c][..., None]).exp2_()
        D = D.mul_(source.factor[c][..., None, :]).mul_(target.factor[c][..., None])
        return D.tril_()

    def join(self, x: Tensor) -> Tensor:
        B, T, H = self.spec.B, self.spec.T, self.spec.H
        out = x.new_empty(B * T + 1, H, *x.shape[3:])
        self.layout.join(x, out, self.layout.whole)
        return out[:-1].view(B, T, H, *x.shape[3:])


def gate_weights(x: Inputs[Tensor], spec: CallSpec, saved: Tensor | None = None) -> GateWeights:
    """The weights of every chunk. saved: nu, (B, T, H), of an earlier call, or None."""
    q, i, f, n, m = x.q, x.i, x.f, x.n, x.m
    scale, normalize = spec.scale, spec.normalize
    numbers = spec.H * max(L, spec.K) * max(L, spec.V)
    layout = Layout.make(spec.B, spec.T, x.cu_seqlens, numbers, q.device)
    whole, dtype = layout.whole, spec.state_dtype
    host = q.device if q.device.type != "mps" else torch.device("cpu")  # MPS has no fp64
    log_i, log_f = gates.log_gates(i.to(host, dtype), f.to(host, dtype), spec.activations)
    e = gates.exponents(
        layout.cut(log_i, torch.float64, whole, gates.LOG_I_NOTHING),
        layout.cut(log_f, torch.float64, whole),
        None if m is None else m[layout.rank].to(host),
        whole.steps,
        len(layout.rank),
        normalize,
        dtype,
    )

    def put(x: Tensor) -> Tensor:
        return x.to(q.device, dtype)

    info = torch.finfo(dtype)
    floor = put(gates.exp(gates.pair(-e.m * gates.LOG2E)).clamp(info.tiny, info.max))
    factor, edge = (-e.target[1]).exp2() * scale, gates.exp(-e.target) * scale
    if saved is not None and normalize:
        den = torch.maximum(layout.cut(saved, dtype, whole).abs(), floor)
        # Of a token that weighs nothing, but finite: 1 / den may be 2^126, and inf times 0 is NaN.
        factor, edge = ((x / den).clamp(max=info.max / 4) for x in (factor, edge))
    reach = gates.exp(e.source + e.end[..., None])
    source = Side(put(e.source[0]), put(e.source[1].exp2()), put(reach))
    target = Side(put(e.target[0]), put(factor), put(edge))
    decay, m_final = put(gates.exp(e.end)), put(e.m_final)[layout.rank_of]
    nu = saved if normalize else None
    return GateWeights(spec, layout, source, target, decay, floor, n, nu, m_final)


def saved(weights: GateWeights) -> Tensor:
    """What the backward pass needs of the forward's weights: nu, (B, T, H)."""
    return weights.decay.new_empty(0) if weights.nu is None else weights.nu


def saved_shape(spec: CallSpec) -> tuple[int, ...]:
    """The shape that ``saved`` will have."""
    return (spec.B, spec.T, spec.H) if spec.normalize else (0,)


# ---------------------------------------------------------------- the scan


class Scan(NamedTuple):
    """What a scan leaves behind; tensors of chunks are (C, H, ...)."""

    out: Tensor  # (B, T, H, X)
    final: Tensor | None  # (N, H, A, X) the state after the last chunk
    column: Tensor | None  # (N, H, X) its row that belongs to the appended column
    states: Tensor | None  # (C, H, A, X) entering the chunks, of dq
    dot: Tensor | None  # (C, H, L) out . dot: the share of the state (dq), or all of it (dk)
    across: Tensor | None  # (C, H, L) what flows across each token's border, but for dq.dot (dk)


class NormalizerGrad(NamedTuple):
    """The normaliser's share of the backward pass: a column more, [dh | d] . [v | 1]."""

    d: Tensor  # (C, H, L) -sign(nu) (dh . h) where the normaliser is active, else 0
    n: Tensor | None  # (N, H, K) entering the forward scan
    dn: Tensor | None  # (N, H, K) entering the reverse scan


def normalizer_grad(
    dh: Tensor, h: Tensor, q: Tensor, n: Tensor | None, weights: GateWeights, dv: Scan | None
) -> NormalizerGrad:
    """The gradient of the division. dh, h: (B, T, H, V). n: (N, H, K) or None. dv: its scan."""
    dot = (dh.to(weights.dtype) * h.to(weights.dtype)).sum(-1)
    layout = weights.layout
    nu, dot = (layout.cut(x, weights.dtype, layout.whole) for x in (saved(weights), dot))
    return NormalizerGrad(torch.where(nu.abs() > weights.floor, -nu.sign() * dot, 0.0), n, None)


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
    layout, edge = weights.layout, weights.target.edge.clone()
    before = edge.new_ones(len(layout.rank), edge.shape[1])
    counts = [step.stop - step.start for step in layout.whole.steps]
    parts = zip(layout.whole.steps, edge.split(counts), weights.decay.split(counts), strict=True)
    for ranks, edges, decay in parts:
        edges.mul_(before[ranks, :, None])
        before[ranks] *= decay
    return weights.join(edge), None if column is None else weights.join(column.d)


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
    against: Scan | None = None,
    final: bool = True,
) -> Scan:
    """The primitive: every output and every gradient of every variant is one call.

        out_t = sum_{s<=t} D_ts (a_t . b_s) x_s + w_t a_t^T S_0  D_ts = exp(p_s - M_t) scale / den_t
        out_s = sum_{t>=s} D_ts (a_s . b_t) x_t + w_s a_s^T S_T  reverse: the same D, other index

    name: which of the calls this is: "h", "dv", "dq" or "dk"; dv and dk run in reverse.
    a, b: (B, T, H, A). x: (B, T, H, X), dtype of out. state: (N, H, A, X) or None. column: part of
    the contraction. dot: (B, T, H, X), for gate gradients; h with dv, which may return dh . h (not
    here). against: the scan of dq, for dk. final: is the state after the last chunk wanted?
    """
    layout, dtype = weights.layout, weights.dtype
    (B, T, H, A), X, N = a.shape, x.shape[-1], len(layout.rank)
    reverse, divide = name in ("dv", "dk"), name == "h" and weights.spec.normalize
    # The normaliser is one column more: of the values for h, of the contraction for dq and dk.
    current = weights.decay.new_zeros(N, H, A + (column is not None), X + divide)
    row = None if column is None else column.dn if reverse else column.n
    if state is not None:
        current[:, :, :A, :X] = state[layout.rank]
    if divide and weights.n is not None:
        current[..., -1] = weights.n[layout.rank]
    if row is not None:
        current[:, :, -1] = row[layout.rank]
    source, target = weights.source.edge, weights.target.edge
    reads, writes = (source, target) if reverse else (target, source)

    out, nu = x.new_empty(B * T + 1, H, X), weights.floor.new_empty(B * T + 1, H)
    states = current.new_empty(len(weights.decay), *current.shape[1:]) if name == "dq" else None
    dots, across = weights.floor.new_empty(2, *weights.floor.shape).unbind(0)
    for block in reversed(layout.blocks) if reverse else layout.blocks:
        c = block.chunks
        a_, b_, x_ = (layout.cut(y, dtype, block) for y in (a, b, x))
        if divide:
            x_ = pad(x_, (0, 1), value=1.0)
        if column is not None:
            d = column.d[c][..., None]
            left, right = (torch.ones_like(d), d) if reverse else (d, torch.ones_like(d))
            a_, b_ = torch.cat([a_, left], -1), torch.cat([b_, right], -1)

        update = (b_ * writes[c][..., None]).mT @ x_
        entering = torch.empty_like(update) if states is None else states[c]
        _carry(current, entering, update, weights.decay[c], block.steps, reverse)
        operands = a_, b_, x_, weights.between(c), entering, reads[c][..., None], reverse
        scores, from_state, y = _chunk(*operands, select=False)
        if not _is_finite(y):
            scores, from_state, y = _chunk(*operands, select=True)

        if divide:
            layout.join(y[..., -1], nu, block)
            y = y[..., :-1] / torch.maximum(y[..., -1].abs(), weights.floor[c])[..., None]
        layout.join(y, out, block)
        if dot is not None and name != "dv":
            z = layout.cut(dot, dtype, block)
            dots[c] = (from_state * z).sum(-1)
            if against is not None and against.states is not None:
                # From s (column) to r; dots: on to the next chunk.
                flow = (x_ @ z.mT).mul_(scores).masked_fill_(scores == 0.0, 0.0)
                after = flow.cumsum(-1).tril_(-1).sum(-2) + dots[c].cumsum(-1)
                past = (against.states[c] * entering).sum((-2, -1)) * weights.decay[c]
                past.masked_fill_(weights.decay[c] == 0.0, 0.0)
                across[c] = pad(after[..., :-1], (1, 0)) + past[..., None]
                dots[c] += flow.sum(-2)

    last = current[layout.rank_of]
    if divide:
        weights.nu, weights.n_final = nu[:-1].view(B, T, H), last[:, :, :, -1].contiguous()
    row = None if column is None else last[:, :, -1].contiguous()
    end = last[:, :, :A, :X].contiguous() if final else None
    return Scan(out[:-1].view(B, T, H, X), end, row, states, dots, across)


def _carry(
    S: Tensor, entering: Tensor, update: Tensor, decay: Tensor, steps: list[slice], reverse: bool
) -> None:
    """S (N, H, A, X) <- decay S + update along some chunks; before each it goes to ``entering``."""
    counts = [step.stop - step.start for step in steps]
    parts = (y.split(counts) for y in (entering, update, decay[..., None, None]))
    run = list(zip(steps, *parts, strict=True))
    for ranks, enters, new, kept in reversed(run) if reverse else run:
        enters.copy_(S[ranks])
        if S.device.type != "cpu" or not kept.all():  # the state is forgotten, whatever it was
            S[ranks].masked_fill_(kept == 0.0, 0.0)
        torch.addcmul(new, S[ranks], kept, out=S[ranks])


def _chunk(
    a: Tensor,
    b: Tensor,
    x: Tensor,
    D: Tensor,
    S: Tensor,
    edge: Tensor,
    reverse: bool,
    select: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some chunks: scores (target, source), the state's share of the output, and the output.
    select: what has a weight of 0 is 0, also where it is not finite."""
    scores, from_state = (b @ a.mT if reverse else a @ b.mT).mul_(D), (a @ S).mul_(edge)
    if not select:
        return scores, from_state, ((scores.mT if reverse else scores) @ x).add_(from_state)
    scores.masked_fill_(D == 0.0, 0.0)
    from_state.masked_fill_(edge == 0.0, 0.0)
    weights, D = (scores.mT, D.mT) if reverse else (scores, D)
    bad = ~x.isfinite()
    reached = (D != 0.0).to(x.dtype) @ bad.to(x.dtype) > 0.0
    y = torch.where(reached, weights @ x, weights @ x.masked_fill(bad, 0.0))
    return scores, from_state, y + from_state


def _is_finite(x: Tensor) -> bool:
    """Nothing in x is inf or NaN (a sum may overflow too, which costs time only)."""
    return x.device.type == "cpu" and math.isfinite(x.sum())


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
    assert dq.dot is not None and dk.dot is not None and dk.across is not None
    dlog_f = dk.across + dq.dot.flip(-1).cumsum(-1).flip(-1)
    dlog_i, dlog_f = weights.join(torch.stack([dk.dot, dlog_f], -1)).unbind(-1)
    i, f = i.to(weights.dtype), f.to(weights.dtype)
    di, df = gates.gate_gradients(dlog_i, dlog_f, i, f, weights.spec.activations)
    return di.to(dtypes[0]).contiguous(), df.to(dtypes[1]).contiguous()


def initial_gradients(dv: Scan, dk: Scan) -> tuple[Tensor, Tensor | None]:
    """(dC_0, dn_0): what the reverse scans leave at the start of the sequences."""
    assert dv.final is not None
    return dv.final, dk.column


def update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    slots: Tensor | None,
    scale: float,
    activations: Activations,
) -> Tensor:
    """One token: writes the new state over the old (in rows ``slots``, or all); h (B, H, V)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    log_i, log_f = gates.log_gates(i.to(dtype), f.to(dtype), activations)
    rows: Any = slice(None) if slots is None else slots.long().clamp(0, max(len(C) - 1, 0))
    states = [None if s is None else s[rows].to(dtype) for s in (C, n, m)]
    inplace = slots is None and C.dtype == dtype  # fresh memory takes five times the arithmetic
    tokens = (x.to(dtype) for x in (q, k, v))
    h, *new = step(*tokens, log_i, log_f, *states, scale, inplace)  # type: ignore
    if slots is not None and len(slots) > 0:
        known = (slots >= 0) & (slots < len(C))
        # Without waiting for a device: who has no row writes what the first who has one does, to
        # the same place, and nobody writes anything where there is none.
        source = torch.where(known, torch.arange(len(known), device=q.device), known.int().argmax())
        rows = rows[source]
        for at, old in enumerate(states):
            if old is not None:
                new[at] = torch.where(known.any(), new[at][source], old)  # type: ignore[index]
        h = h.masked_fill(~known[:, None, None], torch.nan)
    for state, value in zip((C, n, m), new, strict=True):
        if state is not None and value is not None and not (inplace and state is C):
            state[rows] = value.to(state.dtype)
    return h.to(v.dtype)


FOLDS_PACKING = False  # chunks never cross a sequence


def fold_packing(f: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("this backend takes packed sequences one by one")


def execute(
    function: Callable[..., Results],
    spec: CallSpec,
    tensors: tuple[Any, ...],
    exchange: Exchange | None = None,
) -> Results:
    """``function(spec, *tensors)``: nothing is kept from call to call."""
    return function(spec, *tensors) if exchange is None else function(spec, *tensors, exchange)


def offsets(cu_seqlens: Tensor, T: int) -> Tensor:
    """Offsets as the functions above take them: any, for ``Layout.make`` reads and checks them."""
    return cu_seqlens


def clear(offsets: Tensor, *outputs: Tensor) -> None:
    """Zeros at tokens that belong to no sequence: ``Layout.make`` allows none."""
