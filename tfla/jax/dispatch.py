"""Which backend serves a call, and for which device "triton" is planned.

A traced function does not know where it will run, so plans are made for the device that JAX says
is the default one, or for the one on which an array lies that is not traced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tfla.jax.spec import BackendName
from tfla.plan import Device

BACKENDS = ("reference", "triton")
GPUS = ("gpu", "cuda", "rocm")
# Bytes of shared memory that one program may use, where JAX does not say: CUDA C++ Programming
# Guide, "Compute Capabilities".
SHARED_MEMORY = {
    **{(8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448},
    **{(10, 0): 232448, (10, 3): 232448, (12, 0): 101376, (12, 1): 101376},
}
FIRST_TRITON, LAST_TRITON = (3, 6), (3, 9)  # all of 3.6.x to 3.9.x
INTERPRETER = Device((0, 0), 4, 65536)  # as for torch

_planned: ContextVar[Device | None] = ContextVar("_planned", default=None)
_warned: set[str] = set()


@contextlib.contextmanager
def planned_for(device: Device) -> Iterator[None]:
    """Calls are traced for a GPU that need not be there: for compilation ahead of time."""
    before = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(before)


def pick_backend(backend: BackendName | None, *arrays: Any) -> Device | None:
    """The device that "triton" is planned for, or None where "reference" serves: the one named, or
    the fastest that can. arrays: the first one is q."""
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(f"backend must be None, 'reference', 'triton'; got {backend!r}.")
    if backend == "reference":
        return None
    if backend is None and _planned.get() is None and _device_of(*arrays).platform == "cpu":
        return None
    device, why_not = _choice(*arrays)
    if backend == "triton" and device is None:
        raise RuntimeError(f'backend="triton" cannot serve this call: {why_not}')
    if device is None and why_not not in _warned and _platform_of(*arrays) in GPUS:
        _warned.add(why_not)
        warnings.warn(f'tfla.jax runs on its backend "reference" here: {why_not}', stacklevel=4)
    return device


def _choice(*arrays: Any) -> tuple[Device | None, str]:
    """(device, ""), or (None, why "triton" cannot serve them)."""
    if jnp.dtype(arrays[0].dtype) == jnp.float64:
        return None, "its kernels take fp16, bf16 and fp32, and q is fp64."
    planned, why_not = _planned.get(), ""
    if planned is None:
        planned, why_not = _planned_on(_device_of(*arrays))
    why_not = why_not or _why_no_triton()
    return (None, why_not) if why_not else (planned, "")


def _planned_on(device: Any) -> tuple[Device | None, str]:
    """The integers of a device of JAX, or why there are no kernels for it."""
    if device.platform == "cpu" and _is_interpreted():
        return INTERPRETER, ""
    if device.platform not in ("gpu", "cuda"):
        return None, (
            "it needs an NVIDIA GPU or, on a CPU, Triton's interpreter (TRITON_INTERPRET=1); got "
            f"{device.platform}."
        )
    found = _read(device)
    if found.capability < (8, 0):
        return None, f"it needs compute capability 8.0 or later; got {device.device_kind}."
    return found, ""


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_no_triton() -> str:
    try:
        triton: Any = importlib.import_module("triton")
    except Exception as error:  # a broken installation raises what it likes
        return f"it needs Triton ({type(error).__name__}: {error}): pip install triton."
    release = str(getattr(triton, "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else None
    if version is None or not FIRST_TRITON <= version <= LAST_TRITON:
        return f"it needs Triton 3.6 to 3.9; got {release or 'one that does not say'}."
    return ""


def _device_of(*arrays: Any) -> Any:
    """Where a call of these arrays runs, as far as can be known."""
    for x in arrays:
        if isinstance(x, Array) and not isinstance(x, jax.core.Tracer):
            return min(x.devices(), key=lambda device: device.id)
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def _platform_of(*arrays: Any) -> str:
    platform: str = _device_of(*arrays).platform
    return platform


@functools.cache
def _read(device: Any) -> Device:
    """The integers of a GPU of JAX."""
    try:
        major, minor = map(int, str(device.compute_capability).split("."))
    except ValueError:  # AMD's have names
        return Device((0, 0), 0, 0)
    shared = getattr(device, "shared_memory_per_block_optin", 0)
    shared = shared or SHARED_MEMORY.get((major, minor), 101376)
    return Device((major, minor), device.core_count, shared)
