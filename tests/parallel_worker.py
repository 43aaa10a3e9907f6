"""One rank of tests/test_parallel.py: T split over ranks against one process, in fp64."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import ranks
import torch
import torch.distributed as dist
from problems import Case, Inputs, make_inputs, offsets, packed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tfla
from tfla import parallel

EXACT = 1e-10  # of the largest number in a result, in fp64


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.leaves().items()}


def results(
    case: Case,
    inputs: Inputs,
    c: Tensor | None,
    group: Any = None,
    wrap: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """h, the final state and all gradients, in whole: with a group, put together again."""
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    T = case.T // world
    own = slice(rank * T, (rank + 1) * T)
    leaves = leaves_of(inputs)
    for name in "qkvif":
        leaves[name] = leaves[name].detach()[:, own].clone().requires_grad_()
    cu = None if case.lengths is None else offsets(case.lengths)
    if cu is not None and group is not None:
        cu = torch.stack([cu, cu - 1], 1)[:, 0]  # strides may be any

    def call(leaves: dict[str, Tensor]) -> Any:
        state = inputs.memory and tfla.State(*(leaves.get(f"{x}0") for x in "Cnm"))
        return tfla.mlstm(
            *(leaves[x] for x in "qkvif"),
            input_gate=case.input_gate,
            normalize=case.normalize,
            scale=case.scale,
            initial_state=state,
            output_final_state=case.final,
            cu_seqlens=cu,
            reverse=case.reverse,
            backend=case.backend,
            group=group,
        )

    h, end = (wrap or (lambda f, x: f(x)))(call, leaves)
    loss = (h * inputs.dh[:, own]).sum()
    out = {"h": h.detach()}
    if case.final:
        # Every rank's loss takes its own share of the final state.
        share = (rank + 1) / (world * (world + 1) / 2)
        C, n, m = end
        if m is not None:
            gauge = (m.double() - c).exp()
            C, n = C * gauge[..., None, None], n * gauge[..., None]
            loss = loss + share * (n * inputs.G_n).sum()
            out["n"] = n.detach()
        loss = loss + share * (C * inputs.G_C).sum()
        out["C"] = C.detach()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, name
        out[f"d{name}"] = grad
    if group is None:
        return out
    for name, x in out.items():
        if name in ("h", "dq", "dk", "dv", "di", "df"):
            parts = [torch.empty_like(x) for _ in range(world)]
            dist.all_gather(parts, x.contiguous(), group=group)
            out[name] = torch.cat(parts, 1)
        elif name.endswith("0"):  # on the rank where a sequence begins
            dist.all_reduce(x, group=group)
    return out


def gauge_of(case: Case, inputs: Inputs) -> Tensor | None:
    state = inputs.memory and tfla.State(*inputs.memory)
    cu = None if case.lengths is None else offsets(case.lengths)
    _, end = tfla.mlstm(
        *(getattr(inputs, x) for x in "qkvif"),
        input_gate=case.input_gate,
        normalize=case.normalize,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu,
        reverse=case.reverse,
    )
    return end.m


def agrees(case: Case, wrap: Callable[..., Any] | None = None) -> Callable[[Any], None]:
    def check(group: Any) -> None:
        inputs = make_inputs(case)
        c = gauge_of(case, inputs)
        truth, ours = results(case, inputs, c), results(case, inputs, c, group, wrap)
        exact = EXACT if case.dtype == torch.float64 else 2e-5
        if case.gates == "swings":  # a difference of terms 1e6 times as large: see tests/checks.py
            truth.pop("dm0", None)
        for name, x in truth.items():
            assert ours[name].isfinite().all(), name
            error = (ours[name] - x).abs().max() / x.abs().max().clamp(min=1e-300)
            assert error <= exact, f"{name}: {error:.2e}"

    return check


def recomputed(call: Callable[..., Any], leaves: dict[str, Tensor]) -> Any:
    return checkpoint(call, leaves, use_reentrant=False)


def compiled(call: Callable[..., Any], leaves: dict[str, Tensor]) -> Any:
    return torch.compile(call, fullgraph=True, backend="aot_eager")(leaves)


# ------------------------------------------------------------------------------- errors


def raises(kind: type[Exception], words: str, act: Callable[[], object]) -> None:
    try:
        act()
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"no {kind.__name__}")


def uneven(group: Any) -> None:
    T = 8 + group.rank()
    x = [torch.randn(1, T, 2, *d) for d in ([4], [4], [4], [], [])]
    raises(ValueError, "equal share of T", lambda: tfla.mlstm(*x, group=group))


def other_heads(group: Any) -> None:
    x = [torch.randn(1, 8, 2 + group.rank(), *d) for d in ([4], [4], [4], [], [])]
    raises(ValueError, "the same call", lambda: tfla.mlstm(*x, group=group))


def wrong_offsets(group: Any) -> None:
    x = [torch.randn(1, 8, 2, *d) for d in ([4], [4], [4], [], [])]
    raises(
        ValueError, "that of the", lambda: tfla.mlstm(*x, group=group, cu_seqlens=offsets((4, 4)))
    )


def unread_offsets(group: Any) -> None:
    """As where the host does not read them: the tail of no sequence has zeros, whichever ranks it
    is on, and the rest is that of one process."""
    world, rank = group.size(), group.rank()
    T, N = 96, 2
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(1, T, 1, *d, generator=g) for d in ([16], [16], [16], [], [])]
    G_C, C, n = (torch.randn(N, 1, 16, *d, generator=g) for d in ([16], [16], []))
    state = tfla.State(C, n, torch.zeros(N, 1))
    real = parallel.check_offsets
    unchecked = (parallel, tfla.checks)  # type: ignore[attr-defined]
    for values in ([0, 20, 70], [0, 20, 40], [10, 30, 20]):
        ends = [0, max(values[:2]), max(values)]
        first = values[0]

        def run(cu: list[int], own: slice, group: Any, first: int = first) -> list[Tensor]:
            leaves = [t[:, own].clone().requires_grad_() for t in x]
            memory = state if group else tfla.State(*(torch.cat([s[:1], s, s[:1]]) for s in state))
            h, end = tfla.mlstm(
                *leaves,
                cu_seqlens=torch.tensor(cu),
                initial_state=memory,
                backend="triton",
                output_final_state=True,
                group=group,
            )
            C = (end.C * end.m.exp()[..., None, None])[slice(None) if group else slice(1, -1)]
            loss = (h * (1 + torch.arange(T)[own][None, :, None, None] % 5)).sum()
            share = (rank + 1) / (world * (world + 1) / 2) if group else 1.0
            grads = torch.autograd.grad(loss + share * (C * G_C).sum(), leaves)
            return [h.detach(), *grads, C.detach()]

        for module in unchecked:
            module.check_offsets = lambda *_: None
        try:
            own = slice(rank * T // world, (rank + 1) * T // world)
            got = run(values, own, group)
        finally:
            for module in unchecked:
                module.check_offsets = real
        *expected, C_end = run([0, first, *ends[1:], T], slice(None), None)
        torch.testing.assert_close(got[-1], C_end, rtol=1e-3, atol=1e-4)
        t = torch.arange(T)[own]
        inside = (t >= first) & (t < ends[-1])
        for a, b in zip(got, expected, strict=False):
            assert (a[:, ~inside] == 0).all(), values
            torch.testing.assert_close(a[:, inside], b[:, own][:, inside], rtol=1e-3, atol=1e-3)


def not_a_group(group: Any) -> None:
    x = [torch.randn(1, 8, 2, *d) for d in ([4], [4], [4], [], [])]
    raises(TypeError, "process group", lambda: tfla.mlstm(*x, group="context"))
    mine = dist.new_group([0])
    if group.rank():
        raises(TypeError, "this rank is in", lambda: tfla.mlstm(*x, group=mine))


def no_second_derivative(group: Any) -> None:
    x = [torch.randn(1, 8, 2, *d, requires_grad=True) for d in ([4], [4], [4], [], [])]
    h, _ = tfla.mlstm(*x, group=group)
    (dq,) = torch.autograd.grad(h.sin().sum(), x[:1], create_graph=True)
    raises(RuntimeError, "first derivatives", lambda: dq.sum().backward())


def one_exchange(group: Any) -> None:
    """A call gathers once in each direction, as many bytes for any T."""
    sizes: list[int] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real = getattr(dist, name)

    def counted(out: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(x.numel())
        return real(out, x, *args, **options)

    setattr(dist, name, counted)
    try:
        for T in (4, 100):
            x = [torch.randn(1, T, 2, *d, requires_grad=True) for d in ([4], [4], [8], [], [])]
            tfla.mlstm(*x, group=group)[0].sum().backward()
    finally:
        setattr(dist, name, real)
    assert sizes == [2 * (4 * 8 + 4 + 3)] * 4, sizes


BASE = Case(B=2, T=192, H=2, K=8, V=12)
CASES = {
    "exp": BASE,
    "sigmoid": dataclasses.replace(BASE, input_gate="sigmoid"),
    "sigmoid, normalised": dataclasses.replace(BASE, input_gate="sigmoid", normalize=True),
    "exp, not normalised": dataclasses.replace(BASE, normalize=False),
    "no states": dataclasses.replace(BASE, state=False, final=False),
    "a state out": dataclasses.replace(BASE, state=False),
    "a state in": dataclasses.replace(BASE, final=False),
    "one token a rank": dataclasses.replace(BASE, T=4),
    "a negative scale": dataclasses.replace(BASE, scale=-0.7),
    "fp32": dataclasses.replace(BASE, dtype=torch.float32),
    "packed": packed(100, 3, 60, 29),
    "packed, borders": packed(48, 48, 0, 48, 48, 0),
    "packed, one over all": packed(1, 190, 1),
    "packed, many": packed(*[7] * 27, 3),
    "packed, sigmoid": packed(70, 0, 100, 22, input_gate="sigmoid"),
    "packed, no states": packed(70, 0, 100, 22, state=False, final=False),
    "groups": dataclasses.replace(BASE, H=4, groups=2),
    "mirrored": dataclasses.replace(BASE, reverse=True),
    "mirrored, sigmoid": dataclasses.replace(BASE, reverse=True, input_gate="sigmoid"),
    "mirrored, no states": dataclasses.replace(BASE, reverse=True, state=False, final=False),
    "mirrored, packed": packed(100, 3, 60, 29, reverse=True),
    "mirrored, packed, borders": packed(48, 48, 0, 48, 48, 0, reverse=True),
    "mirrored, packed, groups": packed(1, 190, 1, H=4, groups=1, reverse=True),
}
CHECKS = {name: agrees(case) for name, case in CASES.items()}
for kind in ("initial", "infinite", "resets 50%", "swings", "f=-1e5", "f=+30", "i=-95", "i=+95"):
    for gate in ("exp", "sigmoid"):
        case = dataclasses.replace(BASE, T=128, gates=kind, input_gate=gate)
        CHECKS[f"{kind}, {gate}"] = agrees(case)
        lengths = {"lengths": (50, 70, 8), "B": 1}
        CHECKS[f"{kind}, {gate}, packed"] = agrees(dataclasses.replace(case, **lengths))
for gate in ("exp", "sigmoid"):
    case = dataclasses.replace(BASE, T=80, input_gate=gate)
    CHECKS[f"recomputed, {gate}"] = agrees(case, recomputed)
    CHECKS[f"compiled, {gate}"] = agrees(case, compiled)
CHECKS["compiled, packed"] = agrees(packed(40, 23, 17), compiled)
CHECKS["compiled, mirrored"] = agrees(packed(40, 23, 17, reverse=True), compiled)
CHECKS |= {
    "uneven": uneven,
    "other heads": other_heads,
    "wrong offsets": wrong_offsets,
    "not a group": not_a_group,
    "no second derivative": no_second_derivative,
    "one exchange": one_exchange,
}

# In Triton's interpreter, which takes long.
SMALL = Case(B=1, T=96, H=1, K=16, V=16, dtype=torch.float32, backend="triton")
TRITON = {
    "exp": agrees(SMALL),
    "sigmoid": agrees(dataclasses.replace(SMALL, input_gate="sigmoid")),
    "packed": agrees(dataclasses.replace(SMALL, lengths=(20, 70, 6))),
    "packed, sigmoid": agrees(
        dataclasses.replace(SMALL, lengths=(20, 70, 6), input_gate="sigmoid", final=False)
    ),
    "offsets that no host has read": unread_offsets,
}


def checks(world: int) -> dict[str, Callable[[Any], None]]:
    """What takes long or does not depend on the number of ranks, on two of them."""
    if os.environ.get("TRITON_INTERPRET"):
        return TRITON
    short = [n for n in CHECKS if not n.startswith(("compiled", "recomputed", "no second"))]
    short = [n for n in short if "packed" in n or not n.endswith((", exp", ", sigmoid"))]
    return {n: CHECKS[n] for n in (CHECKS if world == 2 else short)}


if __name__ == "__main__":
    plans: Any = contextlib.nullcontext()
    if os.environ.get("TRITON_INTERPRET"):
        from interpreter.planned import short_scans

        plans = short_scans()
    with plans:
        ranks.main(checks(int(os.environ["WORLD_SIZE"])))
