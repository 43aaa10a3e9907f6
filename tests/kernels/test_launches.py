"""A launch that only wants addresses: what it hands to the CUDA driver, against what the compiled
kernel says that it reads. The driver is one that writes down what it is given."""

import contextlib
import contextvars
import ctypes
import os
import re
import struct
import threading
import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from builds import DEVICES, build, call, launches, of_tensors

from tfla import _compat
from tfla.kernels import runtime
from tfla.kernels.program import Program, Symbol
from tfla.programs import programs
from tfla.spec import CallSpec

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
        c = _compat._LaunchConfig.from_address(config)
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
        kernel = SimpleNamespace(
            src=compiled.src, metadata=about, function=2**40 + 7, asm=compiled.asm
        )
        kinds = list(compiled.src.signature.values())
        values = [{"i32": -5, "i64": 2**33, "fp32": 0.1}.get(kind, 9) for kind in kinds]
        driver = Driver(sizes, [])
        with mock.patch.object(_compat, "_driver", lambda driver=driver: driver):
            run = _compat.pack_launch(kernel, (6, 5, 4), 3, values)
            assert run is not None and run.scratch == 128 * 6 * 5 * 4
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
    kernel = SimpleNamespace(
        src=compiled.src, metadata=compiled.metadata, function=1, asm=compiled.asm
    )
    kinds = list(compiled.src.signature.values())
    pointers = [8] * sum(kind[0] == "*" for kind in kinds)
    driver = Driver(read(compiled.asm["ptx"]), [201, 0, 201, 700])
    with mock.patch.object(_compat, "_driver", lambda: driver):
        run = _compat.pack_launch(kernel, (1, 1, 1), 3, [1] * len(kinds))
        assert run is not None
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
            launch = of_tensors(self.kernel, (num_warps, num_stages), args, constants)
            compiled = build(launch, "cuda", 90)
            self.sizes = read(compiled.asm["ptx"])
            self.kinds = dict(launch.signature)
            about = SimpleNamespace(**compiled.metadata._asdict() | {"global_scratch_size": 128})
            return SimpleNamespace(src=compiled.src, metadata=about, function=11, asm=compiled.asm)

        return call


def passes(gate: str) -> list[Program]:
    """What a forward and a backward pass launch on Hopper."""
    both = programs(call(2, 300, 2, 64, 64, gate=gate), DEVICES["cuda", 90])
    assert both.backward is not None
    return [both.forward, both.backward]


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_a_launch_hands_over_its_own_arguments(gate: str) -> None:
    """And its scratch memory, which is there as long as the driver may ask for it."""
    kept: list[Any] = []

    def allocate(size: int, *_: Any) -> torch.Tensor:
        memory = torch.empty(size, dtype=torch.int8)
        kept.append((weakref.ref(memory), size, memory.data_ptr()))
        return memory

    launches_ = [(p, x) for p in passes(gate) for x in p.launches]
    assert len(launches_) == (9 if gate == "exp" else 6)
    for program, x in launches_:
        built, driver = Built(x.kernel), Driver([], [])
        real = driver.cuLaunchKernelEx
        tensors = [
            None if n is None else torch.zeros(16, dtype=runtime.TYPES[program.buffers[n].dtype])
            for n in x.buffers
        ]
        numbers, constants = x.numbers, x.parameters.constants
        shape = x.warps, x.stages

        def launch(*args: Any, real: Any = real) -> int:
            assert kept[-1][0]() is not None
            return real(*args)

        driver.cuLaunchKernelEx = launch  # type: ignore[method-assign]
        with (
            mock.patch.object(_compat, "_driver", lambda driver=driver: driver),
            mock.patch.object(runtime, "_allocate", allocate),
            mock.patch.object(runtime, "_stream", lambda index: 7),
            mock.patch.object(runtime, "_compiled", {}),
            mock.patch.object(runtime, "_kernels", {}),
        ):
            runtime.launch(built, x.grid, shape, tensors, *numbers, **constants)
            assert not driver.seen  # Triton's
            driver.sizes = built.sizes
            runtime.launch(built, x.grid, shape, tensors, *numbers, **constants)
        ((*where, got),) = driver.seen
        assert where[:2] == [(*x.grid, 1, 1)[:3], (32 * shape[0], 1, 1)] and where[3:] == [7, 11]
        count = torch.Size(x.grid).numel()
        assert kept[-1][1] == 128 * count and kept[-1][0]() is None
        named = dict(zip(x.kernel.arg_names, (*tensors, *numbers), strict=False))
        forms = {"i32": "i", "i64": "q", "fp32": "f"}
        wanted = [
            struct.pack("Q", named[name].data_ptr())
            if kind[0] == "*"
            else struct.pack(forms[kind], named[name])
            for name, kind in built.kinds.items()
            if kind != "constexpr"
        ]
        assert got == [*wanted, struct.pack("Q", kept[-1][2]), bytes(8)]


