"""The file that touches private names of torch, Triton and the CUDA driver; those that compiling
needs, which needs no torch, are in _compat_triton.py.

Each section says which versions its names were checked with and what happens where a name is
missing or a version is another: a slower public way, or a plainer error, never a wrong result.
Nothing here imports Triton before a function that needs it is called: ``import tfla`` needs torch
alone.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import operator
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # no torch known; see ``can_record``
    TorchDispatchMode = object  # type: ignore[assignment, misc]

__all__ = [
    "ModuleWatch",
    "PackedLaunch",
    "TorchDispatchMode",
    "can_record",
    "constant_while_tracing",
    "copy_each",
    "current_stream",
    "default_store",
    "dispatch_modes",
    "driver_cuda_version",
    "forward_derivatives",
    "functorch_transforms",
    "is_batched",
    "is_hooked",
    "launch_by_triton",
    "launches_are_watched",
    "pack_launch",
    "pre_forward_hooks",
    "process_group",
    "storage_key",
    "triton_error",
    "triton_is_checked",
    "triton_release",
    "triton_version",
]


# ---------------------------------------------------------------- torch (checked: 2.11 to 2.13)

_C = getattr(torch, "_C", None)
_transforms_active = getattr(_C, "_are_functorch_transforms_active", None)


def functorch_transforms() -> bool:
    """Is a transform of torch.func (vmap, grad, jvp, ...) active in this thread?

    Without torch's name False: the call goes on, and torch's own error, in Function.apply, comes in
    place of ours.
    """
    return False if _transforms_active is None else _transforms_active()


_dispatch_modes = getattr(_C, "_len_torch_dispatch_stack", None)


def dispatch_modes() -> bool:
    """Does a dispatch mode (FakeTensorMode, selective checkpointing) look at this thread's calls?

    Without torch's name True: every call is then a torch.library operator, which modes see, at 60
    to 90 us.
    """
    return True if _dispatch_modes is None else _dispatch_modes() > 0


_is_batched = getattr(getattr(_C, "_functorch", None), "is_legacy_batchedtensor", None)


def is_batched(x: Tensor) -> bool:
    """Is it a batch of gradients (is_grads_batched=True)? Without torch's name False, and torch's
    own error, of a tensor without memory, comes in place of ours."""
    return False if _is_batched is None else _is_batched(x)


def is_hooked(module: torch.nn.Module) -> bool:
    """Is there a hook that torch runs when this module is called? A name of torch that is missing
    counts as one: the module is then called, and no kernel takes its weights."""
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    if any(getattr(module, name, True) for name in names):
        return True
    return getattr(every_module, "_has_any_global_hook", lambda: True)()


class ModuleWatch:
    """Notices what has become of modules since it was made: another module, parameter or buffer in
    a place, a parameter at another address, a hook more or less, a forward of a module's own. It
    takes 0.2 us a module to ask. Where torch has other names for these, everything has changed.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        inside = [vars(module) for module in modules]
        members = ("_parameters", "_modules", "_buffers")
        names = (*members, "_forward_hooks", "_forward_pre_hooks")
        self._known = all(name in module for module in inside for name in names)
        if not self._known:
            return
        self._sized = [module[name] for module in inside for name in names]
        self._sizes = list(map(len, self._sized))
        held = [module[name] for module in inside for name in members]
        places = [(table, key) for table in held for key in table]
        places += [(module, "forward") for module in inside]
        self._tables, self._keys = map(list, zip(*places, strict=True))
        self._values = list(map(dict.get, self._tables, self._keys))
        plain = (Tensor, torch.nn.Parameter)  # others may have no address
        self._tensors: list[Any] = [x for x in self._values if type(x) in plain]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def unchanged(self) -> bool:
        """Is all of it as it was?"""
        return (
            self._known
            and list(map(len, self._sized)) == self._sizes
            and all(map(operator.is_, map(dict.get, self._tables, self._keys), self._values))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and not getattr(every_module, "_has_any_global_hook", lambda: True)()
        )


def forward_derivatives() -> bool:
    """May an input carry a forward-mode derivative (torch.autograd.forward_ad)?

    Without torch's name True: every call then goes through autograd.Function, 13 us slower without
    gradients, which refuses forward-mode derivatives.
    """
    return getattr(forward_ad, "_current_level", 0) >= 0


F = TypeVar("F", bound=Callable[..., Any])


def constant_while_tracing(function: F) -> F:
    """torch.compile calls the function when it traces, and the graph holds what it returns: as
    torch.compiler.assume_constant_result, whose import of torch._dynamo takes a second and brings
    Triton. A torch that does not know the mark traces the function itself, as far as it can."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def storage_key(x: Tensor) -> int:
    """A number that two tensors share exactly if they share their storage; memory that is not
    there, of size 0, has one too. Without torch's name 0: see ``can_record``."""
    return getattr(x.untyped_storage(), "_cdata", 0)


