"""A launch that only wants addresses: what it hands to the CUDA driver, against what the compiled
kernel says that it reads. The driver is one that writes down what it is given."""

import ctypes
import re
import struct
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from builds import DEVICES, build, launches

from tfla.kernels import host

SIZES = {"u64": 8, "s64": 8, "b64": 8, "f64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}


def read(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel."""
    entry = re.search(r"\.entry [^(]*\(([^)]*)\)", ptx)
    assert entry is not None
    return [SIZES[kind] for kind in re.findall(r"\.param \.(\w+)", entry[1])]


class Driver:
    """Keeps grid, block, shared memory, stream, function and parameters of each launch."""

    def __init__(self, sizes: list[int], errors: list[int]) -> None:
        self.sizes, self.errors, self.seen, self.contexts = sizes, errors, [], []

    def cuLaunchKernelEx(self, config: int, function: int, parameters: None, extra: int) -> int:
        c = host._Config.from_address(config)
        kinds = (ctypes.c_void_p * 5).from_address(extra)
        assert (kinds[0], kinds[2], kinds[4]) == (1, 2, None) and c.count == 0
        memory = ctypes.string_at(kinds[1], ctypes.c_size_t.from_address(kinds[3]).value)
        values, at = [], 0
        for size in self.sizes:  # each at a multiple of its size
            at = -(-at // size) * size
            values.append(memory[at : at + size])
            at += size
        assert at == len(memory)
        self.seen.append((tuple(c.grid), tuple(c.block), c.shared, c.stream, function, values))
        return self.errors.pop(0) if self.errors else 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        self.contexts.append(device)

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> None:
        self.contexts.append(context)

    def cuGetErrorString(self, error: int, text: Any) -> None:
        text._obj.value = f"error {error}".encode()


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_the_driver_gets_what_the_kernel_reads(gate: str) -> None:
    seen = 0
    for launch in launches(DEVICES["cuda", 90], 2, 300, 2, 64, 64, gate=gate):
        compiled = build(launch, "cuda", 90)
        sizes = read(compiled.asm["ptx"])
        about = SimpleNamespace(**compiled.metadata._asdict() | {"global_scratch_size": 128})
        kernel = SimpleNamespace(src=compiled.src, metadata=about, function=2**40 + 7)
        kinds = list(compiled.src.signature.values())
        values = [{"i32": -5, "i64": 2**33, "fp32": 0.1}.get(kind, 9) for kind in kinds]
        driver = Driver(sizes, [])
        with mock.patch.object(host, "_driver", lambda driver=driver: driver):
            run = host._Bound(kernel, (6, 5, 4), 3, values)
            assert run.scratch == 128 * 6 * 5 * 4
            pointers = sum(kind[0] == "*" for kind in kinds)
            for turn in (1, 2):
                addresses = [2**45 + 16 * turn * n for n in range(pointers)]
                run(turn, 2**41 + turn, addresses)
                *where, got = driver.seen[-1]
                shape = (6, 5, 4), (32 * launch.warps, 1, 1), about.shared
                assert where == [*shape, turn, 2**40 + 7]
                forms = {"i32": "i", "i64": "q", "fp32": "f"}
                rest = [(forms[k], v) for k, v in zip(kinds, values, strict=True) if k in forms]
                wanted = [struct.pack("Q", a) for a in addresses]
                wanted += [struct.pack(form, v) for form, v in rest]
                wanted += [struct.pack("Q", 2**41 + turn), bytes(8)]
                assert got == wanted
        seen += 1
    assert seen > 5


def test_a_thread_without_a_context_gets_one_and_errors_are_said() -> None:
    (launch, *_) = launches(DEVICES["cuda", 90], 2, 300, 2, 64, 64, gate="sigmoid")
    compiled = build(launch, "cuda", 90)
    kernel = SimpleNamespace(src=compiled.src, metadata=compiled.metadata, function=1)
    kinds = list(compiled.src.signature.values())
    pointers = [8] * sum(kind[0] == "*" for kind in kinds)
    driver = Driver(read(compiled.asm["ptx"]), [201, 0, 201, 700])
    with mock.patch.object(host, "_driver", lambda: driver):
        run = host._Bound(kernel, (1, 1, 1), 3, [1] * len(kinds))
        run(7, 0, pointers)
        assert len(driver.seen) == 2 and driver.seen[0] == driver.seen[1]
        assert driver.contexts[0] == 3 and len(driver.contexts) == 2
        with pytest.raises(RuntimeError, match=f"{launch.kernel.__name__}: error 700"):
            run(7, 0, pointers)
        run(7, 0, pointers)  # and the next one can be launched
    assert len(driver.seen) == 5
