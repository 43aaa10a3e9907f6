"""Any strides, shared memory and views: the same numbers, and nothing written into the inputs."""

import pytest
import torch
from checks import (
    assert_close,
)
from problems import Case, make_inputs

import tfla


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same (B,T,H,...) values in other strides."""
    order = (0, 2, 1, *range(3, x.ndim)) if x.ndim > 2 else (1, 0)
    views = {
        "head-first": x.permute(order).contiguous().permute(order),
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": torch.stack([x, x + 1], -1)[..., 0],
        "part of a wider row": torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
        "last axis first": x.permute(-1, *range(x.ndim - 1))
        .contiguous()
        .permute(*range(1, x.ndim), 0),
        "shifted storage": torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape),
    }
    for view in views.values():
        assert torch.equal(view, x)
    return views


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize(
    "layout",
    [
        "head-first",
        "time first",
        "every second",
        "part of a wider row",
        "last axis first",
        "shifted storage",
    ],
)
def test_any_strides(layout: str, gate: str) -> None:
    x = make_inputs(Case(T=66, H=3, input_gate=gate))

    def run(*tensors: torch.Tensor, dh: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        h, end = tfla.mlstm(
            *leaves[:5],
            input_gate=gate,
            initial_state=tfla.State(*leaves[5:], *[None] * (8 - len(leaves))),
            output_final_state=True,
        )
        return [h, end.C, *torch.autograd.grad([h, end.C], leaves, [dh, x.G_C])]

    plain = [x.q, x.k, x.v, x.i, x.f, *(s for s in x.memory if s is not None)]
    strided = [layouts(t)[layout] for t in plain]
    expected, got = run(*plain, dh=x.dh), run(*strided, dh=layouts(x.dh)[layout])
    for a, b in zip(expected, got, strict=True):
        assert_close(b, a, 1e-13, layout)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_tensors_and_an_expanded_cotangent(axis: int) -> None:
    """Strides of 0: one key for all heads, one gate for all tokens, the cotangent of a sum."""
    x = make_inputs(Case(T=66, B=2, H=3))
    small = [t.narrow(axis, 0, 1).clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
    shapes = [t.shape for t in (x.q, x.k, x.v, x.i, x.f)]

    def run(copy: bool) -> list[torch.Tensor]:
        wide = [t.expand(s) for t, s in zip(small, shapes, strict=True)]
        h, _ = tfla.mlstm(*(t.contiguous() if copy else t for t in wide))
        loss = h.sum() if not copy else (h * torch.ones_like(h)).sum()
        return [h, *torch.autograd.grad(loss, small)]

    for a, b in zip(run(True), run(False), strict=True):
        assert_close(b, a, 1e-12)


def test_inputs_are_left_alone() -> None:
    x = make_inputs(Case(T=70, dtype=torch.float32))
    state = tfla.State(*x.memory)
    args = [x.q, x.k, x.v, x.i, x.f, *state]
    before = [a.clone() for a in args]
    leaves = [a.requires_grad_() for a in args]
    h, end = tfla.mlstm(*leaves[:5], initial_state=tfla.State(*leaves[5:]), output_final_state=True)
    (h.sum() + end.C.sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
