"""One sequence over many processes: T is split over the ranks of a group, in rank order.

States compose, so ranks exchange states, not tokens. With E = (C, n, m) what the tokens of rank j
leave at its end, b_j the sum of its log_f,

    state that enters rank r  = sum_{j<r} E_j e^(b_{j+1} + ... + b_{r-1})        one all-gather of
    dC at the end of rank r   = sum_{j>r} dE_j e^(b_{r+1} + ... + b_{j-1})       (C, n, m, b), each

where dE_j is what the loss of rank j says of the state that enters it. E and dE are one weighted
product over the rank's tokens, k^T v and q^T dh. The rest are the passes of one process.

The exchange is K V + K + 3 numbers a sequence and head, each way; backward it runs beside dq. Of
packed sequences one crosses a border: it is found on the device, and where it begins b is ``CUT``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tfla import _compat, algorithm, gates, log, ops
from tfla.dtypes import state_dtype
from tfla.gates import EMPTY
from tfla.offsets import check_offsets
from tfla.shapes import each_head
from tfla.spec import CallSpec, Inputs

CUT = gates.LOG_F_NOTHING  # below any gauge, and finite: a log weight of 0
SECONDS = 60  # that ranks wait for each other where shapes are compared


def run(x: Inputs, spec: CallSpec, group: Any, reverse: bool = False) -> tuple[Tensor, ...]:
    """``ops.run`` with T split over ``group``: (h, C, n, m); states as in ``tfla.mlstm``. reverse:
    the first token of the sequence is on the last rank (see ``tfla.shapes.mirrored``)."""
    if group.size() == 1 or spec.T == 0:
        return ops.run(x, spec)[:4]
    return torch.ops.tfla.parallel_forward(*x, *spec.options, group.group_name, reverse)[:4]


class Ranks(NamedTuple):
    """The ranks of a group in the order in which they hold the tokens of a sequence."""

    group: Any
    reverse: bool  # does the last rank hold the first tokens?

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        """This one's place."""
        return self.size - 1 - self.group.rank() if self.reverse else self.group.rank()