@functools.cache
def can_record() -> bool:
    """Has torch what following the allocations of a call needs?"""
    known = TorchDispatchMode is not object
    return known and hasattr(torch.empty(0, device="cpu").untyped_storage(), "_cdata")


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """targets[n].copy_(sources[n]) in few launches; without torch's name, in one each."""
    together = getattr(torch, "_foreach_copy_", None)
    if together is not None:
        together(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def pre_forward_hooks(module: torch.nn.Module) -> list[Any]:
    """The hooks that run before a module's forward. Without torch's name none are found, and a
    module that is patched twice is wrapped twice."""
    return list(getattr(module, "_forward_pre_hooks", {}).values())


def default_store() -> Any:
    """The key-value store of torch.distributed's default group. Without torch's name None: ranks
    are then not compared before their first call, and unequal calls may hang until torch's own
    timeout."""
    found = getattr(torch.distributed.distributed_c10d, "_get_default_store", None)
    return None if found is None else found()


def process_group(name: str) -> Any:
    """The process group of a name, as a compiled graph keeps it. RuntimeError where torch cannot
    say: group= then works in eager calls alone."""
    found = getattr(torch.distributed.distributed_c10d, "_resolve_process_group", None)
    if found is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not say which process group is named {name!r} "
            "(checked with torch 2.11 to 2.13): call tfla with group= outside of torch.compile."
        )
    return found(name)