# ---------------------------------------------------------------- launches that are Triton's


GONE = "no such field"


class Compiled:
    """What Triton compiled, some fields of its metadata changed."""

    def __init__(self, compiled: Any, **metadata: Any) -> None:
        self.src, self.asm, self.function = compiled.src, compiled.asm, 1
        about = compiled.metadata._asdict() | metadata
        self.metadata = SimpleNamespace(**{n: x for n, x in about.items() if x is not GONE})


@pytest.fixture(scope="module")
def weights() -> Any:
    (launch, *_) = launches(DEVICES["cuda", 90], 2, 300, 2, 64, 64, gate="sigmoid")
    return build(launch, "cuda", 90)


def packed(compiled: Any, values: list[Any] | None = None) -> Any:
    values = [1] * len(compiled.src.signature) if values is None else values
    with mock.patch.object(_compat, "_driver", lambda: Driver([], [])):
        return _compat.pack_launch(compiled, (1, 1, 1), 0, values)


@pytest.mark.parametrize(
    "metadata",
    [
        {"num_ctas": 2},
        {"launch_pdl": True},
        {"launch_cooperative_grid": True},
        {"profile_scratch_size": 64},
        {"instrumentation_mode": "gsan"},
        {"cluster_dims": (2, 1, 1)},
        {"tensordesc_meta": [{}]},
        {"name": "another"},
        *({name: GONE} for name in ("num_ctas", "launch_pdl", "launch_cooperative_grid")),
        *({name: GONE} for name in ("target", "name", "profile_scratch_size", "shared")),
    ],
    ids=str,
)
def test_a_launch_with_attributes_is_left_to_triton(weights: Any, metadata: dict[str, Any]) -> None:
    assert packed(Compiled(weights)) is not None
    assert packed(Compiled(weights, **metadata)) is None


def test_a_buffer_that_the_machine_code_does_not_read_is_never_made(weights: Any) -> None:
    text = weights.asm["ptx"]
    first = re.search(r"\.param \.u64[^,]*,\n?", text)
    assert first is not None
    for ptx in (text.replace(first[0], "", 1), text.replace(first[0], first[0] * 2, 1), ""):
        changed = Compiled(weights)
        changed.asm = {"ptx": ptx}
        assert packed(changed) is None
    changed.asm = {}
    assert packed(changed) is None
    other = Compiled(weights)
    other.src = SimpleNamespace(signature={**weights.src.signature, "more": "i32"})
    assert packed(other) is None
    other.src = SimpleNamespace(signature={**weights.src.signature, "i": "tensordesc<bf16[4]>"})
    assert packed(other) is None
    assert packed(Compiled(weights), [2**40] * len(weights.src.signature)) is None
    assert packed(Compiled(weights), [1]) is None


@pytest.mark.parametrize("version", [(3, 5), (3, 10), (4, 0), None])
def test_another_triton_launches_by_itself(
    weights: Any, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "triton_version", lambda: version)
    assert packed(Compiled(weights)) is None


