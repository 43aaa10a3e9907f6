"""Which plan serves a call, and the integers of the device that it is made for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tfla.plan import Device, Plan, Problem, StoredSizes, plan, stored_sizes
from tfla.spec import CallSpec

if TYPE_CHECKING:  # who has JAX may have no torch
    import torch
    from torch import Tensor

Change = Callable[[Plan], Plan]

_devices: dict[torch.device | Device, Device] = {}
_plans: dict[tuple[Any, ...], Plan] = {}


class _Now:
    """What plans depend on besides the call: the same for all threads, for a backward pass runs in
    threads of autograd's."""

    change: Change | None = None
    device: Device | None = None  # that tensors without memory are planned for


def mode() -> tuple[Change | None, Device | None]:
    """What a plan, and so a Program, depends on besides the call."""
    return _Now.change, _Now.device


def device_of(x: Tensor | CallSpec) -> Device:
    """The integers of x's device; a small part where there is none (the interpreter)."""
    device = x.device
    if _Now.device is not None and getattr(device, "type", None) == "meta":
        return _Now.device
    found = _devices.get(device)
    if found is None:
        found = _devices[device] = device if isinstance(device, Device) else _read(device)
    return found


def _read(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device((0, 0), 4, 65536)
    import torch

    p = torch.cuda.get_device_properties(device)
    capability = (0, 0) if torch.version.hip else (p.major, p.minor)
    shared = getattr(p, "shared_memory_per_block_optin", 65536)
    return Device(capability, p.multi_processor_count, shared)


def _problem(spec: CallSpec) -> Problem:
    s = spec
    B, N = (s.B, s.N) if s.planned_rows is None else (s.planned_rows, s.planned_rows)
    return Problem(B, s.T, s.H, s.K, s.V, N, s.packed, s.dtype.itemsize, s.precision, s.G)


def plan_of(spec: CallSpec) -> Plan:
    """The plan that serves a call, all of whose sizes are integers."""
    problem = _problem(spec)
    key = (spec.device, problem, *mode())
    found = _plans.get(key)
    if found is None:
        found = plan(problem, device_of(spec))
        if _Now.change is not None:
            found = _Now.change(found)
        if len(_plans) >= 10_000:
            _plans.clear()
        _plans[key] = found
    return found


def stored_sizes_of(spec: CallSpec) -> list[tuple[int, StoredSizes]]:
    """(1 or 0, sizes): those of the plan have a 1. Sizes of the call may be symbols, which nothing
    here compares."""
    if _Now.change is None:
        return stored_sizes(_problem(spec), device_of(spec))
    numbers = {name: int(getattr(spec, name)) for name in "BTHGKVN"}
    found = plan_of(spec.but(**numbers))
    return [(1, StoredSizes(found.L, found.checkpoint_every, found.checkpoint_shape))]


@contextlib.contextmanager
def planned_for(device: Device) -> Iterator[None]:
    """Calls on tensors without memory (device "meta") are planned as if they lay on ``device``, and
    allocate what they would there; nothing is launched."""
    before, _Now.device = _Now.device, device
    try:
        yield
    finally:
        _Now.device = before


@contextlib.contextmanager
def changed(change: Change) -> Iterator[None]:
    """Every plan is what ``change`` makes of it. Calls know their Programs again if it is the same
    function again."""
    before, _Now.change = _Now.change, change
    try:
        yield
    finally:
        _Now.change = before
