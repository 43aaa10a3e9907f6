"""From a launch of a Program to machine code, for a GPU that need not be there. It needs Triton,
and neither torch nor a driver; Triton keeps on disk what it has compiled.

The code is that which Triton makes when torch launches: parameters are specialised alike, a number
1 and None being constants, and addresses and numbers that are multiples of 16 being known as such.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfla._compat_triton import compile_kernel
from tfla.kernels.program import Buffer, Launch


@dataclass(frozen=True)
class Source:
    """All that machine code is made of; launches of equal ones share it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # of each parameter its type, or "constexpr"
    constants: tuple[tuple[str, Any], ...]  # those that are "constexpr"
    divisible: tuple[int, ...]  # places of parameters that are multiples of 16
    warps: int
    stages: int

    def __str__(self) -> str:
        picked = {k: v for k, v in self.constants if k.isupper() and v is not None}
        return f"{self.kernel.__name__} warps={self.warps} " + " ".join(
            f"{k}={v}" for k, v in picked.items()
        )


def source(
    kernel: Any, shape: tuple[int, int], named: Mapping[str, Any], aligned: Collection[str] = ()
) -> Source:
    """Of a launch of values by the names of parameters, an address as its dtype. shape: (warps,
    stages). aligned: addresses that are multiples of 16."""
    signature, fixed, divisible = [], [], []
    skip = set(kernel.do_not_specialize or ())
    for index, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names, strict=True)):
        value = named[name]
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and name not in skip)
        ):
            signature.append((name, "constexpr"))
            fixed.append((name, value))
        elif isinstance(value, str):
            signature.append((name, "*" + value))
            if name in aligned:
                divisible.append(index)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in skip:
                divisible.append(index)
    return Source(kernel, tuple(signature), tuple(fixed), tuple(divisible), *shape)


def source_of_launch(launch: Launch, buffers: Sequence[Buffer]) -> Source:
    """Of a launch of a Program that has these buffers."""
    p = launch.parameters
    given = {
        name: None if n is None else buffers[n]
        for name, n in (p.reads | p.updates | p.writes).items()
    }
    named = {name: None if b is None else b.dtype for name, b in given.items()}
    aligned = [name for name, b in given.items() if b is not None and b.aligned]
    rest = p.numbers | p.constants
    return source(launch.kernel, (launch.warps, launch.stages), {**named, **rest}, aligned)


@functools.lru_cache(maxsize=4096)
def compiled(source: Source, backend: str, arch: int | str) -> Any:
    """The kernel, compiled: Triton's own value. arch: 90 for compute capability 9.0, ..."""
    names = source.kernel.arg_names
    options = {"num_warps": source.warps}
    if backend != "hip":
        options["num_stages"] = source.stages
    return compile_kernel(
        source.kernel,
        dict(source.signature),
        {(names.index(name),): value for name, value in source.constants},
        {(index,): [["tt.divisibility", 16]] for index in source.divisible},
        (backend, arch),
        options,
    )
