"""A Program in Triton's interpreter, on the host: for tests of what surrounds the kernels."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
from jax import Array

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


def interpret(program: Program, given: dict[int, Array]) -> dict[int, Array]:
    """As ``lowering.run``; what is not written is NaN or as good."""
    from tfla.jax.lowering import _type_of

    places = list(given)
    types = [_type_of(program.buffers[n]) for n in program.outputs]

    def play(*arrays: Any) -> list[np.ndarray]:
        memory = {n: np.array(x, order="C") for n, x in zip(places, arrays, strict=True)}
        for n, buffer in enumerate(program.buffers):
            if n not in memory:
                of = _type_of(buffer)
                memory[n] = np.full(of.shape, 0xFF, np.uint8).repeat(np.dtype(of.dtype).itemsize)
                memory[n] = memory[n].view(of.dtype).reshape(of.shape)
        with _one_at_a_time:
            for launch in program.launches:
                _launch(program, launch, memory)
        return [memory[n] for n in program.outputs]

    made = jax.pure_callback(play, types, *given.values(), vmap_method="sequential")
    return dict(zip(program.outputs, made, strict=True))


def _launch(program: Program, launch: Launch, memory: dict[int, np.ndarray]) -> None:
    pointers = [
        None if n is None else _Pointer(memory[n], LONG[program.buffers[n].dtype])
        for n in launch.buffers
    ]
    constants = launch.parameters.constants
    launch.kernel[launch.grid](*pointers, *launch.numbers, **constants, num_warps=launch.warps)
