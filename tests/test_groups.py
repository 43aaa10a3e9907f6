"""The family in its own shapes: q and k with fewer heads than v, and mirrored sequences."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from checks import check_against_recurrence
from problems import Case, make_inputs, offsets, packed, variants
from torch import Tensor

import tfla

SHAPES = {
    "one group": Case(H=4, groups=1),
    "two groups": Case(H=4, groups=2, T=130),
    "groups, packed": packed(70, 0, 1, 25, H=4, groups=2),
    "mirrored": Case(reverse=True, T=130),
    "mirrored, no states": Case(reverse=True, state=False, final=False),
    "mirrored, packed": packed(70, 0, 1, 25, reverse=True),
    "mirrored groups": Case(H=6, groups=2, reverse=True),
    "mirrored groups, packed": packed(3, 66, H=4, groups=1, reverse=True),
    "mirrored, resets": Case(reverse=True, gates="resets 50%"),
    "no tokens": Case(T=0, H=4, groups=2, reverse=True),
    "one token": Case(T=1, H=4, groups=2, reverse=True),
}


@variants
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_recurrence(shape: str, input_gate: str, normalize: bool | None) -> None:
    fields = {"input_gate": input_gate, "normalize": normalize}
    check_against_recurrence(dataclasses.replace(SHAPES[shape], **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
def test_narrow_dtypes(groups: int, dtype: torch.dtype) -> None:
    """Sums of dq and dk over four heads, made in fp32: with no more error than the plain one."""
    check_against_recurrence(Case(H=8, groups=groups, T=90, dtype=dtype, reverse=True))


def test_a_group_is_its_heads_with_q_and_k_repeated() -> None:
    x = make_inputs(Case(H=6, groups=2, T=80))
    tokens = x.q, x.k, x.v, x.i, x.f
    wide = *(t.repeat_interleave(3, 2) for t in (x.q, x.k)), x.v, x.i, x.f
    assert torch.equal(tfla.mlstm(*tokens)[0], tfla.mlstm(*wide)[0])


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("scale", [None, -0.7])
def test_steps_of_groups(scale: float | None, grad: bool, inplace: bool) -> None:
    """Token by token the same as the whole sequence."""
    if grad and inplace:
        pytest.skip("refused: autograd needs the old state")
    case = Case(H=4, groups=2, T=6, state=False)
    x = make_inputs(case)
    tokens = [t.requires_grad_(grad) for t in (x.q, x.k, x.v, x.i, x.f)]
    whole, end = tfla.mlstm(*tokens, scale=scale, output_final_state=True)
    C, n, m = (torch.zeros(2, 4, *size, dtype=torch.float64) for size in ((12, 10), (12,), ()))
    state = tfla.State(C, n, m)
    rows = []
    for t in range(case.T):
        h, state = tfla.mlstm_step(*(y[:, t] for y in tokens), state, scale=scale, inplace=inplace)
        rows.append(h)
    assert end is not None
    torch.testing.assert_close(torch.stack(rows, 1), whole, rtol=1e-10, atol=1e-12)
    ours, theirs = (s.C * s.m.exp()[..., None, None] for s in (state, end))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if grad:
        loss = [(torch.stack(rows, 1) * x.dh).sum(), (whole * x.dh).sum()]
        for a, b in zip(*(torch.autograd.grad(y, tokens) for y in loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def linear(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **rest: object) -> Tensor:
    decay = torch.nn.functional.logsigmoid(f)
    return tfla.linear_attention(q, k, v, decay, i, **rest)[0]  # type: ignore[arg-type]


def mlstm(*tokens: Tensor, **rest: object) -> Tensor:
    return tfla.mlstm(*tokens, **rest)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [mlstm, linear])
@pytest.mark.parametrize("lengths", [None, (20, 0, 41, 4)])
def test_a_mirror_is_a_flip(
    function: Callable[..., Tensor], lengths: tuple[int, ...] | None
) -> None:
    """Bit for bit, gradients too: the same arithmetic on the same numbers."""
    x = make_inputs(Case(T=65, B=1, dtype=torch.float32))
    cu = None if lengths is None else offsets(lengths)
    back = None if lengths is None else offsets(lengths[::-1])
    results = []
    for reverse in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
        if reverse:
            h = function(*leaves, cu_seqlens=cu, reverse=True)
        else:
            h = function(*(t.flip(1) for t in leaves), cu_seqlens=back).flip(1)
        results.append((h, *torch.autograd.grad((h * x.dh).sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_mirrored_sequence_in_two_pieces() -> None:
    """The state behind the later half is where the earlier half begins."""
    x = make_inputs(Case(T=90, H=4, groups=2, state=False))
    tokens = x.q, x.k, x.v, x.i, x.f
    whole, end = tfla.mlstm(*tokens, reverse=True, output_final_state=True)
    later, state = tfla.mlstm(*(t[:, 40:] for t in tokens), reverse=True, output_final_state=True)
    earlier, last = tfla.mlstm(
        *(t[:, :40] for t in tokens), reverse=True, initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(torch.cat([earlier, later], 1), whole, rtol=1e-10, atol=1e-12)
    assert end is not None and last is not None and end.m is not None and last.m is not None
    C, D = (s.C * s.m.exp()[..., None, None] for s in (end, last) if s.m is not None)
    torch.testing.assert_close(C, D, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reverse", [True, False])
def test_in_one_graph(reverse: bool) -> None:
    x = make_inputs(Case(T=33, H=4, groups=2, state=False))

    def call(*tokens: Tensor) -> Tensor:
        return tfla.mlstm(*tokens, reverse=reverse)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, call):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
        h = function(*leaves)
        results.append((h, *torch.autograd.grad((h * x.dh).sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_any_strides_of_groups() -> None:
    """Head-first tensors, by transpose, and q and k as views of one projection."""
    x = make_inputs(Case(T=20, H=4, groups=2))
    both = torch.stack([x.q, x.k], -1)
    first = [
        both[..., 0],
        both[..., 1],
        *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.v, x.i, x.f)),
    ]
    for reverse in (False, True):
        plain = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, reverse=reverse)[0]
        assert torch.equal(tfla.mlstm(*first, reverse=reverse)[0], plain)


def test_calls_that_are_alike_but_for_the_direction() -> None:
    """What is remembered of one call is not taken for another."""
    x = make_inputs(Case(T=9, state=False))
    tokens = x.q, x.k, x.v, x.i, x.f
    seen = [tfla.mlstm(*tokens, reverse=r)[0] for r in (False, True, False, True)]
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
