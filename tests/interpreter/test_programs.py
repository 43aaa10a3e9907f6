"""Whatever is played from the cache gives the bits of a Program that is made anew; with tensors as
Triton wants them, and with addresses as compiled kernels do."""

import contextlib
import ctypes
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
from tfla.kernels import gates, normalizer, runtime, weights


class Watched:
    """A kernel that is compiled, as far as the host can see: it takes addresses."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names, self.__name__ = kernel, kernel.arg_names, kernel.__name__

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
def cached(addresses: bool = False, **fields: object) -> Iterator[dict[Any, Any]]:
    """An empty cache of passes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(planned(**fields))  # type: ignore[arg-type]
        if addresses:
            stack.enter_context(mock.patch.object(runtime, "_stream", lambda index: 7))
            stack.enter_context(mock.patch.object(runtime, "_compiled", {}))
            packed = mock.patch.object(runtime, "pack_launch", lambda compiled, *_: compiled.run)
            stack.enter_context(packed)
            for module in (kernels, gates, normalizer, weights):
                for name, kernel in list(vars(module).items()):
                    if name.endswith("_kernel"):
                        stack.enter_context(mock.patch.object(module, name, Watched(kernel)))
        yield stack.enter_context(mock.patch.object(runtime, "_passes", {}))


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


def fresh(x: list[Tensor], gate: str = "exp", **options: Any) -> list[Tensor]:
    """By Programs that are made anew."""
    with mock.patch.object(runtime, "_passes", {}):
        return results(x, gate, **options)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


OFFSETS = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({"B": 2}, {}, {}),
    "splits, states": ({"N": 1}, {}, {"split_len": 32}),
    "packed": ({}, {"cu_seqlens": OFFSETS}, {}),
    "packed, splits, states": ({"N": 3}, {"cu_seqlens": OFFSETS}, {"split_len": 32}),
    "slices": ({"K": 20, "V": 20}, {}, {"tile": {"block_a": 16}}),
    "slices, splits, states": (
        {"K": 20, "V": 20, "N": 1},
        {},
        {"tile": {"block_a": 16}, "split_len": 32},
    ),
    "half": ({"dtype": torch.float16, "gate_dtype": torch.float16}, {}, {}),
}

TENSORS = ("packed", "packed, splits, states")
WAYS = [(shape, True) for shape in SHAPES] + [(shape, False) for shape in TENSORS]


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize(("shape", "addresses"), WAYS)
def test_a_call_from_the_cache_is_a_fresh_one_bit_for_bit(
    shape: str, gate: str, addresses: bool
) -> None:
    sizes, options, fields = SHAPES[shape]
    with cached(addresses, **fields) as passes, checks.poisoned_buffers():
        x, y = (problem(seed, **sizes) for seed in (0, 1))
        results(x, gate, **options)
        assert len(passes) == 2
        assert all((f.players[0].ready is not None) == addresses for f in passes.values())
        same(results(y, gate, **options), fresh(y, gate, **options))
        assert len(passes) == 2


def test_a_contraction_in_slices_is_a_whole_one() -> None:
    """With a state, stored ones and splits: offsets of a slice reach all that has a row of it."""
    sizes, options, fields = SHAPES["slices, splits, states"]
    x = problem(0, **sizes)
    with cached(**fields):
        slices = results(x, **options)
    with cached(split_len=32):
        whole = results(x, **options)
    for a, b in zip(slices, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_a_call_without_gradients_keeps_nothing_for_them() -> None:
    with cached() as passes:
        x = problem(0)
        with torch.inference_mode():
            tfla.mlstm(*x[:5], backend="triton")
        (found,) = passes.values()
        (program,) = found.programs
        assert [program.buffers[n].role for n in program.outputs] == ["output"]


def test_a_loss_of_a_sum_has_other_strides() -> None:
    """dh is copied, as kernels know no strides of its last axis."""
    with cached() as passes:
        x = problem(0)
        x[5] = torch.full((), 0.5).expand(x[5].shape)
        dense = results([*x[:5], x[5].contiguous()])
        same(results(x), dense)
        assert [len(found.copies) for found in passes.values()] == [0, 0, 1]


@pytest.mark.parametrize("addresses", [False, True], ids=["tensors", "addresses"])
def test_inputs_may_share_memory_or_not(addresses: bool) -> None:
    with cached(addresses) as passes:
        for turn in range(3):
            x = problem(turn, K=16, V=16)
            if turn == 1:
                x[1] = x[2] = x[0]
                x[3] = x[4]
            same(results(x), fresh(x))
        assert len(passes) == 2
