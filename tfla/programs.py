"""The Programs of a call ahead of its tensors: what it would allocate and launch on a device that
need not be there."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from tfla import algorithm
from tfla.plan import Device, Problem
from tfla.spec import BackendName, CallSpec

if TYPE_CHECKING:
    import torch

    from tfla.kernels.program import ArrayLayout, Built, Program


def call_of(
    problem: Problem,
    dtype: torch.dtype,
    input_gate: str,
    *,
    states: bool = False,
    needs_grad: bool = True,
    backend: BackendName = "triton",
) -> CallSpec:
    """A call of ``tfla.mlstm`` in integers, gates in fp32. states: one comes in, one goes out."""
    import torch

    from tfla import gates

    p, gate = problem, gates.input_gate(input_gate)
    return CallSpec(
        B=p.B,
        T=p.T,
        H=p.H,
        G=p.H if p.G is None else p.G,
        K=p.K,
        V=p.V,
        N=p.N,
        packed=p.packed,
        dtype=dtype,
        gate_dtypes=(torch.float32, torch.float32),
        device=torch.device("meta"),
        initial_state=states,
        scale=p.K**-0.5,
        input_gate=gate.name,
        sigmoid_f=True,
        normalize=gate.normalize,
        final_state=states,
        needs_grad=needs_grad,
        backend=backend,
        precision=p.precision,
    )


class Programs(NamedTuple):
    """Of the forward pass, and of the backward pass where gradients are wanted."""

    forward: Program
    backward: Program | None


class Passes(NamedTuple):
    """The same, with what their arrays and results are."""

    forward: Built
    backward: Built | None


def programs(spec: CallSpec, device: Device, *, final_grads: bool = True) -> Programs:
    """The Programs of a call whose arrays are all dense, on ``device``. final_grads: is the loss
    one of the final state, too, where there is one?"""
    forward, backward = passes(spec, device, final_grads=final_grads)
    return Programs(forward.programs[0], None if backward is None else backward.programs[0])


def passes(
    spec: CallSpec, device: Device, *, final_grads: bool = True, offsets: str = "i64"
) -> Passes:
    """The passes of such a call; this imports no torch. offsets: the dtype of cu_seqlens."""
    program = importlib.import_module("tfla.kernels.program")
    spec = spec.but(device=device, backend="triton")

    def of(dtype: Any, *shape: int) -> ArrayLayout:
        name = dtype if isinstance(dtype, str) else program.name_of(dtype)
        return program.ArrayLayout(name, shape, program.dense(shape))

    B, T, N, H, K, V, full = spec.B, spec.T, spec.N, spec.H, spec.K, spec.V, "fp32"
    C, n, m = of(full, N, H, K, V), of(full, N, H, K), of(full, N, H)
    start, normal = spec.initial_state, spec.normalize
    layouts: dict[str, ArrayLayout | None] = {
        "q": of(spec.dtype, B, T, spec.G, K),
        "k": of(spec.dtype, B, T, spec.G, K),
        "v": of(spec.dtype, B, T, H, V),
        "i": of(spec.gate_dtypes[0], B, T, H),
        "f": of(spec.gate_dtypes[1], B, T, H),
        "C": C if start else None,
        "n": n if start and normal else None,
        "m": m if start and normal else None,
        "cu_seqlens": of(offsets, N + 1) if spec.packed else None,
    }
    more = {"h": layouts["v"], "saved": of(full), "dh": layouts["v"]}
    wanted = spec.final_state and final_grads
    more |= {"dC": C if wanted else None, "dn": n if wanted and normal else None}
    forward = program.build(algorithm.forward, spec, layouts, device)
    if not spec.needs_grad:
        return Passes(forward, None)
    return Passes(forward, program.build(algorithm.backward, spec, layouts | more, device))
