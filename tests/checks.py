"""One problem, run by the package and held against the fp64 recurrence: any device, any backend.

`check_against_recurrence(Case(...))` makes the inputs from a seed, runs `tfla`, the recurrence in
fp64 (the truth) and, below fp64, the recurrence in the case's own dtype (the yardstick), and
compares h, the final state and all eight gradients of

    L = <dh, h> + <G_C, C exp(m - c)> + <G_n, n exp(m - c)>

with random dh, G_C, G_n and a constant c. Nothing in L depends on the gauge of the final state, and
no norm layer hides a missing term.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import recurrence as oracle
import torch
from problems import Case, Inputs, make_inputs, offsets
from torch import Tensor

import tfla

EXACT = 1e-9  # relative, in fp64
RATIO = 2.0  # below fp64: this many times the error of the plain recurrence in the same dtype
CANCELLING = ("f=-12", "swings")  # regimes that need an absolute floor: see `cancellation`
OUTLIER = 16.0  # the same for rows that are ill-conditioned by chance


# h, C and n (as C e^(m-c), n e^(m-c)), m, and a gradient d<leaf> for every leaf; fp64, on the CPU.
Results = dict[str, Tensor]


def _results(
    inputs: Inputs, leaves: dict[str, Tensor], h: Tensor, end: object, c: Tensor | None
) -> Results:
    """The loss, its gradients, everything brought home to fp64 on the CPU. c (N,H)."""
    out = {"h": h.detach().cpu().double()}
    loss = (h.double() * inputs.dh.to(h.device).double()).sum()
    if end is not None:
        C, n, m = end  # type: ignore[misc]
        C = C.double()
        if m is not None:
            gauge = (m.double() - c.to(m.device)).exp()  # type: ignore[union-attr]
            C, n = C * gauge[..., None, None], n.double() * gauge[..., None]
            loss = loss + (n * inputs.G_n.to(n.device)).sum()
            out |= {"n": n.detach().cpu(), "m": m.detach().cpu().double()}
        loss = loss + (C * inputs.G_C.to(C.device)).sum()
        out["C"] = C.detach().cpu()
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    else:  # no tokens and no state: nothing depends on anything
        grads = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, name
        out[f"d{name}"] = grad.cpu().double()
    return out


def run_recurrence(
    case: Case, inputs: Inputs, dtype: torch.dtype, c: Tensor | None = None
) -> tuple[Results, Tensor | None]:
    """The recurrence in `dtype` on the inputs of the case; also the gauge c (its own m in fp64)."""
    as_leaf = dtype if dtype == torch.float64 else None
    leaves = {
        name: x.detach().to(as_leaf or x.dtype).clone().requires_grad_()
        for name, x in inputs.leaves().items()
    }
    memory = inputs.memory and oracle.Memory(*(leaves.get(f"{x}0") for x in "Cnm"))  # type: ignore[arg-type]
    tokens = {x: mirrored(leaves[x], case) for x in "qkvif"}
    for x in "qk":  # by every head of v in turn
        tokens[x] = tokens[x].repeat_interleave(case.H // tokens[x].shape[2], 2)
    h, end = oracle.mlstm(
        **tokens,
        input_gate=case.input_gate,
        normalize=case.normalize,
        scale=case.scale,
        memory=memory,
        lengths=case.lengths,
        dtype=dtype,
    )
    if c is None and end.m is not None:
        c = end.m.detach().double()
    return _results(inputs, leaves, mirrored(h, case), end if case.final else None, c), c


def mirrored(x: Tensor, case: Case) -> Tensor:
    """x (B, T, ...) with every document in the order in which the case runs through it."""
    if not case.reverse:
        return x
    documents = x.split(case.lengths, 1) if case.lengths else [x]
    return torch.cat([document.flip(1) for document in documents], 1)


def run_tfla(case: Case, inputs: Inputs, c: Tensor | None) -> Results:
    leaves = {
        name: x.detach().to(case.device, copy=True).requires_grad_()
        for name, x in inputs.leaves().items()
    }
    state = inputs.memory and tfla.State(*(leaves.get(f"{x}0") for x in "Cnm"))  # type: ignore[arg-type]
    h, end = tfla.mlstm(
        *(leaves[x] for x in "qkvif"),
        input_gate=case.input_gate,
        normalize=case.normalize,
        scale=case.scale,
        initial_state=state,
        output_final_state=case.final,
        cu_seqlens=None if case.lengths is None else offsets(case.lengths, device=case.device),
        reverse=case.reverse,
        backend=case.backend,
    )
    assert h.dtype == case.dtype and h.shape == inputs.v.shape
    if case.final:
        assert isinstance(end, tfla.State)
        expected = (case.state_dtype,) * 3 if case.normalized else (case.state_dtype, None, None)
        assert tuple(x if x is None else x.dtype for x in end) == expected
    else:
        assert end is None
    return _results(inputs, leaves, h, end, c)


def rows(name: str, x: Tensor, case: Case) -> list[Tensor]:
    """A result cut into what each sequence and head has of it, flattened."""
    over_tokens = name in ("h", "dq", "dk", "dv", "di", "df")
    if not over_tokens:  # (N,H,...)
        return list(x.reshape(case.rows * case.H, -1)) if x.numel() else []
    documents = x.split(case.lengths, 1) if case.lengths else x.split(1)
    heads = range(x.shape[2])
    return [document[:, :, head].flatten() for document in documents for head in heads]


def cancellation(
    name: str, case: Case, inputs: Inputs, truth: Results, *, independent: bool = False
) -> list[float]:
    """Row by row, how large the terms are that a gradient is the difference of (as a norm).
    independent: for df, if the rounding of each of its terms knows nothing of the others'.

    df_t is a sum over all later tokens of q . dq - k . dk, and dm0 the sum of <C0, dC0> and
    <n0, dn0>. Either may be any number of orders of magnitude smaller than its terms (f = -12:
    e^-12), and no rounding of the terms can be undone by it. Every other result is a plain sum: 0.
    """
    if name == "df" and independent:
        # df_t = slope_t (sum of q . dq - k . dk from t on, and <C_T, dC_T> + <n_T, dn_T>): dq, dk
        # and the final state are results of their own, each of whose entries is rounded.
        slopes = torch.sigmoid(-inputs.f.double())
        terms = (inputs.q.double() * truth["dq"]).square().sum(-1)
        terms += (inputs.k.double() * truth["dk"]).square().sum(-1)
        pairs = zip(rows("df", terms, case), rows("df", slopes, case), strict=True)
        return [
            ((squares_of_later(t, 0) + end).sqrt() * slope).norm().item()
            for (t, slope), end in zip(pairs, final_terms(case, inputs, truth), strict=True)
        ]
    if name == "df":
        products = (inputs.q.double() * truth["dq"]).abs()
        terms = rows("dq", products.repeat_interleave(case.H // products.shape[2], 2), case)
        T = [len(row) for row in rows("df", truth["df"], case)]
        return [t.sum().item() * math.sqrt(n) for t, n in zip(terms, T, strict=True)]
    if name == "dm0":
        return terms_of_dm0(case, inputs, truth["dC0"], truth["dn0"])
    return [0.0] * len(rows(name, truth[name], case))


def squares_of_later(squares: Tensor, dim: int) -> Tensor:
    """The sum over each token and all later ones: the square of the size of a sum of roundings."""
    return squares.flip(dim).cumsum(dim).flip(dim)


def final_terms(case: Case, inputs: Inputs, truth: Results) -> list[float]:
    """Row by row, the sum of squares of the terms of <C_T, dC_T> + <n_T, dn_T>."""
    if not case.final:
        return [0.0] * (case.rows * case.H)
    parts = [truth["C"] * inputs.G_C]
    if "n" in truth:
        parts.append(truth["n"] * inputs.G_n)
    squares = [[row.square().sum().item() for row in rows("C", part, case)] for part in parts]
    return [sum(each) for each in zip(*squares, strict=True)]


def terms_of_dm0(case: Case, inputs: Inputs, dC: Tensor, dn: Tensor) -> list[float]:
    """Row by row, the norm of the terms of dm0: the entries of dC0 and dn0 are rounded one by one,
    so what that makes of dm0 adds up in squares."""
    C, n, _ = inputs.memory  # type: ignore[misc]
    parts = C.double() * dC, n.double() * dn
    norms = [[row.norm().item() for row in rows("dC0", part, case)] for part in parts]
    return [math.hypot(a, b) for a, b in zip(*norms, strict=True)]


def failures(
    ours: Results,
    truth: Results,
    plain: Results | None,
    case: Case,
    inputs: Inputs,
    floor_eps: float,
    independent: bool = False,
) -> list[str]:
    """One line for every result that breaks the rule; empty when all hold.

    In fp64 (plain is None) every row must be right. Below, and for a truth that is one digit off,
    the error of a row is compared with plain's: typically (geometric mean over the rows) at most
    RATIO times as large. A mean of squares would compare two single roundings instead, those of the
    one row where n . q happens to lie nearest to 0, so it is only held to OUTLIER.
    """
    lines = []
    for name in truth:
        if name == "m":  # a gauge, its size is the package's own choice
            continue
        # What is merely rounded to the dtype of the result is right, whatever the yardstick did.
        kind = torch.finfo(_dtype_of(name, inputs))
        eps = max(EXACT, kind.eps) if plain is None else kind.eps
        logs, squares, bad = [], [], 0.0
        sides = [rows(name, x[name], case) for x in (ours, truth, plain or truth)]
        terms = cancellation(name, case, inputs, truth, independent=independent)
        missed = [0.0] * len(terms)
        if name == "dm0" and plain is not None:
            # One number a row: how well the recurrence happens to hit it judges nothing, how well
            # it hits what that is a sum of does.
            off = (plain[x] - truth[x] for x in ("dC0", "dn0"))
            missed = terms_of_dm0(case, inputs, *off)
        for x, y, z, term, miss in zip(*sides, terms, missed, strict=True):
            floor = max(floor_eps * term, eps * y.norm().item(), kind.tiny * math.sqrt(y.numel()))
            err, yardstick = distance(x, y), max(distance(z, y), miss, floor / RATIO)
            if not math.isfinite(yardstick):
                lines.append(f"{name}: the plain recurrence is not finite and judges nothing")
                break
            bad = max(bad, err / floor if floor else 0.0)
            logs.append(math.log(max(err, floor / RATIO) / yardstick) if floor else 0.0)
            squares.append((err**2, yardstick**2))
        if plain is None:
            if not bad <= 1.0:
                lines.append(f"{name}: {bad:.2g} times the error allowed")
            continue
        typical = math.exp(sum(logs) / max(len(logs), 1))
        total = math.sqrt(sum(a for a, _ in squares) / max(sum(b for _, b in squares), 1e-300))
        if not (typical <= RATIO and total <= OUTLIER):
            lines.append(f"{name}: typically {typical:.2f}, in all {total:.2f} times plain's error")
    return lines


def distance(x: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference; infinite where x is not finite."""
    d = (x - truth).norm().item()
    return d if math.isfinite(d) else math.inf


