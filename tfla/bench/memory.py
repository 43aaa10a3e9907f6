"""Memory of one call, counted: on "triton" the sizes in its Programs, on "reference" the
allocations of the call on tensors without memory, followed one by one."""

from __future__ import annotations

import importlib
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfla import _compat, ops
from tfla.plan import Device, Problem, plan
from tfla.programs import call_of, programs
from tfla.spec import Inputs

LAUNCHES = 4096  # of a pass: beyond it nobody waits for the count


class Memory(NamedTuple):
    """Bytes. Peaks are of what a pass allocates, beyond all that was there before it."""

    inputs: int  # q, k, v, i, f: the caller's, kept for the backward pass
    output: int  # h, kept too
    saved: int  # what else the forward pass leaves for the backward pass
    forward: int  # peak of the forward pass, h and what is saved among it
    backward: int  # peak of the backward pass, all gradients among it


class _Allocations(_compat.TorchDispatchMode):
    """Bytes of the storages that are alive, and the most of them at a time; but of those ``given``,
    which are there before."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {_compat.storage_key(x) for x in given}
        self.tensors: dict[int, int] = {}  # by storage: how many tensors lie in it
        self.bytes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.add(x)
        return out

    def add(self, x: Tensor) -> None:
        key = _compat.storage_key(x)
        if key in self.given:
            return
        if key not in self.bytes:
            self.tensors[key], self.bytes[key] = 0, x.untyped_storage().nbytes()
            self.now += self.bytes[key]
            self.peak = max(self.peak, self.now)
        self.tensors[key] += 1
        weakref.finalize(x, self.drop, key)

    def drop(self, key: int) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            del self.tensors[key]
            self.now -= self.bytes.pop(key)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _made(program: Any) -> int:
    """Bytes that a Program allocates: what it leaves, and its workspace."""
    program_of: Any = importlib.import_module("tfla.kernels.program")
    left = sum(program.buffers[n].bytes for n in program.outputs)
    return left + program_of.fit(program.workspace)[1]


def memory(p: Problem, device: Device | None, dtype: torch.dtype, gate: str) -> Memory:
    """The memory of forward and backward of ``tfla.mlstm``, gates in fp32, no states. device: None
    for "reference". RuntimeError: it cannot be counted, and why."""
    if device is not None:
        if error := _compat.triton_error():
            raise RuntimeError(f"the kernels need Triton ({error})")
        planned = plan(p, device)
        if max(planned.h.slices, planned.dq.slices) > LAUNCHES:
            raise RuntimeError(f"a pass takes more than {LAUNCHES} launches")
    elif not _compat.can_record():
        raise RuntimeError("this torch does not let allocations be followed")

    spec = call_of(p, dtype, gate, backend="reference" if device is None else "triton")
    rows = p.B, p.T, p.H
    tokens = [torch.empty(*rows, D, dtype=dtype, device="meta") for D in (p.K, p.K, p.V)]
    tokens += [torch.empty(*rows, dtype=torch.float32, device="meta") for _ in "if"]
    if device is not None:
        both = programs(spec, device)
        assert both.backward is not None
        made = [both.forward.buffers[n] for n in both.forward.outputs]
        kept, output = (sum(b.bytes for b in made if b.role == x) for x in ("saved", "output"))
        return Memory(_bytes(*tokens), output, kept, _made(both.forward), _made(both.backward))
    q, k, v, i, f = tokens
    x = Inputs(q, k, v, i, f, None, None, None, None)
    dh = torch.empty_like(x.v)
    with torch.no_grad():
        with _Allocations(*tokens) as forward:
            h, C, n, m, saved = ops.forward(x, spec)
        del C, n, m
        with _Allocations(*tokens, h, saved, dh) as backward:
            gradients = ops.backward(dh, None, None, h, saved, x, spec)
        del gradients
    return Memory(_bytes(*tokens), _bytes(h), _bytes(saved), forward.peak, backward.peak)
