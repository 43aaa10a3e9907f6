"""T split over ranks equals one process; the checks are in parallel_worker.py, which ranks run."""

import pytest
import ranks
import torch
from parallel_worker import TRITON, checks

from tfla import gates, parallel


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    outcome = ranks.run("parallel_worker", world)
    assert outcome.keys() == checks(world).keys()
    assert not ranks.failures(outcome)


def test_ranks_equal_one_process_in_triton() -> None:
    pytest.importorskip("triton")
    outcome = ranks.run("parallel_worker", 2, TRITON_INTERPRET="1")
    assert outcome.keys() == TRITON.keys()
    assert not ranks.failures(outcome)


@pytest.mark.parametrize("T", [1, 7, 64, 1024, 6144])
def test_the_sum_of_all_behind_is_the_same_in_pieces(T: int) -> None:
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(2, 3, T, generator=generator, dtype=torch.float64)
    x[..., T // 2] = -1e5  # nothing behind it may feel its rounding
    whole = x.flip(-1).cumsum(-1).flip(-1) - x
    found = gates.behind(x)
    assert found[..., -1].abs().max() == 0
    torch.testing.assert_close(found, whole, rtol=1e-14, atol=1e-10)
    torch.testing.assert_close(found[..., T // 2 :], whole[..., T // 2 :], rtol=0, atol=1e-10)


def test_a_sum_of_tokens_in_bf16_is_exact_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU makes it, but for its product of bf16 with sums in fp32, which CPUs do not have."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 384, 3, 64, generator=g).bfloat16()
    w = torch.rand(2, 384, 3, generator=g)
    exact = torch.einsum("bth,bthx->bhx", w.double(), x.double())
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: bmm(a.to(out_dtype), b.to(out_dtype)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = parallel._sum_of(x, w, torch.float32)
    monkeypatch.undo()
    assert (found - exact).norm() < 1e-6 * exact.norm()