def _dtype_of(name: str, inputs: Inputs) -> torch.dtype:
    if name == "h":
        return inputs.v.dtype
    leaf = inputs.leaves().get(name[1:])
    return torch.float32 if leaf is None else leaf.dtype


def run_one_digit_off(case: Case, inputs: Inputs, c: Tensor | None) -> Results:
    """The truth of inputs whose last fp64 digits are changed.

    Where n . q comes to lie near 0 by chance and exp(-m) is tiny (i = +95), h and its gradients are
    a division by almost zero: one digit moves them by more than 1e-9, and the recurrence itself
    knows them no better.
    """
    return run_moved(case, inputs, c, torch.finfo(torch.float64).eps, "qkvif", "Cnm")


def run_moved(
    case: Case, inputs: Inputs, c: Tensor | None, eps: float, tokens: Sequence[str], states: str
) -> Results:
    """The truth of inputs of which every number of ``tokens`` and ``states`` is off by eps of its
    size."""
    g = torch.Generator().manual_seed(case.seed)

    def moved(x: Tensor) -> Tensor:
        sign = torch.randn(x.shape, generator=g, dtype=torch.float64).sign()
        return x.double() * (1 + eps * sign)

    memory = inputs.memory and oracle.Memory(
        *(
            x if x is None else moved(x) if name in states else x.double()
            for name, x in zip("Cnm", inputs.memory, strict=True)
        )
    )
    near = inputs.to(torch.float64)
    changed = {name: moved(getattr(inputs, name)) for name in tokens}
    return run_recurrence(
        case, dataclasses.replace(near, memory=memory, **changed), torch.float64, c
    )[0]


