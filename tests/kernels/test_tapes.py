"""Calls that are played from a tape launch what plain ones do, with the plans for Hopper; no kernel
runs. What the kernels make of it is in interpreter/test_played_calls.py."""

import contextlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from builds import DEVICES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tfla
from tfla.kernels import host

Launch = tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...]]  # what, pointers, numbers


class Log(dict[Any, Any]):
    """Compiled kernels that do nothing but write down how they are called."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def get(self, key: Any, default: Any = None) -> Any:
        kernel, grid, shape, device, numbers, constants, dtypes, *_ = key

        def run(stream: int, scratch: int, addresses: Sequence[int]) -> None:
            assert stream == 7 and len(addresses) == sum(dtype is not None for dtype in dtypes)
            what = kernel, grid, shape, device, constants, dtypes
            self.launches.append((what, tuple(addresses), numbers))

        run.scratch = 0  # type: ignore[attr-defined]
        return run


class Kept(TorchDispatchMode):
    """Nothing is freed, so that every address is that of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = func(*args, **(kwargs or {}))
        self.all += [x for x in (out if isinstance(out, (list, tuple)) else [out])]
        return out

    def places(self) -> dict[int, int]:
        """Address -> bytes."""
        storages = [x.untyped_storage() for x in self.all if isinstance(x, Tensor)]
        return {s.data_ptr(): s.nbytes() for s in storages}


def call(inputs: list[Tensor | None], gate: str, final: bool) -> list[Tensor]:
    *x, C, n, m, cu_seqlens, dh = inputs
    leaves = [t for t in (*x, C, n, m) if t is not None]
    state = None if C is None else tfla.State(C, n, m)
    h, end = tfla.mlstm(
        *x,
        input_gate=gate,
        initial_state=state,
        output_final_state=final,
        backend="triton",
        cu_seqlens=cu_seqlens,
    )
    outs = [h] if end is None else [h, end.C]
    grads = torch.autograd.grad(outs, leaves, [dh, *(torch.ones_like(t) for t in outs[1:])])
    return [*outs, *grads]


def inside(address: int, places: dict[int, int]) -> tuple[int, int]:
    """(start of the place, offset) of an address, the closest start below it."""
    start = max(s for s in places if s <= address)
    assert address - start < places[start]
    return start, address - start


CALLS = [
    (1, 8192, 1, 128, 256), (2, 200, 4, 128, 256), (1, 500, 2, 256, 512), (3, 70, 2, 48, 80),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("more", ["", "packed", "states", "packed, states"])
@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_a_played_call_launches_what_the_plain_one_does(
    shape: tuple[int, ...], gate: str, more: str, dtype: torch.dtype
) -> None:
    B, T, H, K, V = shape
    B = 1 if "packed" in more else B
    N = 3 if "packed" in more else B
    log = Log()

    def new(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=of, requires_grad=True)

    def inputs() -> list[Tensor | None]:
        x = [new(B, T, H, D, of=dtype) for D in (K, K, V)] + [new(B, T, H) for _ in "if"]
        state = [new(N, H, K, V), new(N, H, K), new(N, H)] if "states" in more else [None] * 3
        state = state if gate == "exp" else [state[0], None, None]
        cu_seqlens = torch.tensor([0, 5, 5, T]) if "packed" in more else None
        return [*x, *state, cu_seqlens, new(B, T, H, V, of=dtype).detach()]

    def made(x: list[Tensor | None], y: list[Tensor]) -> tuple[list[Launch], list[int]]:
        launches = list(log.launches)
        log.launches.clear()
        return launches, [t.data_ptr() for t in y]

    with contextlib.ExitStack() as stack:
        device = DEVICES["cuda", 90]
        for name, value in (
            ("host._compiled", log),
            ("host._tapes", {}),
            ("host._stream", lambda index: 7),
            ("grid._plans", {}),
            ("grid.device_of", lambda x: device),
        ):
            stack.enter_context(mock.patch(f"tfla.kernels.{name}", value))
        stack.enter_context(mock.patch("tfla.checks.why_not_triton", lambda q: None))
        # `Kept` is to see what the operators do, and not them.
        stack.enter_context(mock.patch("tfla.ops.by_operator", lambda *x: False))
        x = inputs()
        with Kept() as kept:
            y = call(x, gate, "states" in more)
        plain, ends = made(x, y)
        call(x, gate, "states" in more)
        log.launches.clear()
        assert [type(t) for t in host._tapes.values()] == [host._Tape] * 2
        z = inputs()
        y = call(z, gate, "states" in more)
        played, played_ends = made(z, y)

    ours = [{t.data_ptr(): t.nbytes for t in side if t is not None} for side in (x, z)]
    order = [[0 if t is None else t.data_ptr() for t in side] for side in (x, z)]
    places = kept.places()
    moved: dict[int, int] = dict(zip(ends, played_ends, strict=True))
    life: dict[int, list[int]] = {}
    assert len(plain) == len(played) > 3
    for at, (a, b) in enumerate(zip(plain, played, strict=True)):
        assert a[0] == b[0] and a[2] == b[2]
        for p, q in zip(a[1], b[1], strict=True):
            given = [n for n, s in enumerate(order[0]) if s and 0 <= p - s < max(ours[0][s], 1)]
            if not p:
                assert not q
            elif given:
                assert p - order[0][given[0]] == q - order[1][given[0]]
            else:
                start, offset = inside(p, places)
                assert moved.setdefault(start, q - offset) == q - offset
                life.setdefault(start, [at, at])[1] = at
    for a, (first, last) in life.items():
        for b, (begins, ends_) in life.items():
            if a < b and first <= ends_ and begins <= last:
                low, high = sorted([(moved[a], places[a]), (moved[b], places[b])])
                assert low[0] + low[1] <= high[0]
