"""Gates of any size, what is not finite, and the smallest of scales, on the backend "reference"
and in the specification; kernels/test_extreme_kernels.py runs the same on "triton"."""

import extreme
import pytest
import torch
from checks import assert_close, one_thread
from extreme import GATES, INF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tfla
from tfla import reference

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def operands(T: int, dtype: torch.dtype, K: int = 5, V: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(T)
    return [
        torch.randn(1, T, 1, size, generator=g, dtype=torch.float64).to(dtype) for size in (K, K, V)
    ]


def run(
    i: list[float], f: list[float], dtype: torch.dtype, how: str, backend: str, repeat: int = 1
) -> tuple[Tensor, tfla.State, list[Tensor]]:
    """(h, state, gradients) of a sequence in one call, in two, or by steps."""
    T = len(i)
    q, k, v = operands(T, dtype)
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    i_, f_ = (torch.tensor(x, dtype=gate).view(1, T, 1) for x in (i, f))
    x = [t.requires_grad_() for t in (q, k, v, i_, f_)]
    options = {"backend": backend, "scale": 1.0}
    if how == "whole":
        h, state = tfla.mlstm(*x, output_final_state=True, **options)
    elif how == "split":
        cut, state, parts = (T + 1) // 2, None, []
        for piece in (slice(0, cut), slice(cut, T)):
            part, state = tfla.mlstm(
                *(t[:, piece] for t in x), initial_state=state, output_final_state=True, **options
            )
            parts.append(part)
        h = torch.cat(parts, 1)
    else:
        with torch.no_grad():
            state = tfla.State(*(torch.zeros(1, 1, *s, dtype=gate) for s in ((5, 3), (5,), ())))
            parts = []
            for t in range(T):
                part, state = tfla.mlstm_step(*(y[:, t] for y in x), state, **options)
                parts.append(part)
            return torch.stack(parts, 1), state, []
    h.double().sum().backward()
    return h.detach(), tfla.State(*(s.detach() for s in state)), [t.grad for t in x]


def check(
    i: list[float], f: list[float], dtype: torch.dtype, how: str, backend: str, relative: float
) -> None:
    q, k, v = (x[0, :, 0] for x in operands(len(i), dtype))
    answer = extreme.truth(q, k, v, i, [extreme.log_sigmoid(x) for x in f], True)
    h, (C, n, m), grads = run(i, f, dtype, how, backend)
    assert all(torch.isfinite(x).all() for x in (h, C, n, m, *grads)), (h, C, n, m, grads)
    # The largest den is the largest number there is, so what is divided by exp(1e30) is not 0.
    near = torch.finfo(m.dtype).tiny * 10.0
    worst = (h[0, :, 0].double() - answer.h).abs().max()
    assert worst <= relative * answer.h.abs().max() + near, (h[0, :, 0], answer.h)
    if m.abs().max() < 80.0:
        size = m.double().exp()[0, 0]
        assert_close(C[0, 0].double() * size, answer.C, relative, "C")
        assert_close(n[0, 0].double() * size, answer.n, relative, "n")
    if not any(x >= -extreme.LIMIT for x in i):
        assert (C == 0).all() and (n == 0).all() and (how != "whole" or (m == 0).all())


@pytest.mark.parametrize("how", ["whole", "split", "steps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GATES)
def test_gates_of_any_size(name: str, dtype: torch.dtype, how: str) -> None:
    relative = 1e-9 if dtype == torch.float64 else 3e-5
    i, f = map(list, GATES[name])
    check(i, f, dtype, how, "reference", relative)


@pytest.mark.parametrize("name", GATES)
def test_the_specification_is_right_for_gates_of_any_size(name: str) -> None:
    i, f = map(list, GATES[name])
    q, k, v = operands(len(i), torch.float64)
    log_f = [extreme.log_sigmoid(x) for x in f]
    gates = (torch.tensor(x, dtype=torch.float64).view(1, -1, 1) for x in (i, log_f))
    zeros = (torch.zeros(1, 1, *s, dtype=torch.float64) for s in ((5, 3), (5,), ()))
    h = reference.recurrence(q, k, v, *gates, *zeros, 1.0)[0]
    answer = extreme.truth(q[0, :, 0], k[0, :, 0], v[0, :, 0], i, log_f, True)
    assert_close(h[0, :, 0], answer.h, 1e-9)
