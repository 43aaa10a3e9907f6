"""The truth and the CPU backend: the recurrence token by token, and the scan chunk by chunk, in plain PyTorch.

``recurrence`` is the specification (run it in fp64). Everything else is the backend "reference": the same five functions that
any backend has (``exponents``, ``normalizer_backward``, ``scan``, ``gate_gradients``, ``update``), on any device, time and memory
linear in T. It works in fp32 (fp64 for fp64 inputs) on chunks of L tokens that never cross a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tfla import gates
from tfla.gates import Activations

L = 64  # chunk length: the two quadratic products of a chunk cost about as much as the two with the state


# ---------------------------------------------------------------- the specification


def step(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, C: Tensor, n: Tensor | None, m: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One token of the recurrence, in the dtype of the operands; n and m are None when not normalised.

        m' = max(log_f + m, log_i)
        C' = exp(log_f + m - m') C + exp(log_i - m') k v^T        n' likewise with k
        h  = C'^T (scale q) / max(|n' . scale q|, exp(-m'))

    q, k: (N, H, K). v: (N, H, V). log_i, log_f, m: (N, H). C: (N, H, K, V). n: (N, H, K).
    Without the normaliser m = 0 and h = C'^T (scale q). Source: arXiv 2503.14376, equations 3 to 9.
    """
    q = q * scale
    if n is None or m is None:
        C = log_f.exp()[..., None, None] * C + log_i.exp()[..., None, None] * k[..., :, None] * v[..., None, :]
        return (q[..., None, :] @ C).squeeze(-2), C, None, None
    m_next = torch.maximum(log_f + m, log_i)
    decay = (log_f + m - m_next).exp()[..., None]
    weight = (log_i - m_next).exp()[..., None]
    C = decay[..., None] * C + (weight * k)[..., :, None] * v[..., None, :]
    n = decay * n + weight * k
    floor = (-m_next).exp().clamp(min=torch.finfo(q.dtype).tiny)
    den = torch.maximum((q * n).sum(-1).abs(), floor)
    return (q[..., None, :] @ C).squeeze(-2) / den[..., None], C, n, m_next


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, C: Tensor, n: Tensor | None, m: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``step`` over the T axis of (B, T, H, ...): the specification that everything here is held against, in fp64."""
    h = []
    for t in range(q.shape[1]):
        h_t, C, n, m = step(q[:, t], k[:, t], v[:, t], log_i[:, t], log_f[:, t], C, n, m, scale)
        h.append(h_t)
    return torch.stack(h, 1) if h else torch.zeros_like(v), C, n, m


# ---------------------------------------------------------------- chunks


@dataclass(frozen=True)
class Layout:
    """Where the chunks lie. Sequences are ranked by falling length; chunk c is the j-th of its sequence for c in steps[j], so
    that step j serves the first ``len`` ranks and a state is carried by slicing alone."""

    shape: tuple[int, int]  # (B, T)
    index: Tensor  # (C, L) row of B*T; B*T where the chunk is past the end of its sequence
    steps: list[slice]
    rank: Tensor  # (N,) sequence of each rank
    n: int

    @staticmethod
    def make(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Layout:
        if cu_seqlens is None:
            start, length = torch.arange(B) * T, torch.full((B,), T)
        else:
            offsets = cu_seqlens.to("cpu", torch.int64)
            start, length = offsets[:-1], offsets.diff()
            if int(offsets[0]) != 0 or int(offsets[-1]) != T or bool((length < 0).any()):
                raise ValueError(
                    f"cu_seqlens must ascend from 0 to T = {T}; got {_brief(offsets)}. "
                    "Give the token offsets at which the packed sequences start, followed by T."
                )
        length, rank = length.sort(descending=True, stable=True)
        start = start[rank]
        chunks = (length + L - 1) // L
        most = int(chunks[0]) if len(chunks) else 0
        # How many sequences have a j-th chunk, for every j.
        counts = torch.bincount(chunks, minlength=most + 1).flip(0).cumsum(0).flip(0)[1:].tolist()
        steps, c = [], 0
        for count in counts:
            steps.append(slice(c, c + count))
            c += count
        sequence = torch.cat([torch.arange(count) for count in counts]) if counts else torch.zeros(0, dtype=torch.int64)
        order = torch.repeat_interleave(torch.arange(most), torch.tensor(counts, dtype=torch.int64))
        position = order[:, None] * L + torch.arange(L)
        inside = position < length[sequence][:, None]
        index = torch.where(inside, start[sequence][:, None] + position, B * T)
        return Layout((B, T), index.to(device), steps, rank.to(device), len(rank))

    def cut(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """(B, T, H, ...) -> (C, H, L, ...), contiguous, in ``dtype``; places past the end of a sequence hold ``fill``."""
        rows = torch.nn.functional.pad(x.flatten(0, 1).to(dtype), (0, 0) * (x.dim() - 2) + (0, 1), value=fill)
        return rows[self.index].transpose(1, 2).contiguous()

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(C, H, L, ...) -> (B, T, H, ...), the inverse of ``cut``."""
        B, T = self.shape
        out = x.new_zeros(B * T + 1, x.shape[1], *x.shape[3:], dtype=dtype)
        out[self.index] = x.transpose(1, 2).to(dtype)
        return out[:-1].unflatten(0, (B, T))


