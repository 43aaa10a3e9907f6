"""A launch that only wants addresses: what it hands to the CUDA driver, against what the compiled
kernel says that it reads. The driver is one that writes down what it is given."""

import ctypes
import os
import re
import struct
import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from builds import DEVICES, build, launches, record

import tfla
from tfla import kernels
from tfla.kernels import host

# Triton 3.9 warns of a default of its own at the first kernel.
pytestmark = pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION.*")

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


class Built:
    """A kernel that is built for compute capability 9.0 and not run; it wants scratch memory."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, num_warps: int, num_stages: int, **constants: Any) -> Any:
            launch = record(self.kernel, (num_warps, num_stages), args, constants)
            compiled = build(launch, "cuda", 90)
            self.sizes = read(compiled.asm["ptx"])
            self.kinds = dict(launch.signature)
            about = SimpleNamespace(**compiled.metadata._asdict() | {"global_scratch_size": 128})
            return SimpleNamespace(src=compiled.src, metadata=about, function=11)

        return call


def calls(gate: str) -> list[Any]:
    """What a forward and a backward pass launch on Hopper: kernel, grid, shape, tensors, ..."""
    seen: list[Any] = []

    def launch(*args: Any, **constants: Any) -> None:
        seen.append((*args, constants))

    x = [torch.zeros(2, 300, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    x += [torch.zeros(2, 300, 2, requires_grad=True) for _ in "if"]
    with (
        mock.patch.object(kernels, "launch", launch),
        mock.patch("tfla.kernels.grid.device_of", lambda _: DEVICES["cuda", 90]),
        mock.patch.dict("tfla.kernels.grid._plans", clear=True),
        mock.patch("tfla.checks.why_not_triton", lambda q: None),
    ):
        h = tfla.mlstm(*x, input_gate=gate, backend="triton")[0]
        torch.autograd.grad(h, x, torch.ones_like(h))
    return seen


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_a_launch_hands_over_its_own_arguments(gate: str) -> None:
    """And its scratch memory, which is there as long as the driver may ask for it."""
    kept: list[Any] = []

    def allocate(size: int, *_: Any) -> torch.Tensor:
        memory = torch.empty(size, dtype=torch.int8)
        kept.append((weakref.ref(memory), size, memory.data_ptr()))
        return memory

    seen = calls(gate)
    assert len(seen) == (9 if gate == "exp" else 6)
    for kernel, grid, shape, tensors, *numbers, constants in seen:
        built, driver = Built(kernel), Driver([], [])
        real = driver.cuLaunchKernelEx

        def launch(*args: Any, real: Any = real) -> int:
            assert kept[-1][0]() is not None
            return real(*args)

        driver.cuLaunchKernelEx = launch  # type: ignore[method-assign]
        with (
            mock.patch.object(host, "_driver", lambda driver=driver: driver),
            mock.patch.object(host, "_allocate", allocate),
            mock.patch.object(host, "_stream", lambda index: 7),
            mock.patch.object(host, "_compiled", {}),
        ):
            host.launch(built, grid, shape, tensors, *numbers, **constants)
            assert not driver.seen  # Triton's
            driver.sizes = built.sizes
            host.launch(built, grid, shape, tensors, *numbers, **constants)
        ((*where, got),) = driver.seen
        assert where[:2] == [(*grid, 1, 1)[:3], (32 * shape[0], 1, 1)] and where[3:] == [7, 11]
        programs = torch.Size(grid).numel()
        assert kept[-1][1] == 128 * programs and kept[-1][0]() is None
        named = dict(zip(kernel.arg_names, (*tensors, *numbers), strict=False))
        forms = {"i32": "i", "i64": "q", "fp32": "f"}
        wanted = [
            struct.pack("Q", named[name].data_ptr())
            if kind[0] == "*"
            else struct.pack(forms[kind], named[name])
            for name, kind in built.kinds.items()
            if kind != "constexpr"
        ]
        assert got == [*wanted, struct.pack("Q", kept[-1][2]), bytes(8)]
