"""A Program in Triton's interpreter, on the host: for tests of what surrounds the kernels."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from tfla.jax.shards import axes_of, varying
from tfla.kernels.program import Launch, Program

_one_at_a_time = threading.Lock()  # the interpreter keeps the number of its program in one place


class _Pointer:
    """An array of NumPy as the interpreter takes tensors: an address and a type."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Pointer:
        return self

    def cpu(self) -> _Pointer:
        return self

    def new_empty(self, *_: Any, **__: Any) -> _Pointer:
        return _Pointer(self.array, self.dtype)

    def set_(self, storage: _Pointer, *_: Any) -> None:
        self.array = storage.array

    def copy_(self, _: _Pointer) -> None:
        """It lies where it lay."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


LONG = {
    **{"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"},
    **{"i32": "int32", "i64": "int64"},
}


def interpret(
    program: Program, given: dict[int, Array], types: Sequence[jax.ShapeDtypeStruct]
) -> dict[int, Array]:
    """As ``lowering.run``; what is not written is NaN or as good. types: of all buffers."""
    places = list(given)

    def play(*arrays: Any) -> list[np.ndarray]:
        memory = {n: np.array(x, order="C") for n, x in zip(places, arrays, strict=True)}
        for n, of in enumerate(types):
            if n not in memory:
                size = math.prod(of.shape) * np.dtype(of.dtype).itemsize
                memory[n] = np.full(size, 0xFF, np.uint8).view(of.dtype).reshape(of.shape)
        with _one_at_a_time:
            for launch in program.launches:
                _launch(program, launch, memory)
        return [memory[n] for n in program.outputs]

    out = [types[n] for n in program.outputs]
    made = jax.pure_callback(play, out, *given.values(), vmap_method="sequential")
    return dict(zip(program.outputs, varying(made, axes_of(given)), strict=True))


def _launch(program: Program, launch: Launch, memory: dict[int, np.ndarray]) -> None:
    pointers = [
        None if n is None else _Pointer(memory[n], LONG[program.buffers[n].dtype])
        for n in launch.buffers
    ]
    constants = launch.parameters.constants
    launch.kernel[launch.grid](*pointers, *launch.numbers, **constants, num_warps=launch.warps)
