"""Calls that are played from a tape: the same bits as without, whatever the call; with tensors as
the interpreter wants them, and with addresses as compiled kernels do."""

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import checks
import pytest
import torch
from planned import planned
from torch import Tensor

import tfla
from tfla import kernels
from tfla.kernels import gates, host, normalizer


class Watched:
    """A kernel that is compiled, as far as the host can see: it takes addresses."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.kernel[grid](*args, **options)
            tensors = {n: x.dtype for n, x in enumerate(args) if isinstance(x, Tensor)}
            kept = [None if n in tensors else x for n, x in enumerate(args)]

            def run(stream: int, scratch: int, addresses: Sequence[int]) -> None:
                assert stream == 7
                found = kept.copy()
                for (n, dtype), address in zip(tensors.items(), addresses, strict=True):
                    assert address
                    found[n] = at(address, dtype)
                self.kernel[grid](*found, **options)

            run.scratch = 0  # type: ignore[attr-defined]
            target = SimpleNamespace(backend="cuda")
            return SimpleNamespace(run=run, metadata=SimpleNamespace(target=target))

        return call


def at(address: int, dtype: torch.dtype) -> Tensor:
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


@contextlib.contextmanager
def taped(addresses: bool = False, **fields: object) -> Iterator[dict[Any, Any]]:
    """An empty shelf of tapes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(planned(**fields))  # type: ignore[arg-type]
        if addresses:
            stack.enter_context(mock.patch.object(host, "_stream", lambda index: 7))
            stack.enter_context(mock.patch.object(host, "_compiled", {}))
            bound = mock.patch.object(host, "pack_launch", lambda compiled, *_: compiled.run)
            stack.enter_context(bound)
            for module in (kernels, gates, normalizer, host):
                for name, kernel in list(vars(module).items()):
                    if name.endswith("_kernel"):
                        stack.enter_context(mock.patch.object(module, name, Watched(kernel)))
        yield stack.enter_context(mock.patch.object(host, "_tapes", {}))


def tapes(shelf: dict[Any, Any]) -> int:
    return sum(isinstance(found, host._Tape) for found in shelf.values())


