"""Two input gates that tfla does not have, torch and Triton forms side by side; inside
``registered`` they are known."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tfla import gates

# ---------------------------------------------------------------- log_i = -i^2 / 2, normalised


@triton.jit
def _bell(i):
    return -0.5 * i * i


@triton.jit
def _bell_gradient(dlog_i, i):
    return -dlog_i * i


BELL = gates.Gate(
    name="bell",
    about="a toy of the tests",
    normalize=True,
    log_i=lambda i: -0.5 * i * i,
    gradient=lambda dlog_i, i: -dlog_i * i,
    triton=lambda: gates.TritonForm(_bell, _bell_gradient),
)


# ---------------------------------------------------------------- log_i = -softplus(-2 i)


@triton.jit
def _steep(i):
    return tl.minimum(2.0 * i, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(2.0 * i)))


@triton.jit
def _steep_gradient(dlog_i, i):
    return 2.0 * dlog_i / (1.0 + tl.exp(2.0 * i))


STEEP = gates.Gate(
    name="steep",
    about="a toy of the tests",
    normalize=False,
    log_i=lambda i: -F.softplus(-2.0 * i),
    gradient=lambda dlog_i, i: 2.0 * dlog_i * torch.sigmoid(-2.0 * i),
    triton=lambda: gates.TritonForm(_steep, _steep_gradient),
)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The other tests of a process know the gates of the package alone."""
    for gate in (BELL, STEEP):
        gates.register(gate)
    yield
    for gate in (BELL, STEEP):
        del gates.INPUT_GATES[gate.name]