def test_without_a_driver_by_this_name_triton_launches(
    weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(_compat, "_driver", none)
    values = [1] * len(weights.src.signature)
    assert _compat.pack_launch(Compiled(weights), (1, 1, 1), 0, values) is None


class Counted:
    """A kernel that counts who launches it, and by whose allocator."""

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.by_triton, self.by_driver, self.allocators = compiled, 0, 0, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.by_triton += 1
            self.allocators.append(allocator())
            return self.compiled

        return call

    def packed(self, *_: Any) -> Any:
        def run(stream: int, scratch: int, addresses: Any) -> None:
            self.by_driver += 1

        run.scratch = 0  # type: ignore[attr-defined]
        return run


def allocator() -> Any:
    """Whose scratch memory a launch here and now would get."""
    from triton.runtime import _allocation

    return _allocation._allocator.get()


def patched(kernel: Counted) -> Any:
    stack = contextlib.ExitStack()
    for name, value in (
        ("pack_launch", kernel.packed),
        ("_stream", lambda index: 7),
        ("_compiled", {}),
        ("_kernels", {}),
        ("_passes", {}),
    ):
        stack.enter_context(mock.patch.object(runtime, name, value))
    return stack


def test_a_profiler_sees_every_launch_while_its_hooks_are_there() -> None:
    """And none after it is gone: Programs are played again."""
    from triton import knobs

    kernel = Counted(object())
    kernel.arg_names = ["x", "y", "N", "BLOCK"]  # type: ignore[attr-defined]
    kernel.__name__ = "counted"  # type: ignore[attr-defined]
    spec = call(1, 64, 1, 16, 16).but(device=torch.device("cpu"), dtype=torch.float32)
    q = torch.ones(1, 64, 1, 16)

    def function(spec: CallSpec, x: Symbol) -> tuple[Symbol]:
        y = x.builder.new("y", *x.shape)
        x.builder.launch(
            "one",
            kernel,
            (1,),
            4,
            2,
            reads={"x": x},
            writes={"y": y},
            numbers={"N": 1},
            constants={"BLOCK": 16},
        )
        return (y,)

    def once() -> tuple[int, int]:
        before = kernel.by_triton, kernel.by_driver
        runtime.execute(function, spec, (q,))
        return kernel.by_triton - before[0], kernel.by_driver - before[1]

    def hook(*_: Any) -> None: ...

    with patched(kernel):
        assert [once() for _ in range(4)] == [(1, 0), (0, 1), (0, 1), (0, 1)]
        for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            chain.add(hook)
            try:
                assert [once() for _ in range(2)] == [(1, 0)] * 2
                runtime.launch(kernel, (1,), (4, 2), (torch.ones(64), None), 1, BLOCK=16)
            finally:
                chain.remove(hook)
            assert once() == (0, 1)


def test_other_numbers_need_the_compiler_only_where_it_may_compile_anew() -> None:
    """For 1, for multiples of 16 and for more than 32 bits it does; a length seldom is one."""
    kernel = Counted(object())

    def launched(number: int, grid: int = 1, width: int = 16, warps: int = 4) -> str:
        before = kernel.by_driver
        x = torch.ones(64)
        runtime.launch(kernel, (grid,), (warps, 2), (x,), number, 0.5, BLOCK=width)
        return "driver" if kernel.by_driver > before else "Triton"

    with patched(kernel):
        assert [launched(n) for n in (3, 5, 7, 2**31 - 1, -3)] == ["Triton"] + ["driver"] * 4
        assert [launched(n) for n in (16, 0, 32, 1, 1, 2**31 + 1, 2**40 + 1)] == [
            *("Triton", "driver", "driver", "Triton", "driver", "Triton", "driver")
        ]
        assert launched(5, grid=9) == "driver"
        assert launched(5, width=32) == launched(5, warps=8) == "Triton"


def test_the_users_allocator_stays_and_ours_serves_every_thread() -> None:
    import triton

    kernel = Counted(None)  # never packed, as in the interpreter

    def run() -> None:
        runtime.launch(kernel, (1,), (4, 2), (torch.ones(64),), 1)

    def mine(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8)

    def thread() -> None:
        before = allocator()
        run()
        after.append(allocator() is before)

    def user() -> None:
        triton.set_allocator(mine)
        run()
        after.append(allocator() is mine)

    after: list[bool] = []
    with patched(kernel):
        contextvars.copy_context().run(user)
        for _ in range(2):
            one = threading.Thread(target=thread)
            one.start()
            one.join()
    assert after == [True] * 3 and kernel.allocators == [runtime._allocate] * 3


def test_scratch_memory_of_an_unset_allocator_is_ours() -> None:
    kernel = Counted(None)
    before = allocator()
    with patched(kernel):
        runtime.launch(kernel, (1,), (4, 2), (torch.ones(64),), 1)
    assert allocator() is before and kernel.allocators == [runtime._allocate]


def test_tensors_without_memory_launch_nothing() -> None:
    kernel = Counted(object())
    with patched(kernel):
        runtime.launch(kernel, (1,), (4, 2), (torch.ones(64, device="meta"),), 1)
    assert not kernel.by_triton and not kernel.by_driver
