"""What models are trained and served with: autocast, checkpointing, DDP, inference mode."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checks import (
    assert_close,
    true_size,
)
from problems import Case, make_inputs, variants
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tfla


class Layer(torch.nn.Module):
    """The smallest model: projections, one mlstm, a projection back."""

    def __init__(self, D: int, H: int, K: int) -> None:
        super().__init__()
        self.H = H
        self.qkv = torch.nn.Linear(D, 3 * H * K)
        self.gates = torch.nn.Linear(D, 2 * H)
        self.out = torch.nn.Linear(H * K, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.H, -1).unbind(2)
        i, f = self.gates(x).view(B, T, 2, self.H).unbind(2)
        h, _ = tfla.mlstm(q, k, v, i, f)
        return self.out(h.reshape(B, T, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_v_and_nothing_else(dtype: torch.dtype) -> None:
    """Gates stay in fp32, states too, and gradients come back in the dtypes of the leaves."""
    x = make_inputs(Case(T=70, dtype=torch.float32))
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    state = tfla.State(leaves["C0"], leaves["n0"], leaves["m0"])
    with torch.autocast("cpu", dtype):
        h, end = tfla.mlstm(
            leaves["q"].to(dtype),
            leaves["k"],
            leaves["v"],
            leaves["i"],
            leaves["f"],
            initial_state=state,
            output_final_state=True,
        )
    assert h.dtype == dtype and [t.dtype for t in end] == [torch.float32] * 3
    rounded = [leaves[n].to(dtype) for n in "qkv"]
    h1, end1 = tfla.mlstm(
        *rounded, leaves["i"], leaves["f"], initial_state=state, output_final_state=True
    )
    assert torch.equal(h, h1)
    assert all(torch.equal(a, b) for a, b in zip(end, end1, strict=True))
    dh = x.dh.to(dtype)
    inside, outside = (torch.autograd.grad(y, list(leaves.values()), dh) for y in (h, h1))
    for name, a, b in zip(leaves, inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b), name


def test_autocast_takes_fp64_as_it_is_and_steps_too() -> None:
    x = make_inputs(Case(T=1))
    args = [t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f)]
    with torch.autocast("cpu", torch.bfloat16):
        assert tfla.mlstm(x.q, x.k, x.v, x.i, x.f)[0].dtype == torch.float64
        assert tfla.mlstm_step(*args, tfla.State(*x.memory))[0].dtype == torch.float64
    low = make_inputs(Case(T=1, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        h, end = tfla.mlstm_step(
            *(t[:, 0] for t in (low.q, low.k, low.v, low.i, low.f)), tfla.State(*low.memory)
        )
    assert h.dtype == torch.bfloat16 and end.C.dtype == torch.float32


def test_a_model_under_autocast_trains() -> None:
    """Linear layers give bf16 gates as well; the backward pass runs outside of autocast."""
    torch.manual_seed(0)
    layer = Layer(16, 2, 8).float()
    x = torch.randn(2, 70, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("use_reentrant", [False, True])
@variants
def test_activation_checkpointing_gives_the_same_gradients(
    use_reentrant: bool, input_gate: str, normalize: bool | None
) -> None:
    x = make_inputs(Case(T=70, input_gate=input_gate, normalize=normalize, state=False))
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]

    def fn(*args: Tensor) -> Tensor:
        return tfla.mlstm(*args, input_gate=input_gate, normalize=normalize)[0].sin()

    direct = torch.autograd.grad((fn(*leaves) * x.dh).sum(), leaves)
    h = checkpoint(fn, *leaves, use_reentrant=use_reentrant)
    (h * x.dh).sum().backward()
    for leaf, wanted in zip(leaves, direct, strict=True):
        assert torch.equal(leaf.grad, wanted)


def train_on_one_rank(rank: int, world: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = Layer(8, 2, 4).double()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    data = torch.randn(4, 70, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(data[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    if rank == 0:
        torch.save(model.state_dict(), results)
    dist.barrier()
    # At the interpreter's end threads of DDP may still run, which C++ answers with an abort.
    os._exit(0)


def test_two_ranks_of_ddp_train_as_one_process(tmp_path: Path) -> None:
    results = tmp_path / "model.pt"
    mp.spawn(train_on_one_rank, args=(2, str(tmp_path / "rendezvous"), str(results)), nprocs=2)
    torch.manual_seed(0)
    model = Layer(8, 2, 4).double()
    data = torch.randn(4, 70, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    for name, value in torch.load(results).items():
        assert_close(value, model.state_dict()[name], 1e-12, name)


def test_everything_runs_in_inference_mode() -> None:
    x = make_inputs(Case(T=20))
    with torch.inference_mode():
        h, end = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, output_final_state=True)
        h1, _ = tfla.mlstm_step(*(t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f)), end, inplace=True)
    assert torch.isfinite(h).all() and torch.isfinite(h1).all()
    assert all(torch.isfinite(s).all() for s in true_size(end))