def _brief(x: Tensor) -> str:
    values = x.tolist()
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


class Side(NamedTuple):
    """One side of the weights exp(p_s - M_t): exponents as a pair, and what a token of this side weighs at its chunk's edge."""

    hi: Tensor  # (C, H, L)
    lo: Tensor
    edge: Tensor
    factor: Tensor | None  # a plain factor of the weights: scale / den on the target side


@dataclass(frozen=True)
class Grid:
    """The weights of a problem, chunk by chunk: what ``scan`` needs to know of the gates."""

    layout: Layout
    dtype: torch.dtype
    source: Side
    target: Side
    decay: Tensor  # (C, H) what is left of the state that entered the chunk at its end
    reset: Tensor  # (C, H, L) tokens that leave nothing of the state before them
    floor: Tensor  # (C, H, L) exp(-m_t), the least denominator
    m_final: Tensor  # (N, H)
    n_final: Tensor | None  # (N, H, K)
    nu: Tensor | None  # (C, H, L) n_t . scale q_t


def exponents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    activations: Activations,
    normalize: bool,
    keep: bool,
    saved: Tensor | None = None,
) -> Grid:
    """The weights of every chunk, the denominator folded into the target side.

    q, k: (B, T, H, K). v: (B, T, H, V), for its shape. i, f: (B, T, H). n: (N, H, K), m: (N, H) or None.
    keep: will there be a backward pass? saved: nu (B, T, H) of an earlier call, or None to compute it.
    """
    B, T, H, K = q.shape
    layout = Layout.make(B, T, cu_seqlens, q.device)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    host = q.device if q.device.type != "mps" else torch.device("cpu")  # MPS has no fp64
    log_i, log_f = gates.log_gates(i.to(host, dtype), f.to(host, dtype), activations)
    cut = replace(layout, index=layout.index.to(host)).cut
    e = gates.exponents(
        cut(log_i, torch.float64, gates.GAUGE_MIN),
        log_f := cut(log_f, torch.float64),
        None if m is None else m.to(host)[layout.rank.to(host)],
        layout.steps,
        layout.n,
        normalize,
        dtype,
    )
    m_before = torch.cat([e.m_in[..., None], e.m[..., :-1]], -1)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

    def put(x: Tensor) -> Tensor:
        return x.to(q.device, dtype)

    source = Side(*map(put, gates.split(e.source, dtype)), put((e.source - e.M_out[..., None]).exp()), None)
    target = Side(
        *map(put, gates.split(-e.target, dtype)),
        put((e.m_in[..., None] - e.target).exp()),
        put(torch.full_like(e.m, scale)),
    )
    info = torch.finfo(dtype)
    grid = Grid(
        layout,
        dtype,
        source,
        target,
        decay=put((e.m_in - e.M_out).exp()),
        reset=((log_f + m_before - e.m).exp() < smallest).to(q.device),
        floor=put((-e.m).exp().clamp(info.tiny, info.max)),
        m_final=put(e.m_final[_inverse(layout.rank.to(host))]),
        n_final=None,
        nu=None,
    )
    if not normalize:
        return grid
    if saved is None:
        ones = grid.source.edge.new_ones(*k.shape[:3], 1)
        scanned = scan("nu", q, k, ones, grid, None if n is None else n[..., None])
        nu, n_final = layout.cut(scanned.out, dtype)[..., 0], scanned.final[..., 0]
    else:
        nu, n_final = layout.cut(saved, dtype), None
    den = torch.maximum(nu.abs(), grid.floor)
    return replace(grid, target=target._replace(factor=scale / den), nu=nu, n_final=n_final)


