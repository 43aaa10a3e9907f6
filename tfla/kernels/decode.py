"""Decode on tensors: the launch of step.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfla.kernels import step
from tfla.kernels.gates import form_of
from tfla.kernels.planning import device_of
from tfla.kernels.runtime import launch
from tfla.kernels.step import WARPS, _step_kernel
from tfla.spec import StepInputs, StepOptions

_arrivals: dict[tuple[Any, ...], Tensor] = {}


def _arrived(m: Tensor) -> Tensor:
    """Counters for (rows, H) that every launch leaves at zero. They belong to the memory of m, of
    which launches at the same time (streams, CUDA graphs) use different rows, and are never freed:
    a graph knows their address. One that is recorded before any step has counters of its own."""
    key = (m.device, m.data_ptr(), m.shape, m.stride())
    found = _arrivals.get(key)
    if found is None:
        found = m.new_zeros(m.shape, dtype=torch.int32)
        if not (m.is_cuda and torch.cuda.is_current_stream_capturing()):
            _arrivals[key] = found
    return found


def update(x: StepInputs, options: StepOptions) -> Tensor:
    """One token: writes new states over old (rows ``slots``, or all); h (B, H, V) in v's dtype."""
    q, k, v, i, f, C, n, m, slots = x
    (B, H, V), (G, K) = v.shape, q.shape[1:]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    slots = None if slots is None else slots.contiguous()
    h = v.new_empty(B, H, V)
    block_k, block_v, tiles = step.tiles_of(
        B, H, K, V, device_of(q).multiprocessors, step.REGISTERS
    )
    arrived = None if m is None or tiles == 1 else _arrived(m)
    strides = (0,) * 5 if n is None or m is None else (*n.stride(), *m.stride())
    launch(
        _step_kernel,
        (B * H * tiles,),
        (WARPS, 1),
        (q, k, v, i, f, slots, C, n, m, arrived, None, None, None, h),
        options.scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *i.stride(),
        *f.stride(),
        *C.stride()[:2],
        C.stride(3),
        *strides,
        H,
        K,
        V,
        H // G,
        C.shape[0],
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        STRIDE_CK=C.stride(2),
        LOG_I=form_of(options.input_gate).log_i,
        SIGMOID_F=options.sigmoid_f,
    )
    return h
