"""Building the kernels of mlstm_kernels where Triton's compiler aborts at them.

Triton 3.5.1 and 3.6.0, as the wheels of PyPI, have LLVM's assertions on. At one kernel of
mlstm_kernels 2.0.6, mlstm_chunkwise__parallel_fw_Hintra_kernel with gates in bf16 and the 4 warps
of its launcher, LLVM's SLP vectorizer fails one and ends the process (SLPVectorizer.cpp, "trying to
erase instruction with users"): seen for compute capability 9.0 at 8 heads of 256/512, T = 128 and
16,384, and at 4 of 128/256, T = 2,048. Triton 3.7.1 builds it. So does 3.6.0 where the vectorizer
follows one operand and no further, and what it builds at 16,384 is 3.7.1's but for moves: 255
registers, 144 bytes of stack, the same products, shuffles and accesses, 3,376 instructions for
3,480. 8 warps or gates in fp32 build as well, but are not what the package runs.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

# Triton takes names of LLVM's flags here and sets them to true, which for this number (12) is 1. It
# stays so for the process, so that only a process that ends with the kernel compiles with it.
FLAG = {"DISABLE_LLVM_OPT": "slp-recursion-max-depth"}
SECONDS = 120  # for one kernel

Build = Callable[[], Any]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def ending(build: Build) -> int | None:
    """How `build` ends in a process of its own: 0, -6 (aborted), another code; None: too late."""

    def work() -> None:
        gc.disable()  # what lies on a GPU is not this process's
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        code = 1
        try:
            build()
            code = 0
        finally:
            os._exit(code)

    fork: Any = multiprocessing.get_context("fork")
    child = fork.Process(target=work)
    child.start()
    try:
        child.join(SECONDS)
    finally:
        if late := child.exitcode is None:
            child.kill()
            child.join()
    return None if late else child.exitcode


def guarded(build: Build, flag: dict[str, str]) -> tuple[Any, bool]:
    """build(), which finds in a cache on disk what a process of its own left there; and whether
    that one aborted and had to build with `flag` in its environment."""
    end = ending(build)
    if aborted := end == -signal.SIGABRT:
        with _environment(flag):  # a part of the key in the cache
            if (end := ending(build)) == 0:
                return build(), True
    if end is None or aborted:
        raise RuntimeError("the compiler takes too long" if end is None else "the compiler aborts")
    return build(), False


shallow: list[str] = []  # names of the kernels that were built with FLAG, in order


def guard(package: str = "mlstm_kernels") -> None:
    """From now on Triton compiles the kernels of this package so."""
    from triton import compiler

    plain = compiler.compile
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def compile(src: Any, *args: Any, **kwargs: Any) -> Any:
        build = functools.partial(plain, src, *args, **kwargs)
        if not getattr(getattr(src, "fn", None), "__module__", "").startswith(package + "."):
            return build()
        kernel, aborted = guarded(build, FLAG)
        if aborted:
            shallow.append(src.name)
        return kernel

    compiler.compile = compile