def saved(grid: Grid) -> Tensor:
    """What the backward pass needs of the forward's grid beyond its inputs: nu, (B, T, H)."""
    if grid.nu is None:
        return grid.decay.new_empty(0)
    return grid.layout.join(grid.nu, grid.dtype)


# ---------------------------------------------------------------- the scan


class Scan(NamedTuple):
    """What a scan leaves behind; tensors of tokens are (B, T, H, ...), those of chunks (C, H, ...)."""

    out: Tensor
    dot: Tensor | None  # (B, T, H) x-space row dot products out . dot
    final: Tensor  # (N, H, A, X) the state after the last chunk
    column: Tensor | None  # (N, H, X) its row that belongs to the appended column
    ends: Tensor | None  # (C, H, A, X) the state at the end of each chunk
    meets: Tensor | None  # (C, H) <state of ``against``, this state> at the end of each chunk (reverse)


class Column(NamedTuple):
    """The normaliser's share of the backward pass: one more column in the contraction, [dh | d] . [v | 1]."""

    d: Tensor  # (B, T, H) -sign(nu) (dh . h) where the normaliser is active, else 0
    n: Tensor | None  # (N, H, K) its row of the state that enters the forward scan
    dn: Tensor | None  # (N, H, K) and of the gradient that enters the reverse one


def normalizer_backward(
    dh: Tensor, h: Tensor, q: Tensor, n: Tensor | None, dn: Tensor | None, grid: Grid
) -> Column:
    """The column that makes the gradient of the division exact. dh, h: (B, T, H, V). n, dn: (N, H, K) or None."""
    assert grid.nu is not None
    dot = (dh.to(grid.dtype) * h.to(grid.dtype)).sum(-1)
    sign = torch.where(grid.nu.abs() > grid.floor, grid.nu.sign(), 0.0)
    return Column(-grid.layout.join(sign, grid.dtype) * dot, n, dn)


def scan(
    name: str,
    a: Tensor,
    b: Tensor,
    x: Tensor,
    grid: Grid,
    state: Tensor | None = None,
    *,
    column: Column | None = None,
    dot: Tensor | None = None,
    against: Scan | None = None,
) -> Scan:
    """The primitive: every output and every gradient of every variant is one call.

        out_t = sum_{s<=t} D_ts (a_t . b_s) x_s + w_t a_t^T S_0             D_ts = exp(p_s - M_t) scale / den_t
        out_s = sum_{t>=s} D_ts (a_s . b_t) x_t + w_s a_s^T S_T             reverse: the same D along its other index

    name: which of the calls this is; "dk" and "dv" run in reverse.
    a, b: (B, T, H, A). x: (B, T, H, X). state: (N, H, A, X) or None (zeros). dot: (B, T, H, X), whose row dot products with out
    are wanted. column: appended to the contraction. against: the scan of dq, whose states those of dk are multiplied with.
    out has the dtype of x.
    """
    layout, dtype = grid.layout, grid.dtype
    reverse = name in ("dk", "dv")
    if column is not None:
        ones = torch.ones_like(column.d)
        left, right, row = (ones, column.d, column.dn) if reverse else (column.d, ones, column.n)
        a = torch.cat([a.to(dtype), left[..., None]], -1)
        b = torch.cat([b.to(dtype), right[..., None]], -1)
        if state is not None or row is not None:
            N, H, A, X = layout.n, a.shape[2], a.shape[3], x.shape[3]
            state = a.new_zeros(N, H, A - 1, X) if state is None else state
            row = a.new_zeros(N, H, X) if row is None else row
            state = torch.cat([state.to(dtype), row.to(dtype)[..., None, :]], -2)
    A, B, X = layout.cut(a, dtype), layout.cut(b, dtype), layout.cut(x, dtype)
    rows, cols = (grid.source, grid.target) if reverse else (grid.target, grid.source)

    # Within a chunk. Select after exp: beyond the diagonal it overflows.
    weights = (rows.hi[..., :, None] + cols.hi[..., None, :]) + (rows.lo[..., :, None] + cols.lo[..., None, :])
    causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
    weights = weights.exp_().masked_fill_(~(causal.T if reverse else causal), 0.0)
    if cols.factor is not None:
        B = B * cols.factor[..., None]
    out = (A @ B.mT).mul_(weights) @ X

    # From chunk to chunk.
    update = (B * cols.edge[..., None]).mT @ X
    incoming, final = _carry(update, grid.decay, state, layout, reverse)
    out += (A @ incoming).mul_(rows.edge[..., None])
    if rows.factor is not None:
        out *= rows.factor[..., None]

    return Scan(
        layout.join(out, x.dtype),
        None if dot is None else layout.join((out * layout.cut(dot, dtype)).sum(-1), dtype),
        final if column is None else final[..., :-1, :],
        None if column is None else final[..., -1, :],
        update if name == "dq" else None,
        None if against is None or against.ends is None else (against.ends * incoming).sum((-2, -1)),
    )


