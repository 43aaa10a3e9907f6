"""A Program of the kernels as calls of XLA.

Each launch is one call of ``triton_kernel_call_ffi``, which JAX's plugin for CUDA brings: XLA's own
way to launch a Triton kernel, machine code included, with command buffers and without the host. Its
attribute is a zlib-compressed protobuf, ``TritonAnyKernelCall``; ``message`` writes it by hand.
Buffers of a call come as operands, then results, and fill the addresses among the parameters in
this order. So kernels take what they read, then what they update, then what they write, and an
update is an operand whose result is aliased to it and stands behind all others.

XLA (jaxlib 0.11.2) has a fault that would make results wrong in silence: in a loop it fuses a call
with the slices around it, and forgets that a result was to lie where an operand lies. It fuses only
slices whose size is a multiple of 128 bytes, so no buffer that is updated has such a size.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tfla.jax.interpreter import interpret
from tfla.jax.shards import axes_of, varying
from tfla.kernels.compile import compiled, source_of_launch
from tfla.kernels.program import BYTES, Buffer, Launch, Program
from tfla.plan import Device

TARGET = "triton_kernel_call_ffi"
SLICE = 128  # bytes; see above
# JAX has no 64-bit numbers unless a program asks for them: those that no caller sees are two of 32.
TYPES = {
    "fp16": jnp.float16,
    "bf16": jnp.bfloat16,
    "fp32": jnp.float32,
    "i32": jnp.int32,
    "fp64": jnp.uint32,
    "i64": jnp.uint32,
}


# ---------------------------------------------------------------- the message


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative ones in two's complement
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _parameter(kind: str, value: Any) -> bytes:
    """A ``TritonKernelCall.Parameter``; kind: a type of Triton's."""
    if kind[0] == "*":
        return _text(1, _number(2, 16))  # an array that begins at a multiple of 16 bytes
    if kind == "fp32":
        return _varint(7 << 3 | 5) + struct.pack("<f", value)
    return _number({"i32": 3, "i64": 5, "u64": 6}[kind], value)


def message(
    code: Any, capability: int, grid: Sequence[int], parameters: Sequence[tuple[str, Any]]
) -> bytes:
    """``TritonAnyKernelCall`` of a kernel that Triton has compiled. parameters: (type, value)."""
    about, cubin = code.metadata, code.asm["cubin"]
    # jaxlib keeps kernels by name, shared memory and PTX: the hash tells ours from each other.
    image = _text(1, cubin) + _text(2, about.name) + _number(3, about.shared)
    kernel = (
        _text(1, about.name)
        + _number(2, about.num_warps)
        + _number(3, about.shared)
        + _text(4, hashlib.sha256(cubin).hexdigest())
        + _number(6, capability)
        + _number(10, about.num_ctas)
        + _text(11, image)
    )
    call = _text(1, kernel)
    call += b"".join(_number(field, size) for field, size in zip((2, 3, 4), grid, strict=True))
    call += b"".join(_text(5, _parameter(kind, value)) for kind, value in parameters)
    return zlib.compress(_text(1, call) + _text(4, about.name))


@functools.lru_cache(maxsize=4096)
def _call_of(launch: Launch, buffers: tuple[Buffer, ...], device: Device) -> tuple[bytes, int]:
    """(message, bytes of scratch memory) of a launch."""
    major, minor = device.capability
    capability = 10 * major + minor
    source = source_of_launch(launch, buffers)
    code = compiled(source, "cuda", capability)
    values = (*launch.buffers, *launch.numbers, *launch.constants)
    parameters = [
        (kind, value)
        for (_, kind), value in zip(source.signature, values, strict=True)
        if kind != "constexpr"
    ]
    grid = (*launch.grid, 1, 1)[:3]
    about = code.metadata
    if getattr(about, "profile_scratch_size", 0):
        raise RuntimeError("kernels that a profiler of Triton has changed cannot run in JAX.")
    scratch = about.global_scratch_size * about.num_ctas * math.prod(grid)
    # Behind those that we know a kernel takes two: scratch memory, and the profiler's.
    parameters += [("*i8", None) if scratch else ("u64", 0), ("u64", 0)]
    return message(code, capability, grid, parameters), scratch


# ---------------------------------------------------------------- a Program


def elements(buffer: Buffer) -> int:
    """Of a buffer where it is updated in place: its size is no multiple of ``SLICE``."""
    count = math.prod(buffer.shape) + 1
    return count + (count * BYTES[buffer.dtype] % SLICE == 0)


def _type_of(buffer: Buffer) -> jax.ShapeDtypeStruct:
    """As XLA has it: in its own shape, or flat where it is longer than its shape."""
    words = max(BYTES[buffer.dtype] // 4, 1)
    if buffer.updated:
        return jax.ShapeDtypeStruct((elements(buffer) * words,), TYPES[buffer.dtype])
    shape = (*buffer.shape[:-1], buffer.shape[-1] * words) if words > 1 else buffer.shape
    return jax.ShapeDtypeStruct(shape, TYPES[buffer.dtype])


def trimmed(buffer: Buffer, x: Array) -> Array:
    """What is left of an updated buffer when it goes to the caller."""
    return x[: math.prod(buffer.shape)].reshape(buffer.shape) if buffer.updated else x


def run(
    program: Program,
    given: dict[int, Array],
    device: Device,
    overwrites: Mapping[int, int] | None = None,
) -> dict[int, Array]:
    """The buffers that leave the Program, by their places. given: those that come in. All of them
    vary over the same axes of a mesh, and those that leave it do, too. overwrites: of buffers that
    are written those that are read and may lie in the same memory, if nobody needs them again; that
    nothing is lost where XLA forgets it is up to the kernel."""
    if device.capability == (0, 0):
        return interpret(program, given, [_type_of(buffer) for buffer in program.buffers])
    axes = axes_of(given)
    arrays = dict(given)
    for launch in program.launches:
        opaque, scratch = _call_of(launch, program.buffers, device)
        reads, updates, writes = (
            [n for n in side if n is not None]
            for side in (launch.reads, launch.updates, launch.writes)
        )
        for n in updates:
            if n not in arrays:  # nothing is there yet
                arrays[n] = _empty(_type_of(program.buffers[n]), axes)
        results = [_type_of(program.buffers[n]) for n in writes]
        results += [jax.ShapeDtypeStruct((scratch,), jnp.uint8)] if scratch else []
        first, operands = len(results), len(reads)
        results += [jax.ShapeDtypeStruct(arrays[n].shape, arrays[n].dtype) for n in updates]
        aliases = {operands + at: first + at for at in range(len(updates))}
        aliases |= {reads.index(old): writes.index(new) for new, old in (overwrites or {}).items()}
        call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)
        made = varying(call(*[arrays[n] for n in reads + updates], opaque=opaque), axes)
        arrays |= zip(writes, made, strict=False)
        arrays |= zip(updates, made[first:], strict=True)
    for n in program.outputs:
        if n not in arrays:  # there was nothing to write
            arrays[n] = _empty(_type_of(program.buffers[n]), axes)
    return {n: arrays[n] for n in program.outputs}


def _empty(of: jax.ShapeDtypeStruct, axes: Any) -> Any:
    return varying(lax.empty(of.shape, of.dtype), axes)