def check_against_recurrence(
    case: Case, *, plain_dtype: torch.dtype | None = None, floor_eps: float | None = None
) -> None:
    """h, final state and all gradients: 1e-9 in fp64, below it twice the plain recurrence's error.

    plain_dtype: what the plain recurrence computes in (default: the case's dtype; fp32 makes a
    harder yardstick of a bf16 case, since then only its results are rounded). floor_eps: the
    rounding of one term of df and dm0 (default: that of the state's dtype; 0 below fp64 unless the
    gates are CANCELLING).
    """
    inputs = make_inputs(case)
    truth, c = run_recurrence(case, inputs, torch.float64)
    exact = case.dtype == torch.float64
    plain = None if exact else run_recurrence(case, inputs, plain_dtype or case.dtype, c)[0]
    if floor_eps is None:
        needed = exact or case.gates in CANCELLING
        floor_eps = torch.finfo(case.state_dtype).eps if needed else 0.0
    ours = run_tfla(case, inputs, c)
    assert all(torch.isfinite(t).all() for t in ours.values()), f"{case}: not finite"
    broken = failures(ours, truth, plain, case, inputs, floor_eps)
    if broken and exact:
        near = run_one_digit_off(case, inputs, c)
        beyond = {
            line.split(":")[0] for line in failures(ours, truth, near, case, inputs, floor_eps)
        }
        broken = [line for line in broken if line.split(":")[0] in beyond]
    assert not broken, f"{case}\n" + "\n".join(broken)