class Part(NamedTuple):
    """A rank's share of N sequences. P of them may cross a border: of those packed one, else all,
    and then rank and size alone say how: no tensors, no launches."""

    cu_seqlens: Tensor | None  # (N + 1,) offsets in the rank's own tokens
    first: Tensor | None  # (P,) the sequences of its first token; None: all
    last: Tensor | None  # (P,) of its last token
    enters: Tensor | bool  # (N,) bool: begins in a rank before
    leaves: Tensor | bool  # (N,) goes on in a rank behind
    starts: Tensor | bool  # (N,) begins here
    ends: Tensor | bool  # (N,) ends here
    head: Tensor | None  # (T,) bool: tokens of ``first``
    tail: Tensor | None  # (T,) tokens of ``last``

    @staticmethod
    def make(x: Inputs, rank: int, size: int) -> Part:
        T, device = x.q.shape[1], x.q.device
        if x.cu_seqlens is None:
            sides = (rank > 0, rank < size - 1, rank == 0, rank == size - 1)
            return Part(None, None, None, *sides, None, None)
        cu, begin, end = x.cu_seqlens.contiguous(), rank * T, (rank + 1) * T
        N = len(cu) - 1
        rows, t = torch.arange(N, device=device), torch.arange(T, device=device)
        edges = torch.arange(2, device=device, dtype=cu.dtype) * (T - 1) + begin
        first, last = (torch.searchsorted(cu, edges, right=True) - 1).clamp(0, N - 1).split(1)
        enters = (rows == first) & (cu[first] < begin)
        leaves = (rows == last) & (cu[last + 1] > end)
        starts = (cu[:-1] // T).clamp(0, size - 1) == rank
        ends = (torch.maximum(cu[1:] - 1, cu[:-1]) // T).clamp(0, size - 1) == rank
        own = (cu - begin).clamp(0, T)
        head, tail = t < own[first + 1], (t >= own[last]) & (t < own[last + 1])
        return Part(own, first, last, enters, leaves, starts, ends, head, tail)


def _pick(x: Any, rows: Tensor | None) -> Any:
    """Rows of x (N, ...), all without any; of a bool, which holds for all, itself."""
    return x if rows is None or isinstance(x, bool) else x[rows]


def _choose(mask: Tensor | bool, x: Tensor, other: Tensor | float) -> Tensor:
    """Rows of x (N, ...) or (1, ...) where mask (N,) holds, else those of other."""
    if isinstance(mask, bool):
        return x if mask else other if isinstance(other, Tensor) else torch.full_like(x, other)
    return torch.where(mask.view(-1, *[1] * (x.dim() - 1)), x, other)


def _mask(tokens: Tensor | None, x: Tensor, other: float) -> Tensor:
    """x (B, T, H) at tokens (T,), other elsewhere."""
    return x if tokens is None else torch.where(tokens[None, :, None], x, other)


class _States(NamedTuple):
    """C (.., K, V), n (.., K) or None, m (..) and b (..), in fp64, of P sequences."""

    C: Tensor
    n: Tensor | None
    m: Tensor
    b: Tensor

    def ranks(self, start: int, stop: int) -> _States:
        """Some of those gathered."""
        return _States(*(None if s is None else s[start:stop] for s in self))  # type: ignore[arg-type]

    def gather(self, ranks: Ranks) -> Callable[[], _States]:
        """Those of all ranks, (R, P, ...), once the function that comes back is called."""
        b = self.b.to(self.C.dtype)
        rest = (self.b - b).to(self.C.dtype)  # b needs more than fp32
        parts = [self.C, self.m, b, rest] + ([] if self.n is None else [self.n])
        flat = torch.cat([part.reshape(-1) for part in parts])
        out = flat.new_empty(ranks.size, len(flat))
        # The second name is the older one, deprecated since torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(out.view(-1), flat, group=ranks.group, async_op=True)

        def wait() -> _States:
            work.wait()
            placed = out.flip(0) if ranks.reverse else out
            split = placed.split([part.numel() for part in parts], 1)
            C, m, b, rest, *n = (y.view(-1, *p.shape) for y, p in zip(split, parts, strict=True))
            return _States(C, n[0] if n else None, m, b.double() + rest.double())

        return wait


def _sum(states: _States, power: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(C, n, m): the sum of states (S, P, H, ...) of weights e^power (S, P, H), fp64."""
    m = power.amax(0).clamp(min=EMPTY) if normalize else torch.zeros_like(power[0])
    m, followed = gates.rounded(m, states.C.dtype)
    C, n = _weigh(states, power - followed)
    # A gauge that is still the stand-in belongs to a state of zeros: it may as well be 0.
    return C, n, torch.where(m <= EMPTY, 0.0, m)


def _weigh(states: _States, power: Tensor) -> tuple[Tensor, Tensor | None]:
    w = power.exp().to(states.C.dtype)[..., None]
    return (w[..., None] * states.C).sum(0), None if states.n is None else (w * states.n).sum(0)


def _product(a: Tensor, w: Tensor | None, x: Tensor, full: torch.dtype) -> Tensor:
    """sum_t w_t a_t x_t^T. a: (B, T, H, A). w: (B, T, H). x: (B, T, H, X). In bf16 the weight is
    rounded too, as in the scan: fp32 in between would be 6 passes over a in place of 2."""
    low = a.is_cuda and a.dtype == torch.bfloat16  # fp16 might not hold the weights
    if w is not None:
        a = a * (w.to(a.dtype) if low else w)[..., None]
    if not low:
        return torch.einsum("btha,bthx->bhax", a.to(full), x.to(full))
    B, T, H, A = a.shape
    tiles = -(-A // 128) * -(-x.shape[-1] // 128)  # of a head: few fill no GPU, so T is cut
    if H < B or B * H * tiles <= 128:
        G = math.gcd(T, 1 << (max(1, 132 // (B * tiles)).bit_length() - 1))
        a, x = (y.unflatten(1, (G, -1)).flatten(0, 1) for y in (a, x))
        heads = [torch.bmm(a[:, :, h].mT, x[:, :, h], out_dtype=full) for h in range(H)]
        return torch.stack(heads, 1).unflatten(0, (B, G)).sum(1)
    left, right = a.permute(0, 2, 3, 1), x.transpose(1, 2)
    return torch.stack([torch.bmm(left[b], right[b], out_dtype=full) for b in range(B)])


def _sum_of(x: Tensor, w: Tensor, full: torch.dtype) -> Tensor:
    """sum_t w_t x_t, (B, H, X), weights in fp32: n . q may be next to 0 and must stay exact."""
    parts = [w]
    while x.is_cuda and x.dtype == torch.bfloat16 and len(parts) < 3:  # which hold all of fp32
        parts.append(parts[-1] - parts[-1].bfloat16())
    w = torch.stack(parts, -1).to(x.dtype if len(parts) == 3 else full)
    return _product(w, None, x, full).sum(2)


def _left(x: Inputs, spec: CallSpec, part: Part) -> _States:
    """What the rank leaves at its end; of sequences that begin here, from their initial states."""
    full = state_dtype(spec.dtype)
    logs = gates.log_gates(x.i.double(), x.f.double(), spec.activations)
    log_i, log_f = map(_mask, (part.tail, part.tail), logs, (-torch.inf, 0.0))
    log_i, log_f = (y.transpose(1, 2).contiguous() for y in (log_i, log_f))  # (B, H, T)
    power = log_i + gates.behind(log_f)
    m = power.amax(-1).clamp(min=EMPTY) if spec.normalize else torch.zeros_like(power[..., 0])
    m, followed = gates.rounded(m, full)
    b = log_f.sum(-1).clamp(min=CUT)  # which fp32 holds
    w = (power - followed[..., None]).exp().to(full).transpose(1, 2)
    k = each_head(x.k, spec.H)
    C = _product(k, w, x.v, full)
    n = _sum_of(k, w, full) if spec.normalize else None
    begins = _pick(part.starts, part.last)
    if x.C is not None and begins is not False:
        n = None if n is None or x.n is None else torch.stack([n, _pick(x.n, part.last)])
        both = _States(torch.stack([C, _pick(x.C, part.last)]), n, m, b)
        power = _choose(begins, b if x.m is None else _pick(x.m, part.last) + b, CUT)
        C, n, m = _sum(both, torch.stack([m.double(), power]), spec.normalize)
    return _States(C, n, m, _choose(begins, torch.full_like(b, CUT), b))


def forward(x: Inputs, spec: CallSpec, ranks: Ranks) -> tuple[Tensor, ...]:
    """(h, C_T, n_T, m_T, saved, what else the backward pass needs: the states that enter (C, n, m),
    the gauges that leave, and b of all ranks)."""
    if log.ON:
        log.sequence(spec)
    rank, N, H, K, V = ranks.rank, spec.N, spec.H, spec.K, spec.V
    _agree(x, spec, ranks)
    with ops.no_autocast(x.q.device.type):
        part = Part.make(x, rank, ranks.size)
        arrives = _left(x, spec, part).gather(ranks)
        full = state_dtype(spec.dtype)
        C = x.q.new_zeros(N, H, K, V, dtype=full) if x.C is None else x.C
        n, m = x.n, x.m
        if spec.normalize and x.n is None:
            n, m = C.new_zeros(N, H, K), C.new_full((N, H), EMPTY)
        states = arrives()
        if rank:
            before = states.ranks(0, rank)
            C_r, n_r, m_r = _sum(before, before.m + gates.between(before.b), spec.normalize)
            C = _choose(part.enters, C_r, C)
            if n is not None and n_r is not None and m is not None:
                n, m = _choose(part.enters, n_r, n), _choose(part.enters, m_r, m)
        packed = x.cu_seqlens is not None
        inner = x._replace(C=C, n=n, m=m, cu_seqlens=part.cu_seqlens)
        own_spec = spec.but(initial_state=True, final_state=spec.final_state and packed, split=True)
        h, C_last, n_last, m_last, saved = ops.forward(inner, own_spec)
        ends: list[Any] = [h.new_empty(0, dtype=full) for _ in range(3)]
        m_last = m_last if spec.normalize else C.new_zeros(N, H)
        if spec.final_state and packed:  # each is known where its sequence ends
            own = [C_last, n_last, m_last] if spec.normalize else [C_last]
            own = [_choose(part.ends, s, 0.0) for s in own]
            ends[: len(own)] = _reduce(own, ranks.group)
        elif spec.final_state:
            *last, gauge = _sum(states, states.m + gates.between(states.b), spec.normalize)
            ends = [*last, gauge] if spec.normalize else [last[0], *ends[1:]]
        # An operator's outputs are neither its inputs nor each other.
        kept = [C.new_empty(0) if y is None else y.clone() if not rank else y for y in (C, n, m)]
        return h, *ends, saved, *kept, m_last, states.b


def backward(
    dh: Tensor | None,
    dC: Tensor | None,
    dn: Tensor | None,
    kept: list[Tensor],
    x: Inputs,
    spec: CallSpec,
    ranks: Ranks,
) -> tuple[Tensor, ...]:
    """As ``ops.backward``. kept: what ``forward`` returned, but for C_T and n_T."""
    rank, full = ranks.rank, state_dtype(spec.dtype)
    h, m_end, saved, C, *column, m_last, b = kept
    n, m = column if spec.normalize else (None, None)
    with ops.no_autocast(x.q.device.type):
        part = Part.make(x, rank, ranks.size)
        inner = x._replace(C=C, n=n, m=m, cu_seqlens=part.cu_seqlens)
        dh = torch.zeros_like(h) if dh is None else dh
        given: list[Tensor] = []  # (dC, dn) at the ends of the sequences that end here
        if spec.final_state:  # the losses of all ranks may depend on every rank's copy of it
            both = [(C, dC)] if n is None else [(C, dC), (n, dn)]
            given = _reduce([torch.zeros_like(s) if d is None else d for s, d in both], ranks.group)
            if spec.normalize:  # from the gauge that was returned to the one of this rank
                w = (m_last.double() - m_end.double()).exp().to(full)
                given = [d * w.view(*w.shape, *[1] * (d.dim() - 2)) for d in given]
            given = [_choose(part.ends, d, 0.0) for d in given]

        def exchange(weights: Any, column: Any) -> Callable[[], tuple[Tensor, Tensor | None]]:
            enters = _pick(part.enters, part.first)
            if enters is False:  # nothing to say to those before
                dC, dn = torch.zeros_like(C), None if n is None else torch.zeros_like(n)
            else:
                backend = algorithm.backend_of(spec.backend)
                w, d = backend.initial_state_decay(weights, column, part.first)
                used = None if part.head is None else part.head & enters[0]
                w = _mask(used, w, 0.0)
                q = each_head(x.q, spec.H)
                dC = _product(q, w, dh, full)
                dn = None if d is None else _sum_of(q, w * _mask(used, d, 0.0), full)
            gauge = dC.new_zeros(dC.shape[:2]) if m is None else _pick(m, part.first)
            if given and enters is not False:
                _, log_f = gates.log_gates(x.i.double(), x.f.double(), spec.activations)
                power = _mask(part.head, log_f, 0.0).sum(1) + gauge - _pick(m_last, part.first)
                power = _choose(enters, power, CUT).exp().to(full)
                dC = dC + power[..., None, None] * _pick(given[0], part.first)
                dn = None if dn is None else dn + power[..., None] * _pick(given[1], part.first)
            to_them = _States(dC, dn, _choose(enters, gauge, -CUT), torch.zeros_like(b[0]))
            arrives = to_them.gather(ranks)

            def wait() -> tuple[Tensor, Tensor | None]:
                behind = arrives().ranks(rank + 1, ranks.size)
                passed = torch.cat([torch.zeros_like(b[:1]), b[rank + 1 : -1]]).cumsum(0)
                # Where both are states of zeros their gauges are any: the weight must be finite.
                power = _pick(m_last.double(), part.last) - behind.m + passed[: len(behind.m)]
                dC, dn = _weigh(behind, power.clamp(max=80))
                own: list[Any] = [*given, 0.0, 0.0]
                dC = _choose(part.leaves, dC, own[0])
                return dC, None if dn is None else _choose(part.leaves, dn, own[1])

            return wait

        grads = ops.backward(
            dh, None, None, h, saved, inner, spec.but(initial_state=True, split=True), exchange
        )
        return *grads[:5], *(
            g.new_empty(0) if s is None else _choose(part.starts, g, 0.0)
            for g, s in zip(grads[5:], (x.C, x.n, x.m), strict=True)
        )


def _reduce(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """The sum over the ranks, in one exchange."""
    flat = torch.cat([x.reshape(-1) for x in tensors])
    dist.all_reduce(flat, group=group)
    parts = zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)
    return [part.view_as(x).clone() for part, x in parts]


_seen: dict[str, list[Any]] = {}  # by name: the group, the calls that agreed, comparisons so far


def _agree(x: Inputs, spec: CallSpec, ranks: Ranks) -> None:
    """ValueError in every rank unless all make the same call: compared once, by no collective."""
    group = ranks.group
    if x.cu_seqlens is not None and x.cu_seqlens.device.type == "cpu":  # of graphs, too
        check_offsets(x.cu_seqlens, x.q.shape[1], group.size())
    options = spec.options._replace(needs_grad=True, backend="", precision="")
    call = (options, ranks.reverse, *(None if t is None else (t.shape, t.dtype) for t in x))
    known = _seen.get(group.group_name)
    if known is None or known[0] is not group:
        known = _seen[group.group_name] = [group, set(), 0]
    if call in known[1]:
        return
    shapes = {n: (*t.shape, t.dtype) for n, t in x._asdict().items() if t is not None}
    said = str({"T": x.q.shape[1]} | shapes | options._asdict() | {"reverse": ranks.reverse})
    store = _compat.default_store()
    if store is None:
        return
    rank, key = group.rank(), f"tfla/{group.group_name}/{known[2]}"
    known[2] += 1
    store.set(f"{key}/{rank}", said)
    for other in range(group.size()):
        try:
            store.wait([f"{key}/{other}"], timedelta(seconds=SECONDS))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {other} of group did not follow rank {rank} within {SECONDS} s into the "
                f"call {said}: it has failed, or its shapes are others, used before."
            ) from error
        theirs = store.get(f"{key}/{other}").decode()
        if theirs != said:
            raise ValueError(
                "every rank of group must make the same call, with an equal share of T; got "
                f"{theirs} on rank {other}, {said} on rank {rank}."
            )
    known[1].add(call)


CALL = f"{ops.CALL}, str group, bool reverse) -> Tensor[]"


def _call(*args: Any) -> tuple[Inputs, CallSpec, Ranks]:
    *_, group, reverse = args
    return *ops.call_of(*args), Ranks(_compat.process_group(group), reverse)


@torch.library.custom_op("tfla::parallel_forward", mutates_args=(), schema=f"({CALL}")
def _forward_op(*args: Any) -> list[Tensor]:
    return list(forward(*_call(*args)))


@_forward_op.register_fake
def _(*args: Any) -> list[Tensor]:
    x, spec, ranks = _call(*args)
    N, H, K, V, P = spec.N, spec.H, spec.K, spec.V, 1 if spec.packed else spec.B

    def new(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return x.q.new_empty(shape, dtype=dtype or state_dtype(spec.dtype))

    def state(there: bool) -> list[Tensor]:
        n = [new(N, H, K), new(N, H)] if there and spec.normalize else [new(0), new(0)]
        return [new(N, H, K, V) if there else new(0), *n]

    saved = new(0)
    if spec.needs_grad:
        saved = new(*algorithm.backend_of(spec.backend).saved_shape(spec.but(split=True)))
    b = new(ranks.size, P, H, dtype=torch.float64)
    return [x.v.new_empty(x.v.shape), *state(spec.final_state), saved, *state(True), new(N, H), b]


BACK = f"(Tensor? dh, Tensor? dC, Tensor? dn, Tensor[] kept, {CALL}"


@torch.library.custom_op("tfla::parallel_backward", mutates_args=(), schema=BACK)
def _backward_op(dh: Any, dC: Any, dn: Any, kept: list[Tensor], *args: Any) -> list[Tensor]:
    return list(backward(dh, dC, dn, kept, *_call(*args)))


@_backward_op.register_fake
def _(dh: Any, dC: Any, dn: Any, kept: list[Tensor], *args: Any) -> list[Tensor]:
    return list(ops.gradients_like(*ops.call_of(*args)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.rest = inputs[9:]
    ctx.save_for_backward(*inputs[:9], output[0], *output[3:])
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: recomputation under a checkpoint allows no more
    tensors = saved[:9]
    found = torch.ops.tfla.parallel_backward(*grads[:3], list(saved[9:]), *tensors, *ctx.rest)
    return *ops.match(found, Inputs(*tensors)), *[None] * (1 + len(ctx.rest))


_forward_op.register_autograd(_backward_of_forward, setup_context=_setup_context)
_backward_op.register_autograd(lambda ctx, *_: ops.refuse_second_derivative())