@functools.cache
def _raw_stream() -> Callable[[int], int]:
    raw = getattr(_C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def current_stream(index: int) -> int:
    """The driver's handle of the current stream of a GPU (0.1 us; the public way 1 us, where
    torch's name is missing)."""
    return _raw_stream()(index)


# ---------------------------------------------------------------- Triton (checked: 3.6 to 3.9)

FIRST_CHECKED, LAST_CHECKED = (3, 6), (3, 9)  # all of 3.6.x to 3.9.x


@functools.cache
def triton_release() -> str:
    """Triton's version as it says it, "" where it cannot be imported or does not say."""
    try:
        import triton
    except Exception:  # a broken installation raises what it likes
        return ""
    return str(getattr(triton, "__version__", ""))


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of Triton, None where it cannot be imported or does not say."""
    numbers = re.match(r"(\d+)\.(\d+)", triton_release())
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def triton_error() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # likewise
        return f"{type(error).__name__}: {error}"
    return None


def triton_is_checked() -> bool:
    """Is this a Triton that we have seen? Kernels of another one go through its own launcher."""
    version = triton_version()
    return version is not None and FIRST_CHECKED <= version <= LAST_CHECKED


@functools.cache
def _runtime_settings() -> Any:
    try:
        from triton.knobs import runtime
    except ImportError:  # a Triton that has them elsewhere launches our kernels by itself
        return SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    return runtime


def launches_are_watched() -> bool:
    """Does a profiler (Proton) or a person look at launches, by Triton's launch hooks? Then all of
    ours go through Triton's launcher, which calls them (0.1 us to ask)."""
    runtime = _runtime_settings()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A chain of hooks, one function, or None.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


Allocate = Callable[[int, int, "int | None"], Any]  # (bytes, alignment, stream) -> scratch memory


def launch_by_triton(
    kernel: Any, grid: tuple[int, ...], options: dict[str, Any], allocate: Allocate, *arguments: Any
) -> Any:
    """``kernel[grid](*arguments, **options)``, whose scratch memory comes from ``allocate``; what
    Triton compiled, or None in its interpreter.

    Triton keeps the allocator in a ContextVar: set in a copy of the context, it is ours for this
    launch alone, and the one that the user set (``triton.set_allocator``) stays. In another thread
    than that where it was set there would be none.
    """
    return contextvars.copy_context().run(_launch_with, kernel, grid, options, allocate, arguments)


def _launch_with(
    kernel: Any,
    grid: tuple[int, ...],
    options: dict[str, Any],
    allocate: Allocate,
    arguments: tuple[Any, ...],
) -> Any:
    import triton

    triton.set_allocator(allocate)
    return kernel[grid](*arguments, **options)


# ---------------------------------------------------------------- the CUDA driver (12 and 13)


class _LaunchConfig(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    """The CUDA driver; OSError where there is none."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    driver.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return driver


# What ``struct`` calls the types of a kernel's parameters, and how many bytes PTX gives to its own.
_FORMS = {"i32": "i", "i64": "q", "fp32": "f", "constexpr": ""}
_PTX_BYTES = {"u64": 8, "s64": 8, "b64": 8, "f64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}


class _ParameterLayout(NamedTuple):
    """The parameter buffer of a compiled kernel."""

    form: str  # for ``struct``; the last two are addresses of scratch memory: ours, the profiler's
    is_parameter: tuple[bool, ...]  # of each value in the signature: else a constant
    pointers: int  # come first


_layouts: dict[
    int, tuple[Any, _ParameterLayout | None]
] = {}  # by id of what was compiled, which is kept


def _layout_of(compiled: Any) -> _ParameterLayout | None:
    """None: only Triton's launcher may launch this kernel."""
    found = _layouts.get(id(compiled))
    if found is None:
        try:
            layout = _checked_layout(compiled)
        except (AttributeError, KeyError, TypeError):  # what a Triton says in another way
            layout = None
        found = _layouts[id(compiled)] = compiled, layout
    return found[1]


def _checked_layout(compiled: Any) -> _ParameterLayout | None:
    about = compiled.metadata
    if not triton_is_checked() or about.target.backend != "cuda":
        return None
    # Clusters, grids that start together and launches that overlap the last one need attributes of
    # the launch; what a profiler or a sanitizer has put into a kernel, further parameters.
    if about.num_ctas != 1 or tuple(getattr(about, "cluster_dims", (1, 1, 1))) != (1, 1, 1):
        return None
    if about.launch_cooperative_grid or about.launch_pdl:
        return None
    if about.profile_scratch_size or about.instrumentation_mode or about.tensordesc_meta:
        return None
    kinds = list(compiled.src.signature.values())
    pointer = [kind[0] == "*" for kind in kinds]
    parameters = [kind for kind in kinds if kind != "constexpr"]
    pointers = sum(pointer)
    if any(kind[0] != "*" for kind in parameters[:pointers]):
        return None
    form = "".join(["Q" if kind[0] == "*" else _FORMS[kind] for kind in parameters]) + "QQ"
    # The machine code has the last word about what it reads.
    entry = re.search(rf"\.entry\s+{re.escape(about.name)}\s*\(([^)]*)\)", compiled.asm["ptx"])
    if entry is None:
        return None
    sizes = [_PTX_BYTES[kind] for kind in re.findall(r"\.param\s+\.(\w+)", entry[1])]
    if sizes != [struct.calcsize(letter) for letter in form]:
        return None
    return _ParameterLayout(form, tuple(kind != "constexpr" for kind in kinds), pointers)


def pack_launch(
    compiled: Any, grid: tuple[int, int, int], device: int, values: Sequence[Any]
) -> PackedLaunch | None:
    """A launch of what Triton compiled that only wants addresses, or None where Triton's own
    launcher must do it: another Triton than those checked, AMD, launches with attributes (clusters,
    cooperative grids, programmatic dependent launch), kernels that a profiler has changed,
    parameters of other kinds. values: of everything in the signature."""
    layout = _layout_of(compiled)
    if layout is None or len(values) != len(layout.is_parameter):
        return None
    try:
        return PackedLaunch(compiled, layout, grid, device, values)
    except (AttributeError, OSError, struct.error):  # no driver by this name, a number of 64 bits
        return None


class PackedLaunch:
    """A launch by the driver's cuLaunchKernelEx, parameters packed once: it wants a stream, scratch
    memory and the addresses of its tensors. Through Triton's launcher it takes 7 to 24 us."""

    def __init__(
        self,
        compiled: Any,
        layout: _ParameterLayout,
        grid: tuple[int, int, int],
        device: int,
        values: Sequence[Any],
    ) -> None:
        about, address = compiled.metadata, ctypes.addressof
        self.memory = ctypes.create_string_buffer(struct.calcsize(layout.form))
        parameters = [x for x, takes in zip(values, layout.is_parameter, strict=True) if takes]
        struct.pack_into(layout.form, self.memory, 0, *parameters, 0, 0)
        self.put = struct.Struct(f"{layout.pointers}Q").pack_into
        self.put_scratch = struct.Struct("Q").pack_into
        self.size = ctypes.c_size_t(len(self.memory))
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END
        self.extra = (ctypes.c_void_p * 5)(1, address(self.memory), 2, address(self.size), 0)
        threads = about.num_warps * about.target.warp_size, 1, 1
        self.config = _LaunchConfig(grid, threads, about.shared)
        self.arguments = address(self.config), compiled.function, None, address(self.extra)
        self.scratch = about.global_scratch_size * grid[0] * grid[1] * grid[2]
        self.run, self.compiled = _driver().cuLaunchKernelEx, compiled  # which is kept alive
        self.device, self.lock = device, threading.Lock()

    def __call__(self, stream: int, scratch: int, addresses: Sequence[int]) -> None:
        with self.lock:
            self.config.stream = stream
            self.put(self.memory, 0, *addresses)
            if scratch:
                self.put_scratch(self.memory, len(self.memory) - 16, scratch)
            error = self.run(*self.arguments)
            if error == 201:  # CUDA_ERROR_INVALID_CONTEXT: a thread that has none yet
                context = ctypes.c_void_p()
                _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), self.device)
                _driver().cuCtxSetCurrent(context)
                error = self.run(*self.arguments)
        if error:
            text = ctypes.c_char_p()
            _driver().cuGetErrorString(error, ctypes.byref(text))
            name = self.compiled.metadata.name
            raise RuntimeError(f"CUDA does not launch {name}: {(text.value or b'').decode()}")


def driver_cuda_version() -> str | None:
    """The newest CUDA that the installed driver serves, as "13.0"; None without a driver."""
    number = ctypes.c_int()
    try:
        if _driver().cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (AttributeError, OSError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"
