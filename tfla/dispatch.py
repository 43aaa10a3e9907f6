"""Which backend serves a call, and why not the other one."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfla import _compat, algorithm, checks, log, verdicts
from tfla.spec import BackendName

__all__ = ["pick_backend", "supports"]


class _Kind(NamedTuple):
    """Of a tensor, what a backend is chosen by."""

    device: torch.device
    dtype: torch.dtype


class Choice(NamedTuple):
    """What ``backend=None`` takes."""

    backend: BackendName
    reason: str
    lasting: bool = True  # False: it may be another one later, when the self-test could run


_chosen: dict[tuple[torch.device, torch.dtype], BackendName] = {}
_warned: set[tuple[torch.device, str]] = set()


def pick_backend(backend: BackendName | None, q: Tensor) -> BackendName:
    """The backend that serves q: the one named, or the fastest that can."""
    if backend is None:
        if q.device.type != "cuda" or q.dtype == torch.float64:
            return "reference"
        if torch.compiler.is_compiling():
            return _while_tracing(q.device, q.dtype)
        known = _chosen.get((q.device, q.dtype))
        return known or _choose(q.device, q.dtype, not torch.cuda.is_current_stream_capturing())
    if not isinstance(backend, str) or backend not in algorithm.BACKENDS:
        raise ValueError(
            f"backend must be None, {', '.join(map(repr, algorithm.BACKENDS))}; got {backend!r}."
        )
    if backend == "triton" and (reason := checks.why_not_triton(q)):
        raise RuntimeError(f'backend="triton" cannot serve this call: {reason}')
    return backend


@_compat.constant_while_tracing
def _while_tracing(device: torch.device, dtype: torch.dtype) -> BackendName:
    """A graph holds what is known when it is made; no test is begun while it is."""
    return _chosen.get((device, dtype)) or _choose(device, dtype, False)


def _choose(device: torch.device, dtype: torch.dtype, may_test: bool) -> BackendName:
    """What ``choice`` says, kept, with one warning for a GPU that "reference" serves."""
    made = choice(device, dtype, may_test)
    if made.lasting:
        _chosen[device, dtype] = made.backend
    log.reasons[device, dtype] = made.backend, made.reason
    if made.backend == "reference" and (device, made.reason) not in _warned:
        _warned.add((device, made.reason))
        warnings.warn(f'tfla runs on its backend "reference" here: {made.reason}', stacklevel=5)
    return made.backend


def cannot_serve(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "triton" cannot serve tensors of a device and a dtype at all, or None."""
    kind: Any = _Kind(device, dtype)
    return checks.why_not_triton(kind)


def choice(device: torch.device, dtype: torch.dtype, may_test: bool) -> Choice:
    """What serves tensors of a device and a dtype. Where our kernels have never run on such a
    device with such a Triton, their self-test decides; ``may_test``: it may be run now."""
    if device.type == "cpu":
        return Choice("reference", 'CPU tensors; "triton" is for GPUs and the interpreter.')
    if reason := cannot_serve(device, dtype):
        return Choice("reference", reason)
    pair, name = verdicts.pair_of(device), str(dtype).removeprefix("torch.")
    if verdicts.is_proven(pair):
        return Choice("triton", f"its kernels are tested on {pair}.")
    found = verdicts.known(pair, name)
    if found is None and not may_test:
        return Choice(
            "reference",
            f"its kernels have never run on {pair}. Their self-test decides; it does not run while "
            "a CUDA graph is captured or torch.compile traces, but at the first other call, or "
            "ahead: tfla env --self-test.",
            lasting=False,
        )
    if found is None:
        found = verdicts.test(pair, device, name)
    if found.passed:
        return Choice("triton", f"its self-test on {pair} has passed.")
    what = "failed" if found.lasting else "could not run"
    more = f" (and {len(found.failed) - 1} more)" if len(found.failed) > 1 else ""
    return Choice(
        "reference",
        f"the self-test of its kernels on {pair} {what}: {found.failed[0]}{more}. Try again: tfla "
        'env --self-test; backend="triton" runs them all the same.',
    )


def supports(
    device: torch.device | str | int, dtype: torch.dtype, *, self_test: bool = True
) -> tuple[BackendName, str]:
    """Which backend ``backend=None`` takes for tensors of a device and a dtype, and why.

    It is the same for ``mlstm``, ``mlstm_step`` and ``linear_attention``, of any shape, gate and
    state, with and without gradients: both backends compute all of them. "triton" serves fp16, bf16
    and fp32 on NVIDIA GPUs of compute capability 8.0 and later and on AMD GPUs; "reference"
    everything else. On a device, or with a Triton, where our kernels have never run, a self-test
    decides, once for each dtype (a minute or two, in a process of its own; the verdict is kept in
    $TFLA_CACHE_DIR, else $XDG_CACHE_HOME/tfla, else ~/.cache/tfla).

    Args:
        device: torch.device, its name ("cuda", "cuda:1", "cpu"), or the index of a GPU; "cuda"
            without an index is the current one.
        dtype: of q, k and v: torch.float16, bfloat16, float32 or float64.
        self_test: run the self-test if it decides and has not run yet. False: the answer is then
            "reference", which is what calls get while a CUDA graph is captured or torch.compile
            traces.

    Returns:
        (backend, reason): "triton" or "reference", and one sentence.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Example:
        >>> import torch, tfla
        >>> backend, reason = tfla.supports("cpu", torch.float32)
        >>> backend
        'reference'
    """
    where = _device(device)
    if not isinstance(dtype, torch.dtype) or dtype not in checks.DTYPES:
        raise TypeError(
            "dtype must be torch.float16, torch.bfloat16, torch.float32 or torch.float64; got "
            f"{dtype!r}."
        )
    checks.flags(self_test=self_test)
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            return "reference", "torch sees no GPU here, or is a build for CPUs."
        index = torch.cuda.current_device() if where.index is None else where.index
        if index >= count:
            return "reference", f"torch sees {count} GPUs here, no {where}."
        where = torch.device("cuda", index)
        self_test = self_test and not torch.cuda.is_current_stream_capturing()
    made = choice(where, dtype, self_test)
    return made.backend, made.reason


def _device(device: Any) -> torch.device:
    wanted = 'a torch.device, its name as "cuda:0" or "cpu", or the index of a GPU'
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"device must be {wanted}; got {checks.what(device)}.")
    if isinstance(device, int):
        if device < 0:
            raise ValueError(f"device must be {wanted}; got {device}.")
        return torch.device("cuda", device)
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be {wanted}; got {device!r}.") from error