def problem(
    seed: int,
    T: int = 40,
    B: int = 1,
    H: int = 1,
    K: int = 12,
    V: int = 20,
    N: int = 0,
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q, k, v, i, f, dh, and with N the state and its cotangent (C, n, m, dC, dn)."""
    g = torch.Generator().manual_seed(seed)

    def new(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g).to(of)

    tokens = [new(B, T, H, D, of=dtype) for D in (K, K, V)]
    tokens += [new(B, T, H, of=gate_dtype), new(B, T, H, of=gate_dtype) + 2]
    tokens.append(new(B, T, H, V, of=dtype))
    if N:
        tokens += [new(N, H, K, V), new(N, H, K), new(N, H), new(N, H, K, V), new(N, H, K)]
    return tokens


def results(x: list[Tensor], gate: str = "exp", **options: Any) -> list[Tensor]:
    """h, the final state and all gradients."""
    leaves = [t.detach().requires_grad_() for t in x[:5]]
    state, cotangents = None, [x[5]]
    if len(x) > 6:
        start = [t.detach().requires_grad_() for t in x[6 : 9 if gate == "exp" else 7]]
        leaves += start
        cotangents += x[9 : 11 if gate == "exp" else 10]
        state = tfla.State(*start) if gate == "exp" else tfla.State(*start, None, None)
    h, end = tfla.mlstm(
        *leaves[:5],
        input_gate=gate,
        initial_state=state,
        backend="triton",
        output_final_state=state is not None,
        **options,
    )
    out = [h] if end is None else [h, *(t for t in end[:2] if t is not None)]
    grads = torch.autograd.grad(out, leaves, cotangents)
    return [*out, *([] if end is None or end.m is None else [end.m]), *grads]


def plain(x: list[Tensor], gate: str = "exp", **options: Any) -> list[Tensor]:
    with mock.patch.object(host, "recorded", lambda f, o, inputs, *_: f(o, *inputs)):
        return results(x, gate, **options)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


OFFSETS = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({"B": 2}, {}, {}),
    "segments, states": ({"N": 1}, {}, {"segment": 32}),
    "packed": ({}, {"cu_seqlens": OFFSETS}, {}),
    "packed, segments, states": ({"N": 3}, {"cu_seqlens": OFFSETS}, {"segment": 32}),
    "split": ({"K": 20, "V": 20}, {}, {"tile": {"block_a": 16}}),
    "half": ({"dtype": torch.float16, "gate_dtype": torch.float16}, {}, {}),
}

TENSORS = ("packed", "packed, segments, states")
WAYS = [(shape, "exp", True) for shape in SHAPES] + [(shape, "exp", False) for shape in TENSORS]
WAYS += [(shape, "sigmoid", True) for shape in ("plain", "packed, segments, states")]


@pytest.mark.parametrize(("shape", "gate", "addresses"), WAYS)
def test_a_played_call_is_the_plain_one_bit_for_bit(shape: str, gate: str, addresses: bool) -> None:
    sizes, options, fields = SHAPES[shape]
    with taped(addresses, **fields) as shelf, checks.poisoned_buffers():
        x, y = (problem(seed, **sizes) for seed in (0, 1))
        seen = results(x, gate, **options)
        assert list(shelf.values()) == [True, True]
        same(seen, results(x, gate, **options))  # recorded
        assert tapes(shelf) == len(shelf) == 2
        same(plain(y, gate, **options), results(y, gate, **options))  # played
        assert tapes(shelf) == len(shelf) == 2


def test_a_call_without_gradients_keeps_nothing_for_them() -> None:
    with taped(addresses=True) as shelf:
        for call in range(3):
            x = problem(call)
            with torch.inference_mode(call == 2):
                h, end = tfla.mlstm(*x[:5], backend="triton")
            assert end is None and torch.equal(h, plain(x)[0])
        (tape,) = shelf.values()
        assert len(tape.new) == 1


def test_a_loss_of_a_sum_has_other_strides() -> None:
    """dh is copied, and forgotten as soon as it is used."""
    with taped(addresses=True) as shelf:
        for call in range(3):
            x = problem(call)
            x[5] = torch.full((), 0.5).expand(x[5].shape)
            same(results(x), plain(x))
        spent = [len(step[-1]) for tape in shelf.values() for step in tape.steps]
        assert tapes(shelf) == 2 and sum(spent) == 4 and max(spent) == 1


@pytest.mark.parametrize("addresses", [False, True], ids=["tensors", "addresses"])
def test_memory_that_two_inputs_share_is_true_of_one_call(addresses: bool) -> None:
    with taped(addresses) as shelf:
        for call in range(5):
            x = problem(call, K=16, V=16)
            if call in (1, 3):  # recorded, played
                x[1] = x[2] = x[0]
                x[3] = x[4]
            same(results(x), plain(x))
        assert tapes(shelf) == 2


def test_slices_of_one_projection_may_be_tensors_of_their_own() -> None:
    with taped(addresses=True) as shelf:
        for call in range(4):
            x = problem(call, K=16, V=16)
            base = torch.randn(1, 40, 48, generator=torch.Generator().manual_seed(call))
            if call == 1:
                x[:3] = (y.unflatten(-1, (1, 16)) for y in base.split(16, -1))
            else:  # strides of 48, too
                x[:3] = (torch.cat([y.flatten(2)] * 3, -1)[..., :16] for y in x[:3])
                x[:3] = (y.unflatten(-1, (1, 16)) for y in x[:3])
            same(results(x), plain(x))
        assert tapes(shelf) == 2


def shifted(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def test_another_call_has_another_tape() -> None:
    changes: list[Any] = [
        lambda x: (x, {}),
        lambda x: (x, {"scale": 0.5}),
        lambda x: (x, {"normalize": False}),
        lambda x: (x, {"cu_seqlens": torch.tensor([0, 40])}),
        lambda x: (x, {"cu_seqlens": torch.tensor([0, 40], dtype=torch.int32)}),
        lambda x: ([x[0], shifted(x[1]), *x[2:]], {}),
        lambda x: ([*x[:2], torch.cat([x[2]] * 2, -1)[..., :20], *x[3:]], {}),
        lambda x: ([*x[:3], x[3].half(), *x[4:]], {}),
        lambda x: ([*(y[:, :39] for y in x[:5]), x[5][:, :39].contiguous()], {}),
    ]
    with taped(addresses=True) as shelf:
        for turn in range(3):
            for n, change in enumerate(changes):
                x, options = change(problem(turn))
                seen = results(x, **options)
                if turn == 1:
                    assert tapes(shelf) == 2 * (n + 1)
                if turn == 2:  # played
                    same(seen, plain(x, **options))
        assert tapes(shelf) == len(shelf) == 2 * len(changes)


def test_a_pinned_plan_has_tapes_of_its_own() -> None:
    with taped(addresses=True) as shelf:
        for segment in (32, 0):
            for call in range(3):
                x = problem(call)
                with planned(segment=segment):
                    same(results(x), plain(x))
        assert len(shelf) == 12  # a plan for each of the calls


def test_launches_that_are_watched_are_not_played() -> None:
    seen = []
    real = host.launch

    def launch(kernel: Any, *args: Any, **constants: Any) -> None:
        seen.append(kernel)
        real(kernel, *args, **constants)

    with taped() as shelf, mock.patch.object(kernels, "launch", launch):
        counts = []
        for call in range(3):
            results(problem(call))
            counts.append(len(seen))
    assert not shelf and counts == [counts[0] * n for n in (1, 2, 3)] and counts[0]


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: torch.cat([x, x]),
        lambda x, y: y.copy_(x),
        lambda x, y: y if y.sum() > 0 else -y,
        lambda x, y: x[:1],
        lambda x, y: OFFSETS + 0,
        lambda x, y: x.view(torch.int32) and x,
        lambda x, y: x.double().float().relu(),
    ],
)
def test_what_no_tape_can_hold_is_called_every_time(other: Any) -> None:
    calls = []

    def function(options: Any, x: Tensor) -> tuple[Tensor]:
        y = torch.empty_like(x)
        host.launch(
            gates._weights_kernel,
            (1,),
            (4, 2),
            (x, x, None, None, y, y),
            *[0] * 6,
            1,
            1,
            1,
            1.0,
            L=16,
            LOG_I=gates.FORMS["exp"].log_i,
            SIGMOID_F=False,
            PACKED=False,
        )
        calls.append(1)
        with contextlib.suppress(RuntimeError):  # of the truth of many numbers
            return (other(x, y),)
        return (y,)

    with taped() as shelf:
        for _ in range(4):
            host.recorded(function, None, [torch.ones(1024)])
        assert len(calls) == 4 and list(shelf.values()) == [False]


def test_a_call_that_fails_is_recorded_when_it_does_not() -> None:
    with taped(addresses=True) as shelf:
        results(problem(0))
        with mock.patch.object(kernels, "gate_gradients", side_effect=ValueError):
            with pytest.raises(ValueError):
                results(problem(1))
        assert host._now.tape is None and tapes(shelf) == 1
        for call in range(2):
            x = problem(call)
            same(results(x), plain(x))
        assert tapes(shelf) == 2


def test_a_tape_keeps_no_tensor_alive() -> None:
    with taped(addresses=True) as shelf:
        for call in range(3):
            x = problem(call, N=1)
            out = results(x)
            held = [weakref.ref(t) for t in (*x, *out)]
            del x, out
            gc.collect()
            assert not any(ref() is not None for ref in held)
        tensors = [t for t in gc.get_objects() if type(t) is Tensor]
        assert tapes(shelf) == 2 and not any(t.shape == (1, 1, 12, 20) for t in tensors)


def test_the_shelf_is_bounded() -> None:
    with taped() as shelf:
        shelf.update({(n,): False for n in range(2000)})
        results(problem(0))
        assert len(shelf) == 2


def test_what_passes_lies_where_something_else_has_passed() -> None:
    uses = {1: (1000, 0, 1), 2: (600, 1, 2), 3: (700, 2, 3), 4: (300, 3, 3), 5: (0, 0, 3)}
    offsets, size = host._fit(uses)
    assert size == 1024 + 1024  # 1 beside 2, then 3 and 4 in the place of 1 and 2
    for a, (count, first, last) in uses.items():
        assert offsets[a] % 512 == 0 and offsets[a] + count <= size
        for b, (others, begins, ends) in uses.items():
            apart = offsets[a] + count <= offsets[b] or offsets[b] + others <= offsets[a]
            assert a == b or apart or last < begins or ends < first
