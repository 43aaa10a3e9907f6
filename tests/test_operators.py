"""How tfla sits in PyTorch: operators, compilation, autocast, checkpointing, DDP, memory."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checks import (
    assert_close,
    one_thread,  # noqa: F401
    poisoned_buffers,
    true_size,
)
from problems import Case, Inputs, make_inputs, offsets, packed, variants
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import tfla


def arguments(case: Case) -> tuple[list[Tensor | None], Inputs]:
    """The nine tensors that the operators take, leaves that require grad."""
    x = make_inputs(case)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
    state = [None if t is None else t.clone().requires_grad_() for t in x.memory or [None] * 3]
    cu = None if case.lengths is None else offsets(case.lengths)
    return [*leaves, *state, cu], x


CASES = [
    Case(T=70),
    Case(T=70, state=False, final=False),
    Case(T=70, input_gate="sigmoid"),
    Case(T=70, input_gate="sigmoid", state=False, final=False),
    Case(T=3, input_gate="sigmoid", normalize=True, dtype=torch.float32),
    packed(0, 40, 30),
    Case(T=70, dtype=torch.bfloat16, gate_dtype=torch.float32),
]


def options(case: Case) -> dict[str, object]:
    """What the operators take besides tensors."""
    gates = {"sigmoid_i": case.input_gate == "sigmoid", "sigmoid_f": True}
    rest = {"normalize": case.normalized, "final": case.final, "keep": True, "backend": "reference"}
    return {"scale": 0.3, **gates, **rest}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_forward_operator(case: Case) -> None:
    tensors, _ = arguments(case)
    torch.library.opcheck(torch.ops.tfla.forward.default, tuple(tensors), options(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_backward_operator(case: Case) -> None:
    tensors, x = arguments(case)
    flat = [None if t is None else t.detach() for t in tensors]
    h, C, n, _, saved = torch.ops.tfla.forward(*flat, **options(case))
    cotangents = (torch.ones_like(h), *(torch.ones_like(t) if t.numel() else None for t in (C, n)))
    args = (*cotangents, h, saved, *flat)
    torch.library.opcheck(
        torch.ops.tfla.backward.default,
        args,
        options(case),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("slots", [False, True])
def test_opcheck_of_the_step_operator(slots: bool, input_gate: str) -> None:
    case = Case(T=1, B=3, input_gate=input_gate)
    x = make_inputs(case)
    rows = torch.tensor([2, 0, 1]) if slots else None
    sigmoid = input_gate == "sigmoid"
    args = [t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f)]
    torch.library.opcheck(
        torch.ops.tfla.step.default, (*args, *x.memory, rows, 0.3, sigmoid, True, "reference")
    )


def test_the_operator_and_the_eager_route_are_one_function() -> None:
    case = Case(T=70)
    tensors, x = arguments(case)
    h, C, n, m, _ = torch.ops.tfla.forward(*tensors, **options(case))
    through_operator = torch.autograd.grad([h, C, n], tensors[:8], [x.dh, x.G_C, x.G_n])
    h1, end = tfla.mlstm(
        *tensors[:5], scale=0.3, initial_state=tfla.State(*tensors[5:8]), output_final_state=True
    )
    eager = torch.autograd.grad([h1, end.C, end.n], tensors[:8], [x.dh, x.G_C, x.G_n])
    for a, b in zip((h, C, n, m, *through_operator), (h1, *end, *eager), strict=True):
        assert torch.equal(a, b)


def results(fn: Callable, leaves: dict[str, Tensor], x: Inputs) -> list[Tensor]:
    """h, the end of C, and every gradient of a call of fn(leaves)."""
    h, C = fn(leaves)
    grads = torch.autograd.grad([h, C], list(leaves.values()), [x.dh, x.G_C.to(C.dtype)])
    return [h, C, *grads]


def sequence(case: Case) -> Callable:
    cu = None if case.lengths is None else offsets(case.lengths)

    def fn(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
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
            output_final_state=True,
            cu_seqlens=cu,
        )
        return h, end.C

    return fn


def compiled_equals_eager(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    x = make_inputs(case)
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    fn = sequence(case)
    eager = results(fn, leaves, x)
    compiled = results(torch.compile(fn, fullgraph=True, backend=backend), leaves, x)
    relative = 1e-12 if case.dtype == torch.float64 else 1e-5
    for a, b in zip(compiled, eager, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, relative)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=70),
        Case(T=70, state=False, input_gate="sigmoid"),
        Case(T=70, input_gate="sigmoid", normalize=True, dtype=torch.float32),
        packed(0, 40, 30),
        Case(T=1),
    ],
    ids=str,
)
def test_compiles_into_one_graph(case: Case) -> None:
    compiled_equals_eager(case, "aot_eager")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # inductor's own, not ours
def test_compiles_with_inductor() -> None:
    compiled_equals_eager(Case(T=70, dtype=torch.float32), "inductor")


def test_compiled_code_serves_other_lengths_without_a_break() -> None:
    torch._dynamo.reset()
    fn = torch.compile(
        lambda q, k, v, i, f: tfla.mlstm(q, k, v, i, f)[0].sin(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for T in (5, 64, 70, 129):
        x = make_inputs(Case(T=T, state=False))
        args = (x.q, x.k, x.v, x.i, x.f)
        assert_close(fn(*args), tfla.mlstm(*args)[0].sin(), 1e-12)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_the_step_compiles_into_one_graph(input_gate: str, inplace: bool) -> None:
    torch._dynamo.reset()
    x = make_inputs(Case(T=1, B=3, input_gate=input_gate))
    args = [t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f)]
    states = [tfla.State(*(None if s is None else s.clone() for s in x.memory)) for _ in range(2)]

    def fn(*args: object) -> tuple[Tensor, tfla.State]:
        h, state = tfla.mlstm_step(*args, input_gate=input_gate, inplace=inplace)
        return h * 2, state

    h, end = fn(*args, states[0])
    h1, end1 = torch.compile(fn, fullgraph=True, backend="aot_eager")(*args, states[1])
    assert_close(h1, h, 1e-13)
    for a, b, c, d in zip(end, end1, *states, strict=True):
        if a is not None:
            assert_close(b, a, 1e-13)
            assert_close(d, c, 1e-13)  # the states passed in: updated in place, or both left alone


def test_linear_attention_compiles_with_gates_per_head() -> None:
    torch._dynamo.reset()
    x = make_inputs(Case(T=70))
    log_f = torch.tensor([-0.1, -0.5], dtype=torch.float64, requires_grad=True)

    def fn(log_f: Tensor) -> Tensor:
        return tfla.linear_attention(x.q, x.k, x.v, log_f)[0]

    h, h1 = fn(log_f), torch.compile(fn, fullgraph=True, backend="aot_eager")(log_f)
    assert_close(h1, h, 1e-13)
    grads = [torch.autograd.grad((y * x.dh).sum(), log_f)[0] for y in (h, h1)]
    assert_close(grads[1], grads[0], 1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_says_that_there_is_none(compiled: bool) -> None:
    case = Case(T=10)
    tensors, x = arguments(case)
    if compiled:
        h = torch.ops.tfla.forward(*tensors, **options(case))[0]
    else:
        h = tfla.mlstm(*tensors[:5])[0]
    with pytest.raises(RuntimeError, match="(?s)tfla.*first derivatives.*create_graph"):
        (dq,) = torch.autograd.grad((h * x.dh).sum(), tensors[0], create_graph=True)
        dq.square().sum().backward()


def test_gradient_penalties_on_other_parts_of_the_graph_still_work() -> None:
    """create_graph=True alone is no error: only what goes through tfla twice is."""
    tensors, _ = arguments(Case(T=10))
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    h = tfla.mlstm(*tensors[:5])[0].detach()
    (dw,) = torch.autograd.grad((h * w**3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(dw, w)
    assert_close(second, 6 * 2.0 * h.sum(), 1e-12)


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


@pytest.mark.parametrize("case", [Case(T=200, B=3, H=3), packed(0, 100, 70, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype, case: Case) -> None:
    case = dataclasses.replace(case, dtype=dtype, state=True)
    x = make_inputs(case)
    torch.set_num_threads(2)
    first, *others = (
        results(sequence(case), {n: t.clone().requires_grad_() for n, t in x.leaves().items()}, x)
        for _ in range(3)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_works_where_nondeterministic_operators_are_forbidden() -> None:
    with poisoned_buffers():
        x = make_inputs(packed(5, 70, 0))
        leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
        assert all(torch.isfinite(t).all() for t in results(sequence(packed(5, 70, 0)), leaves, x))


def allocations(path: Path, case: Case) -> tuple[int, int]:
    """(peak, largest single allocation) of forward and backward in bytes, inputs left out."""
    x = make_inputs(case)
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    fn = sequence(case)
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as p:
        results(fn, leaves, x)
    p.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    sizes = [e["args"]["Bytes"] for e in events]
    running, peak = 0, 0
    for size in sizes:
        running += size
        peak = max(peak, running)
    return peak, max(sizes)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_memory_grows_linearly_with_the_length(input_gate: str, tmp_path: Path) -> None:
    """A peak in proportion to T, and nothing of size T x T (4,096 x 4,096 in fp32: 64 MiB)."""
    lengths = (1024, 2048, 4096)
    peaks, largest = zip(
        *(
            allocations(
                tmp_path / "trace.json",
                Case(T=T, B=1, H=1, K=16, V=16, dtype=torch.float32, input_gate=input_gate),
            )
            for T in lengths
        ),
        strict=True,
    )
    for values in (peaks, largest):
        assert values[1] <= 2.1 * values[0] and values[2] <= 2.1 * values[1], (peaks, largest)
    assert largest[-1] < 4096 * 4096 * 4 / 16
    assert peaks[0] > 0


@variants
def test_what_autograd_keeps_is_the_inputs_the_output_and_a_few_rows(
    input_gate: str, normalize: bool | None
) -> None:
    """No state a chunk and nothing of the chunk arithmetic waits for the backward pass."""
    case = Case(
        T=2048,
        B=1,
        H=2,
        K=32,
        V=32,
        dtype=torch.float32,
        input_gate=input_gate,
        normalize=normalize,
    )
    x = make_inputs(case)
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves().items()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        sequence(case)(leaves)
    given = sum(t.nbytes for t in leaves.values()) + x.v.nbytes
    assert sum(kept.values()) <= given + 16 * 4 * x.i.numel()  # 16 fp32 numbers a token and head


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
    dist.destroy_process_group()


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


def test_meta_tensors_give_shapes_without_arithmetic() -> None:
    x = make_inputs(Case(T=70, dtype=torch.bfloat16))
    q, k, v, i, f = (t.to("meta") for t in (x.q, x.k, x.v, x.i, x.f))
    torch._dynamo.reset()
    fake = torch.compile(
        lambda *a: tfla.mlstm(*a, output_final_state=True), fullgraph=True, backend="aot_eager"
    )(q, k, v, i, f)
    real = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, output_final_state=True)
    for a, b in zip((fake[0], *fake[1]), (real[0], *real[1]), strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype


def test_everything_runs_in_inference_mode() -> None:
    x = make_inputs(Case(T=20))
    with torch.inference_mode():
        h, end = tfla.mlstm(x.q, x.k, x.v, x.i, x.f, output_final_state=True)
        h1, _ = tfla.mlstm_step(*(t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f)), end, inplace=True)
    assert torch.isfinite(h).all() and torch.isfinite(h1).all()
    assert all(torch.isfinite(s).all() for s in true_size(end))