def _carry(
    update: Tensor, decay: Tensor, state: Tensor | None, layout: Layout, reverse: bool
) -> tuple[Tensor, Tensor]:
    """S <- decay S + update over the chunks of each sequence: the state that enters each chunk, and (N, ...) the last one.
    ``update`` (C, H, A, X) is overwritten by the state that leaves each chunk."""
    incoming = torch.empty_like(update)
    current = update.new_zeros(layout.n, *update.shape[1:]) if state is None else state[layout.rank].to(update.dtype)
    decay = decay[..., None, None]
    for chunk in reversed(layout.steps) if reverse else layout.steps:
        rows = current[: chunk.stop - chunk.start]
        incoming[chunk] = rows
        rows.copy_(torch.addcmul(update[chunk], rows, decay[chunk], out=update[chunk]))
    return incoming, current[_inverse(layout.rank)]


def _inverse(permutation: Tensor) -> Tensor:
    return permutation.argsort()


def gate_gradients(
    i: Tensor, f: Tensor, dq: Scan, dk: Scan, grid: Grid, activations: Activations
) -> tuple[Tensor, Tensor]:
    """(di, df) from row dot products; the running sum of df restarts at every chunk, from the states that meet there.

    dlog_i_s = k_s . dk_s,  dlog_f_t = sum_{r>=t} (q_r . dq_r - k_r . dk_r) + <C_T, dC_T> + <n_T, dn_T>.
    i, f: (B, T, H). dq, dk: their scans, with row dot products.
    """
    layout = grid.layout
    assert dq.dot is not None and dk.dot is not None and dk.meets is not None
    high = torch.float64 if i.device.type != "mps" else torch.float32
    db_q, db_k = layout.cut(dq.dot, high), layout.cut(dk.dot, high)
    if grid.nu is not None:  # h does not depend on the length of q where the normaliser is active
        db_q = db_q.masked_fill(grid.nu.abs() > grid.floor, 0.0)
    dlog_f = layout.join(gates.log_forget_gradient(db_q - db_k, dk.meets.to(high), grid.reset), grid.dtype)
    return gates.gate_gradients(dk.dot, dlog_f, i.to(grid.dtype), f.to(grid.dtype), activations)


def saved_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalize: bool, keep: bool) -> Tensor:
    """An empty tensor of the shape that ``saved`` will have: known from shapes alone, for compiled graphs."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3] if normalize else (0,), dtype=dtype)


def initial_gradients(dv: Scan, dk: Scan) -> tuple[Tensor, Tensor | None]:
    """(dC_0, dn_0): what the reverse scans leave at the start of the sequences."""
    return dv.final, dk.column


# ---------------------------------------------------------------- decode


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
    """One token: writes the new state over the old (in the rows ``slots``, or all) and returns h (B, H, V) in v's dtype."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    log_i, log_f = gates.log_gates(i.to(dtype), f.to(dtype), activations)
    old = [s if s is None or slots is None else s[slots] for s in (C, n, m)]
    wide = [None if s is None else s.to(dtype) for s in old]
    h, *new = step(q.to(dtype), k.to(dtype), v.to(dtype), log_i, log_f, *wide, scale)  # type: ignore[arg-type]
    for state, value in zip((C, n, m), new, strict=True):
        if state is not None and value is not None:
            if slots is None:
                state.copy_(value)
            else:
                state[slots] = value.to(state.dtype)
    return h.to(v.dtype)