def check_sixteen_bits(case: Case) -> None:
    """fp32 with products of 16 bits: at most twice as far from the truth as the truth is where q,
    k, v, dh, C and n are off by half of the last of 16 bits. A gradient that cancels has the
    rounding of its terms for a floor, each by itself."""
    inputs = make_inputs(case)
    truth, c = run_recurrence(case, inputs, torch.float64)
    broken = sixteen_bits(run_tfla(case, inputs, c), truth, case, inputs, c)
    assert not broken, f"{case}\n" + "\n".join(broken)


def sixteen_bits(
    ours: Results, truth: Results, case: Case, inputs: Inputs, c: Tensor | None
) -> list[str]:
    near = run_moved(case, inputs, c, 2**-17, ("q", "k", "v", "dh"), "Cn")
    return failures(ours, truth, near, case, inputs, 2**-17, independent=True)


def assert_close(x: Tensor, y: Tensor, relative: float = 1e-11, what: str = "") -> None:
    """Two ways of computing the same thing agree, in norm and at the worst place."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    assert x.shape == y.shape, f"{what}: {tuple(x.shape)} and {tuple(y.shape)}"
    assert torch.isfinite(x).all() and torch.isfinite(y).all(), f"{what}: not finite"
    if x.numel():
        worst, biggest = (x - y).abs().max().item(), y.abs().max().item()
        assert worst <= relative * biggest, f"{what}: {worst:.2e} apart at a size of {biggest:.2e}"


def true_size(state: tfla.State, c: Tensor | float = 0.0) -> list[Tensor]:
    """[C e^(m-c), n e^(m-c)] in fp64, or [C]: what a state means, whatever its gauge."""
    C, n, m = state
    if n is None or m is None:
        return [C.double()]
    gauge = (m.double() - c).exp()
    return [C.double() * gauge[..., None, None], n.double() * gauge[..., None]]


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """`torch.empty` hands out NaN, so that a result that nobody wrote is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    was, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(was, warn_only=warn)


def sequence(case: Case) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """The call of the case as a function of its leaves: [h], or [h, C] where the end is wanted."""
    cu = None if case.lengths is None else offsets(case.lengths)

    def fn(leaves: dict[str, Tensor]) -> list[Tensor]:
        state = tfla.State(leaves["C0"], leaves.get("n0"), leaves.get("m0")) if case.state else None
        h, end = tfla.mlstm(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            leaves["i"],
            leaves["f"],
            input_gate=case.input_gate,
            normalize=case.normalize,
            initial_state=state,
            output_final_state=case.final,
            cu_seqlens=cu,
        )
        return [h] if end is None else [h, end.C]

    return fn


def results(fn: Callable, leaves: dict[str, Tensor], x: Inputs) -> list[Tensor]:
    """What fn(leaves) gives, and every gradient of it."""
    out = fn(leaves)
    cotangents = [g.to(y.dtype) for y, g in zip(out, (x.dh, x.G_C), strict=False)]
    return [*out, *torch.autograd.grad(out, list(leaves.values()), cotangents)]
