"""The call is a Program: what one promises, and how one is played on tensors; no kernel runs. What
the kernels make of it is in interpreter/test_programs.py."""

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from builds import DEVICES, call

import tfla
from tfla.kernels import planning, program, runtime
from tfla.kernels.program import Program
from tfla.programs import programs

CALLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 8192, 1, 128, 256), {}),
    ((1, 20000, 4, 128, 256), {"state": True}),
    ((1, 20000, 4, 64, 64), {"packed": 5}),
    ((1, 20000, 4, 64, 64), {"packed": 5, "state": True}),
    ((2, 500, 2, 256, 512), {"state": True, "dtype": torch.float32, "precision": "ieee"}),
    ((1, 30000, 2, 300, 520), {"dtype": torch.float32, "precision": "tf32"}),
    ((3, 70, 2, 48, 80), {"dtype": torch.float16}),
    ((2, 0, 2, 16, 16), {"state": True}),
]
calls = pytest.mark.parametrize(("shape", "options"), CALLS, ids=str)
gates = pytest.mark.parametrize("gate", ["exp", "sigmoid"])
devices = pytest.mark.parametrize("device", [90, 80, 86], ids=str)


def passes(shape: tuple[int, ...], device: int, **options: Any) -> list[Program]:
    found = programs(call(*shape, **options), DEVICES["cuda", device])
    assert found.backward is not None
    return [found.forward, found.backward]


@calls
@gates
@devices
def test_launches_read_what_was_written_and_update_nothing_of_the_callers(
    shape: tuple[int, ...], options: dict[str, Any], gate: str, device: int
) -> None:
    """And take whole buffers, in the order: read, updated in place, written."""
    for p in passes(shape, device, gate=gate, **options):
        known = set(p.inputs)
        for launch in p.launches:
            reads, updates, writes = (
                {n for n in side if n is not None and 0 not in p.buffers[n].shape}
                for side in (launch.reads, launch.updates, launch.writes)
            )
            assert reads | updates <= known, launch
            assert not writes & known, launch
            assert not updates & set(p.inputs)
            for n in updates:
                spare = p.buffers[n].role in ("workspace", "saved")
                # The caller's own are updated where nothing else would do: where tokens belong
                # to no sequence, and a state that slices of a contraction make row by row.
                assert spare or launch.label == "clear" or launch.parameters.numbers["first_a"]
                assert not spare or p.buffers[n].elements == 1 + _size(p.buffers[n].shape)
            known |= writes
            names = [name for side in launch.parameters for name in side]
            assert names == launch.kernel.arg_names
        if shape[1]:
            assert {n for n in p.outputs if 0 not in p.buffers[n].shape} <= known


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


@calls
@gates
def test_buffers_that_live_at_the_same_time_have_memory_of_their_own(
    shape: tuple[int, ...], options: dict[str, Any], gate: str
) -> None:
    for p in passes(shape, 90, gate=gate, **options):
        uses = p.workspace
        offsets, size = program.fit(uses)
        assert not set(uses) & {*p.inputs, *p.outputs}
        for a, b in itertools.combinations(uses, 2):
            (bytes_a, first_a, last_a), (bytes_b, first_b, last_b) = uses[a], uses[b]
            if last_a < first_b or last_b < first_a:
                continue
            low, high = sorted([(offsets[a], bytes_a), (offsets[b], bytes_b)])
            assert low[0] + low[1] <= high[0] or not bytes_a or not bytes_b
        assert all(offsets[n] + uses[n][0] <= size for n in uses)


def test_what_passes_lies_where_something_else_has_passed() -> None:
    uses = {1: (1000, 0, 1), 2: (600, 1, 2), 3: (700, 2, 3), 4: (300, 3, 3), 5: (0, 0, 3)}
    offsets, size = program.fit(uses)
    assert size == 1024 + 1024  # 1 beside 2, then 3 and 4 in the place of 1 and 2
    assert offsets[1] == offsets[3] and all(at % 512 == 0 for at in offsets.values())


@calls
@gates
@pytest.mark.parametrize("device", [90, 80, 86, 100], ids=str)
def test_the_size_of_what_is_saved_is_that_of_its_parts(
    shape: tuple[int, ...], options: dict[str, Any], gate: str, device: int
) -> None:
    """Which an operator's shapes in a graph are made of."""
    spec = call(*shape, gate=gate, **options)
    with planning.planned_for(DEVICES["cuda", device]):
        x = operands(spec)
        made: Any = torch.ops.tfla.forward(*x, *spec.options)[-1]
        saved = [b for b in passes(shape, device, gate=gate, **options)[0].buffers]
    parts = [b for b in saved if b.role == "saved"]
    assert made.numel() == sum(program.padded(_size(b.shape) + 1) for b in parts)


