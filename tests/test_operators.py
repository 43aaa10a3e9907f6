"""The operators, what they keep and what they hold: opcheck, second derivatives, bits, memory."""

import dataclasses
import functools
import gc
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checks import (
    assert_close,
    poisoned_buffers,
    results,
    sequence,
)
from problems import Case, Inputs, make_inputs, offsets, packed, variants
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import tfla
from tfla import ops


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
    gates = {"input_gate": case.input_gate, "sigmoid_f": True}
    rest = {"normalize": case.normalized, "final_state": case.final, "needs_grad": True}
    return {"scale": 0.3, **gates, **rest, "backend": "reference", "precision": "ieee"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_forward_operator(case: Case) -> None:
    tensors, _ = arguments(case)
    torch.library.opcheck(torch.ops.tfla.forward.default, tuple(tensors), options(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_a_forward_that_keeps_nothing(case: Case) -> None:
    flat = tuple(None if t is None else t.detach() for t in arguments(case)[0])
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.tfla.forward.default
    torch.library.opcheck(forward, flat, options(case) | {"needs_grad": False}, test_utils=tests)


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
    args = [t[:, 0] for t in (x.q, x.k, x.v, x.i, x.f)]
    torch.library.opcheck(
        torch.ops.tfla.step.default, (*args, *x.memory, rows, 0.3, input_gate, True, "reference")
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


def test_transforms_of_torch_func_say_what_to_do_instead() -> None:
    tensors, _ = arguments(Case(T=10))
    q, *others = (t.detach() for t in tensors[:5])
    state = tfla.State(*(t.detach() for t in tensors[5:8]))

    def loss(q: Tensor) -> Tensor:
        return tfla.mlstm(q, *others)[0].sum()

    def step(q: Tensor) -> Tensor:
        return tfla.mlstm_step(q, *(t[:, 0] for t in others), state)[0]

    for call in (
        lambda: torch.vmap(loss)(torch.stack([q, q])),
        lambda: torch.vmap(step)(torch.stack([q[:, 0], q[:, 0]])),
        lambda: torch.func.grad(loss)(q),
    ):
        with pytest.raises(RuntimeError, match="tfla.*torch.func.*into B.*autograd.grad"):
            call()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_forward_mode_says_that_there_is_none() -> None:
    tensors, _ = arguments(Case(T=10))
    q, *others = (t.detach() for t in tensors[:5])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="tfla.*forward-mode"):
        tfla.mlstm(forward_ad.make_dual(q, q), *others)


def test_gradient_penalties_on_other_parts_of_the_graph_still_work() -> None:
    """create_graph=True alone is no error: only what goes through tfla twice is."""
    tensors, _ = arguments(Case(T=10))
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    h = tfla.mlstm(*tensors[:5])[0].detach()
    (dw,) = torch.autograd.grad((h * w**3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(dw, w)
    assert_close(second, 6 * 2.0 * h.sum(), 1e-12)


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


# ---------------------------------------------------------------- who looks at the operators


def grads_of_a_checkpoint(case: Case, save: bool, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """Gradients through selective checkpointing, and how often the forward pass has run."""
    tensors, x = arguments(case)
    leaves, cu = [t for t in tensors[:8] if t is not None], tensors[8]
    runs: list[int] = []
    real = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *a: (runs.append(1), real(*a))[1])

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = save and op is torch.ops.tfla.forward.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(*t: Tensor) -> Tensor:
        state = tfla.State(*t[5:], *[None] * (8 - len(t))) if len(t) > 5 else None
        return tfla.mlstm(*t[:5], input_gate=case.input_gate, initial_state=state, cu_seqlens=cu)[
            0
        ].sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    grads = torch.autograd.grad((y * x.dh).sum(), leaves)
    plain = torch.autograd.grad((layer(*leaves) * x.dh).sum(), leaves)
    return grads, plain, len(runs)


@pytest.mark.parametrize(
    "case", [Case(T=70), Case(T=70, input_gate="sigmoid", state=False), packed(0, 40, 30)], ids=str
)
def test_selective_checkpointing_sees_the_forward_operator(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for save, expected in ((True, 1), (False, 2)):
        grads, plain, runs = grads_of_a_checkpoint(case, save, monkeypatch)
        assert runs == expected  # through the operator; the plain call takes another way
        for a, b in zip(grads, plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", [Case(T=70), Case(T=70, input_gate="sigmoid"), packed(0, 40, 30)])
def test_tensors_without_values_give_shapes(case: Case) -> None:
    """FakeTensorMode and the device "meta", without torch.compile: forward, backward and a step."""
    tensors, _ = arguments(case)
    memory = [None if t is None else t.detach() for t in tensors[5:8]]
    cu = tensors[8]

    def call(*t: Tensor | None) -> list[Tensor]:
        leaves = [s for s in t[:5] if s is not None]
        h, end = tfla.mlstm(
            *leaves,
            input_gate=case.input_gate,
            initial_state=tfla.State(*t[5:8]),  # type: ignore[arg-type]
            output_final_state=True,
            cu_seqlens=t[8],
        )
        grads = torch.autograd.grad(h.sum() + end.C.sum(), leaves)
        state = tfla.State(*(s if s is None else s[:1] for s in t[5:8]))  # type: ignore[arg-type]
        token = [s.detach()[:1, 0] for s in leaves]
        slots = torch.zeros(1, dtype=torch.int64, device=leaves[0].device)
        one, _ = tfla.mlstm_step(
            *token, state, input_gate=case.input_gate, inplace=True, slots=slots
        )
        return [h, *(s for s in end if s is not None), *grads, one]

    flat = [*(t.detach().requires_grad_() for t in tensors[:5]), *memory, cu]
    real = call(*flat)
    on_meta = [None if t is None else t.detach().to("meta") for t in flat]
    for t in on_meta[:5]:
        t.requires_grad_()
    for a, b in zip(call(*on_meta), real, strict=True):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in flat]
        for a, b in zip(call(*fakes), real, strict=True):
            assert isinstance(a, FakeTensor) and a.device == b.device
            assert a.shape == b.shape and a.dtype == b.dtype


def test_a_batch_of_gradients_is_refused_in_words() -> None:
    tensors, _ = arguments(Case(T=10))
    leaves = tensors[:5]
    state = tfla.State(*(t.detach() for t in tensors[5:8]))
    h, end = tfla.mlstm(*leaves, initial_state=state, output_final_state=True)
    with pytest.raises(RuntimeError, match="is_grads_batched=True, jacobian with vectorize=True"):
        torch.autograd.grad(h, leaves, torch.ones(3, *h.shape).double(), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(
            end.C, leaves, torch.ones(3, *end.C.shape).double(), is_grads_batched=True
        )

    def f(q: Tensor) -> Tensor:
        return tfla.mlstm(q, *leaves[1:], initial_state=state)[0]

    with pytest.raises(RuntimeError, match="vectorize=False"):
        torch.autograd.functional.jacobian(f, leaves[0], vectorize=True)
    J = torch.autograd.functional.jacobian(f, leaves[0].detach())
    (dq,) = torch.autograd.grad(f(leaves[0]).sum(), leaves[0])
    assert_close(J.sum((0, 1, 2, 3)), dq)


def test_a_saved_state_is_loaded_without_trust(tmp_path: Path) -> None:
    """torch.load with weights_only=True, its default, in a process that has only imported tfla."""
    state = tfla.State(*make_inputs(Case(T=3)).memory)
    torch.save({"layers": (state, tfla.State(state.C, None, None))}, tmp_path / "state.pt")
    code = """
import sys, torch, tfla
one, other = torch.load(sys.argv[1])["layers"]
assert type(one) is tfla.State and type(other) is tfla.State and other.n is None
torch.save(one.C, sys.argv[2])
"""
    args = [sys.executable, "-c", code, str(tmp_path / "state.pt"), str(tmp_path / "C.pt")]
    subprocess.run(args, check=True)
    assert torch.equal(torch.load(tmp_path / "C.pt"), state.C)


def test_a_state_saved_by_an_older_version_is_loaded(tmp_path: Path) -> None:
    state = tfla.State(*make_inputs(Case(T=3)).memory)
    file = tmp_path / "state.pt"
    torch.save(state, file)
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            data = source.read(name).replace(b"ctfla\nState\n", b"ctfla.checks\nState\n")
            target.writestr(name, data)
    assert old.read_bytes() != file.read_bytes()
    loaded = torch.load(old)
    assert type(loaded) is tfla.State and torch.equal(loaded.C, state.C)