def operands(spec: Any) -> list[Tensor | None]:
    """Without memory."""
    B, T, H, K, V, N = (getattr(spec, name) for name in ("B", "T", "H", "K", "V", "N"))

    def new(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    x = [new(B, T, H, D, of=spec.dtype) for D in (K, K, V)] + [new(B, T, H) for _ in "if"]
    C = new(N, H, K, V) if spec.initial_state else None
    n, m = (new(N, H, K), new(N, H)) if spec.normalize and C is not None else (None, None)
    return [*x, C, n, m, new(N + 1, of=torch.int32) if spec.packed else None]


# ------------------------------------------------------------ played on tensors


class Log:
    """In the place of kernels: notes how each is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, list[int]]] = []
        self.built = 0  # passes that were made anew

    def build(self, *args: Any) -> program.Built:
        found = program.build(*args)
        self.built += 1
        return found

    def launch(self, *args: Any) -> Any:
        """Of the first time."""
        given = [x for x in args[4] if x is not None]
        self.calls.append((7, 0, [x.data_ptr() for x in given]))

        def run(stream: int, scratch: int, addresses: list[int]) -> None:
            self.calls.append((stream, scratch, addresses))

        run.scratch = 128  # type: ignore[attr-defined]
        return run

    def taken(self) -> list[tuple[int, int, list[int]]]:
        found, self.calls = self.calls, []
        return found


@contextlib.contextmanager
def watched() -> Iterator[Log]:
    """Calls on CPU tensors, planned as for a Hopper, that launch nothing."""
    log = Log()
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("runtime._launch", log.launch),
            ("runtime._passes", {}),
            ("runtime.build", log.build),
            ("runtime._stream", lambda index: 7),
            ("planning._devices", {torch.device("cpu"): DEVICES["cuda", 90]}),
            ("planning._plans", {}),
        ):
            stack.enter_context(mock.patch(f"tfla.kernels.{name}", value))
        stack.enter_context(mock.patch("tfla.checks.why_not_triton", lambda q: None))
        yield log


def run(shape: tuple[int, ...], gate: str, more: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A call and its gradients; all its tensors."""
    B, T, H, K, V = shape
    N = 3 if "packed" in more else B

    def new(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=of, requires_grad=True)

    q, k, v = (new(B, T, H, D, of=dtype) for D in (K, K, V))
    x = {"q": q, "k": k, "v": v, "i": new(B, T, H), "f": new(B, T, H)}
    cu_seqlens = torch.tensor([0, 5, 5, T]) if "packed" in more else None
    state = {}
    if "states" in more:
        state = {"C": new(N, H, K, V)}
        state |= {"n": new(N, H, K), "m": new(N, H)} if gate == "exp" else {}
    start = tfla.State(**{"n": None, "m": None} | state) if state else None
    h, end = tfla.mlstm(
        **x,
        input_gate=gate,  # type: ignore[arg-type]
        initial_state=start,
        output_final_state=bool(state),
        cu_seqlens=cu_seqlens,
        backend="triton",
    )
    outs = {"h": h} | ({} if end is None else {"C_T": end.C})
    cotangents = {f"d{name}": torch.ones_like(y) for name, y in outs.items()}
    leaves = x | state
    grads = torch.autograd.grad(list(outs.values()), list(leaves.values()), [*cotangents.values()])
    named = zip(leaves, grads, strict=True)
    outs |= {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    return leaves | outs | cotangents | {f"d{name}": g for name, g in named}


SHAPES = [(1, 8192, 1, 128, 256), (2, 200, 4, 128, 256), (1, 500, 2, 256, 512)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("more", ["", "packed", "states", "packed, states"])
@gates
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_program_is_played_with_the_addresses_of_the_call(
    shape: tuple[int, ...], gate: str, more: str, dtype: torch.dtype
) -> None:
    shape = (1, *shape[1:]) if "packed" in more else shape
    with watched() as log:
        run(shape, gate, more, dtype)
        first = log.taken()
        x = run(shape, gate, more, dtype)
        again = log.taken()
        both = [found for found in runtime._passes.values()]
    assert len(both) == 2 and len(first) == len(again) > 3
    launches = [(f.players[0], x) for f in both for x in f.programs[0].launches]
    bases: dict[int, int] = {}
    for (player, launch), (stream, scratch, addresses) in zip(launches, again, strict=True):
        assert stream == 7
        buffers = [n for n in launch.buffers if n is not None]
        assert len(buffers) == len(addresses)
        for n, address in zip(buffers, addresses, strict=True):
            buffer, part = player.program.buffers[n], player.parts[n]
            if buffer.role == "input" or buffer.role == "output" and buffer.name in x:
                assert address == x[_tensor_of(buffer.name)].data_ptr() or buffer.name == "h"
            elif n in player.program.workspace:  # one allocation, scratch memory behind it
                base = address - part.offset
                assert bases.setdefault(id(player), base) == base
                assert address + buffer.bytes <= base + player.size == scratch


def _tensor_of(name: str) -> str:
    return {"dC": "dC_T"}.get(name, name)


def test_another_layout_has_another_program() -> None:
    def one(*shape: int, **change: Any) -> None:
        x = [torch.zeros(*shape, D) for D in (16, 16, 16)] + [torch.zeros(shape)] * 2
        x = change.pop("of", lambda x: x)(x)
        tfla.mlstm(*x, backend="triton", **change)  # type: ignore[arg-type]

    changes: list[dict[str, Any]] = [
        {},
        {"scale": 0.5},
        {"normalize": False},
        {"output_final_state": True},
        {"cu_seqlens": torch.tensor([0, 40])},
        {"cu_seqlens": torch.tensor([0, 40], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 9, 40, 9])[::2]},
        {"of": lambda x: [*x[:3], x[3].half(), x[4]]},
        {"of": lambda x: [*x[:3], torch.zeros(81)[1:].view(1, 40, 2), x[4]]},
        {"of": lambda x: [*x[:3], x[3].expand(1, 40, 2), torch.zeros(1).expand(1, 40, 2)]},
        {"of": lambda x: [torch.zeros(1, 2, 40, 16).transpose(1, 2), *x[1:]]},
    ]
    with watched() as log:
        for turn in range(3):
            for n, change in enumerate(changes):
                one(1, 40, 2, **change)
                assert log.built == (len(changes) if turn else n + 1)


def test_a_call_that_fails_is_made_anew() -> None:
    """The pass that failed, not the one before it."""
    call = (1, 40, 1, 16, 16), "exp", "", torch.bfloat16
    with watched() as log:
        broken = mock.patch("tfla.kernels.gate_gradients", side_effect=ValueError)
        with broken, pytest.raises(ValueError):
            run(*call)
        assert log.built == 1
        log.taken()
        run(*call)
        assert log.built == 2 and log.taken()


def test_a_program_keeps_no_tensor_alive() -> None:
    with watched():
        for _ in range(3):
            x = run((1, 40, 1, 16, 48), "exp", "states", torch.bfloat16)
            held = [weakref.ref(t) for t in x.values()]
            del x
            gc.collect()
            assert not any(ref() is not None for ref in held)


def test_the_cache_is_bounded() -> None:
    with watched():
        full: Any = {(n,): None for n in range(2000)}
        runtime._passes.update(full)
        run((1, 40, 1, 16, 16), "exp", "", torch.bfloat16)
        assert len(runtime._passes) == 2


@gates
@pytest.mark.parametrize("packed", [False, True])
def test_a_graph_holds_for_every_length(gate: str, packed: bool) -> None:
    """Thirty of them in two frames, one for the first and one for all others: no size of what
    is saved, which a plan depends on, holds a graph to a range."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def fn(*x: Tensor | None) -> Tensor:
        normalize = gate == "exp"
        options = (0.5, gate, True, normalize, False, True, "triton", "ieee")
        start = None, None, None
        return torch.ops.tfla.forward(*x[:5], *start, x[5], *options)[0].sin()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, backend=counter, fullgraph=True)
    g = torch.Generator().manual_seed(0)
    lengths = [int(2 + 10 ** (4.8 * torch.rand(1, generator=g).item())) for _ in range(30)]
    assert min(lengths) < 16 and max(lengths) > 16384  # plans of all kinds
    with planning.planned_for(DEVICES["cuda", 90]):
        for T in lengths:
            shapes = [(1, T, 4, D) for D in (64, 64, 128)]
            x = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]
            x += [torch.empty(1, T, 4, device="meta") for _ in "if"]
            leaves = [t.requires_grad_() for t in x]
            cu = torch.empty(2 + T % 40, dtype=torch.int32, device="meta") if packed else None
            compiled(*leaves, cu).sum().backward()
            assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
    assert counter.frame_count <= 3
