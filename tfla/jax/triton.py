"""The backend "triton": the Programs of tfla.kernels, those that torch plays, as calls of XLA.

Derivatives are theirs, of first order and in reverse; batches of vmap become rows of one call.
Mirrored sequences are flipped, as for torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from tfla.jax import lowering, reference
from tfla.jax.shards import axes_of, varying
from tfla.jax.spec import Inputs, Options
from tfla.kernels.gates import form_of
from tfla.kernels.program import ArrayLayout, Buffer, Builder, Program, dense, name_of
from tfla.kernels.step import REGISTERS, WARPS, _step_kernel, tiles_of
from tfla.plan import Device
from tfla.programs import Passes, passes
from tfla.spec import CallSpec, Precision

SAVED = len(Inputs._fields) + 1  # the place of what is saved among the arrays of a backward pass
Results = tuple[Array, Array | None, Array | None, Array | None]  # h, C, n, m
# How jax_default_matmul_precision may name products of fp32 with 10 bits, or with less.
TF32 = ("default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32", "BF16_BF16_F32")


def sequence(x: Inputs, options: Options, device: Device) -> Results:
    """(h, C, n, m) of a call over sequences."""
    (B, T, G, K), (H, V) = x.q.shape, x.v.shape[2:]
    if 0 in (B, T):
        return reference.sequence(x, options)
    given = _mirrored(x, T) if options.reverse else x
    q = given.q
    gates = [y.astype(jnp.float32) if y.dtype == jnp.float64 else y for y in (given.i, given.f)]
    offsets, N = given.cu_seqlens, B
    if offsets is not None:
        N = offsets.shape[0] - 1
        offsets = varying(offsets, axes_of(q))
    spec = CallSpec(
        B=B,
        T=T,
        H=H,
        G=G,
        K=K,
        V=V,
        N=N,
        packed=offsets is not None,
        dtype=q.dtype,
        gate_dtypes=(gates[0].dtype, gates[1].dtype),
        device=device,
        initial_state=given.C is not None,
        scale=options.scale,
        input_gate=options.input_gate,
        sigmoid_f=options.sigmoid_f,
        normalize=options.normalize,
        final_state=options.final_state,
        needs_grad=True,
        backend="triton",
        precision=_precision(q.dtype),
    )
    # A kernel takes |scale|, as for torch.
    if options.scale < 0:
        q, spec = -q, spec.but(scale=-options.scale)
    width = "i64" if offsets is None else name_of(offsets.dtype)
    function = _sequence(spec, width)
    h, C, n, m = function(q, given.k, given.v, *gates, given.C, given.n, given.m, offsets)
    if options.reverse:
        h = jnp.flip(h, 1)
        if offsets is not None:
            C, n, m = (y if y is None else jnp.flip(y, 0) for y in (C, n, m))
    return h, C, n, m


def _mirrored(x: Inputs, T: int) -> Inputs:
    """From the last token to the first. Packed sequences then lie in the opposite order."""
    q, k, v, i, f = (jnp.flip(y, 1) for y in (x.q, x.k, x.v, x.i, x.f))
    if x.cu_seqlens is None:
        return x._replace(q=q, k=k, v=v, i=i, f=f)
    C, n, m = (y if y is None else jnp.flip(y, 0) for y in (x.C, x.n, x.m))
    return Inputs(q, k, v, i, f, C, n, m, jnp.flip(T - x.cu_seqlens, 0))


def _precision(dtype: Any) -> Precision:
    chosen = jax.config.jax_default_matmul_precision
    return "tf32" if dtype == jnp.float32 and chosen in TF32 else "ieee"


# ---------------------------------------------------------------- derivatives


@functools.lru_cache(maxsize=4096)
def _sequence(spec: CallSpec, offsets: str) -> Callable[..., Results]:
    """Of the tensors of ``Inputs``, with the derivative that the kernels have. offsets: the dtype
    of cu_seqlens."""
    bare = spec.but(needs_grad=False)

    @jax.custom_vjp
    def mlstm(*arrays: Array | None) -> Results:
        results: Results = _forward(bare, offsets)(*arrays)[0]
        return results

    def forward(*arrays: Array | None) -> tuple[Results, Any]:
        results, saved = _forward(spec, offsets)(*arrays)
        return results, (arrays, results[0] if spec.normalize else None, saved)

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        arrays, h, saved = residuals
        dh, dC, dn, _ = cotangents  # the gauge of a state carries no gradient
        *grads, dC_0, dn_0 = _backward(spec, offsets)(*arrays, h, *saved, dh, dC, dn)
        dm_0 = None
        if arrays[7] is not None:
            dm_0 = _gauge_gradient(arrays[5], arrays[6], dC_0, dn_0)
        return (*grads, dC_0, dn_0, dm_0, None)

    mlstm.defvjp(forward, backward)
    return mlstm


def _gauge_gradient(C: Array, n: Array, dC: Array, dn: Array) -> Array:
    """dm (N, H) of an initial state and its gradients: the gauge scales both C and n. The two
    cancel where the normaliser is active, so of each row of C they are summed together."""
    return ((dC * C).sum(-1) + dn * n).sum(-1)


def _of_first_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where a derivative of it is refused."""
    guarded = jax.custom_jvp(function)

    @guarded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            'the kernels of backend="triton" have first derivatives, in reverse mode, and no '
            'others; take backend="reference", which JAX differentiates any number of times.'
        )

    return guarded


# ---------------------------------------------------------------- passes


@functools.lru_cache(maxsize=4096)
def _passes(spec: CallSpec, offsets: str) -> Passes:
    assert isinstance(spec.device, Device)
    return passes(spec, spec.device, offsets=offsets)


@functools.lru_cache(maxsize=4096)
def _forward(spec: CallSpec, offsets: str) -> Callable[..., Any]:
    """(tensors of ``Inputs``) -> ((h, C, n, m), what is saved)."""

    def play(*arrays: Array | None) -> tuple[Results, tuple[Array, ...]]:
        built = _passes(spec, offsets).forward
        (program,) = built.programs
        out = _run(program, zip(built.symbols, arrays, strict=True), spec)
        h, C, n, m = (
            None if x is None else lowering.trimmed(program.buffers[x.buffer], out[x.buffer])
            for x in built.results[:4]
        )
        assert h is not None
        return (h, C, n, m), tuple([out[n] for n in built.saved if spec.needs_grad])

    def buffers(of: CallSpec) -> tuple[list[Any], Any]:
        built = _passes(of, offsets).forward
        at = built.programs[0].buffers
        saved = [at[n] for n in built.saved if of.needs_grad]
        return _whole(at, built.symbols), (tuple(_whole(at, built.results[:4])), tuple(saved))

    return _of_first_order(_batched(play, spec, buffers, lambda big: _forward(big, offsets)))


@functools.lru_cache(maxsize=4096)
def _backward(spec: CallSpec, offsets: str) -> Callable[..., Any]:
    """(tensors of ``Inputs``, h, what is saved, dh, dC, dn) -> (dq, dk, dv, di, df, dC_0, dn_0).
    h is None where nothing is normalised."""

    def play(*arrays: Array | None) -> tuple[Array | None, ...]:
        built = _passes(spec, offsets).backward
        assert built is not None
        (program,) = built.programs
        # What is saved is one symbol, for torch has it in one tensor.
        symbols, parts = list(built.symbols), len(built.saved)
        given = dict(zip(built.saved, arrays[SAVED : SAVED + parts], strict=True))
        others = [*arrays[:SAVED], *arrays[SAVED + parts :]]
        pairs = zip(symbols[:SAVED] + symbols[SAVED + 1 :], others, strict=True)
        out = _run(program, pairs, spec, given)
        return tuple(
            [
                None if x is None else lowering.trimmed(program.buffers[x.buffer], out[x.buffer])
                for x in built.results
            ]
        )

    def buffers(of: CallSpec) -> tuple[list[Any], Any]:
        both = _passes(of, offsets)
        assert both.backward is not None
        at, symbols = both.backward.programs[0].buffers, both.backward.symbols
        # What is saved comes as the forward pass has left it.
        before = both.forward.programs[0].buffers
        saved = [before[n] for n in both.forward.saved]
        taken = [*_whole(at, symbols[:SAVED]), *saved, *_whole(at, symbols[SAVED + 1 :])]
        return taken, tuple(_whole(at, both.backward.results))

    return _of_first_order(_batched(play, spec, buffers, lambda big: _backward(big, offsets)))


def _whole(buffers: Sequence[Buffer], symbols: Sequence[Any]) -> list[Buffer | None]:
    """The buffers of arrays that come or go in their own shape."""
    return [None if x is None else buffers[x.buffer]._replace(updated=False) for x in symbols]


def _run(
    program: Program, pairs: Any, spec: CallSpec, given: dict[int, Array] | None = None
) -> dict[int, Array]:
    assert isinstance(spec.device, Device)
    arrays = dict(given or {})
    for symbol, x in pairs:
        if symbol is not None and x is not None:
            arrays[symbol.buffer] = x
    return lowering.run(program, {n: arrays[n] for n in program.inputs}, spec.device)


# ---------------------------------------------------------------- vmap


def _batched(
    play: Callable[..., Any],
    spec: CallSpec,
    buffers: Callable[[CallSpec], tuple[list[Buffer | None], Any]],
    of: Callable[[CallSpec], Callable[..., Any]],
) -> Callable[..., Any]:
    """``play`` with a rule for vmap: the calls of a batch are rows of one call, planned as one of
    them is; packed ones go one after the other. buffers: of a call what it takes and what it makes,
    whose first axis counts rows. of: the same pass of another call."""
    batched = custom_vmap(play)

    @batched.def_vmap
    def rule(size: int, is_batched: Sequence[Any], *arrays: Array | None) -> tuple[Any, Any]:
        marks = [None if x is None else mark for x, mark in zip(arrays, is_batched, strict=True)]
        if spec.packed:
            results = _one_by_one(batched, size, marks, arrays)
        else:
            rows = spec.B if spec.planned_rows is None else spec.planned_rows
            whole = spec.but(B=size * spec.B, N=size * spec.N, planned_rows=rows)
            taken, made = buffers(spec)
            inside = [
                None if x is None else _folded(x, mark, size, buffer)
                for x, mark, buffer in zip(arrays, marks, taken, strict=True)
            ]
            results = of(whole)(*inside)
            results = jax.tree.map(lambda x, buffer: _unfolded(x, size, buffer), results, made)
        return results, jax.tree.map(lambda _: True, results)

    return batched


def _one_by_one(
    function: Callable[..., Any], size: int, marks: Sequence[Any], arrays: Sequence[Any]
) -> Any:
    batched = [x for x, mark in zip(arrays, marks, strict=True) if mark]

    def one(xs: list[Array]) -> Any:
        taken = iter(xs)
        pairs = zip(arrays, marks, strict=True)
        return function(*[next(taken) if mark else x for x, mark in pairs])

    return lax.map(one, batched)


def _folded_rows(x: Array, is_batched: Any, size: int) -> Array:
    """A batch of arrays as one array with the rows of all."""
    if not is_batched:
        x = jnp.broadcast_to(x, (size, *x.shape))
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _folded(x: Array, is_batched: Any, size: int, buffer: Buffer | None) -> Array:
    """The same of arrays that lie in a buffer, which may be longer than its shape."""
    if buffer is None or not buffer.updated:
        return _folded_rows(x, is_batched, size)
    if not is_batched:
        x = jnp.broadcast_to(x, (size, *x.shape))
    count, shape = math.prod(buffer.shape), (size * buffer.shape[0], *buffer.shape[1:])
    spare = lowering.elements(buffer._replace(shape=shape)) - size * count
    return jnp.pad(x[:, :count].reshape(-1), (0, spare))


def _unfolded(x: Array, size: int, buffer: Buffer) -> Array:
    if not buffer.updated:
        return x.reshape(size, x.shape[0] // size, *x.shape[1:])
    count = math.prod(buffer.shape)
    spare = lowering.elements(buffer) - count
    return jnp.pad(x[: size * count].reshape(size, count), ((0, 0), (0, spare)))


# ---------------------------------------------------------------- a token


def step(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    state: tuple[Any, ...],
    options: Options,
    device: Device,
) -> Results:
    """(h, C, n, m) of one token; see ``reference.step``."""
    if v.shape[0] == 0:
        return reference.step(q, k, v, i, f, state, options)
    i, f = (y.astype(jnp.float32) if y.dtype == jnp.float64 else y for y in (i, f))
    return _step(options, device)(q, k, v, i, f, *state)


@functools.lru_cache(maxsize=4096)
def _step(options: Options, device: Device) -> Callable[..., Results]:
    """One token by the step kernel, or where it is differentiated as a sequence of one."""

    @jax.custom_vjp
    def mlstm_step(*arrays: Array | None) -> Results:
        results: Results = _token(options, device)(*arrays)
        return results

    def of_one(*arrays: Array | None) -> Results:
        q, k, v, i, f, C, n, m = arrays
        assert q is not None and k is not None and v is not None
        assert i is not None and f is not None and C is not None
        before = [y if y is None else y.astype(jnp.float32) for y in (C, n, m)]
        q, k, v, i, f = (y[:, None] for y in (q, k, v, i, f))
        x = Inputs(q, k, v, i, f, before[0], before[1], before[2], None)
        h, *after = sequence(x, options.but(final_state=True), device)
        C, n, m = (
            y if y is None else y.astype(old.dtype) for y, old in zip(after, (C, n, m), strict=True)
        )
        assert C is not None
        return h[:, 0], C, n, m

    def forward(*arrays: Array | None) -> tuple[Results, Any]:
        return jax.vjp(of_one, *arrays)

    def backward(pull: Any, cotangents: Any) -> Any:
        return pull(cotangents)

    mlstm_step.defvjp(forward, backward)
    return mlstm_step


@functools.lru_cache(maxsize=4096)
def _token(options: Options, device: Device) -> Callable[..., Results]:
    def play(*arrays: Array | None) -> Results:
        program, places, counters, overwrites = _step_program(
            options, device, tuple([None if x is None else (x.shape, x.dtype) for x in arrays])
        )
        pairs = zip(places, arrays, strict=True)
        given = {n: x for n, x in pairs if n is not None and x is not None}
        axes = axes_of(given)
        if counters is not None:
            size = lowering.elements(program.buffers[counters])
            given[counters] = varying(jnp.zeros(size, jnp.int32), axes)
        out = lowering.run(program, given, device, overwrites)
        after = iter([out[n] for n in overwrites])
        C, n, m = (None if x is None else next(after) for x in arrays[5:])
        (h,) = [y for at, y in out.items() if at not in overwrites and at != counters]
        assert C is not None
        return h, C, n, m

    batched = custom_vmap(play)

    @batched.def_vmap
    def rule(size: int, is_batched: Sequence[Any], *arrays: Array | None) -> tuple[Any, Any]:
        inside = [
            None if x is None else _folded_rows(x, mark, size)
            for x, mark in zip(arrays, is_batched, strict=True)
        ]
        results = batched(*inside)
        results = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return _of_first_order(batched)


@functools.lru_cache(maxsize=4096)
def _step_program(
    options: Options, device: Device, kinds: tuple[Any, ...]
) -> tuple[Program, list[int | None], int | None, dict[int, int]]:
    """The launch of one token as a Program; where its arrays are; the counters that it counts
    programs by, zeros before and after; and which of its results may overwrite which state."""
    builder = Builder(device)
    names = ("q", "k", "v", "i", "f", "C", "n", "m")
    arrays = {
        name: None
        if kind is None
        else builder.input(name, ArrayLayout(name_of(kind[1]), kind[0], dense(kind[0])))
        for name, kind in zip(names, kinds, strict=True)
    }
    q, v, C, n, m = (arrays[name] for name in ("q", "v", "C", "n", "m"))
    assert q is not None and v is not None and C is not None
    (B, H, V), (G, K) = v.shape, q.shape[1:]
    block_k, block_v, tiles = tiles_of(B, H, K, V, device.multiprocessors, REGISTERS)
    arrived = None
    if m is not None and tiles > 1:
        arrived = builder.input("arrived", ArrayLayout("i32", (B, H), (H, 1)))
    after = {
        f"{name}_out": x and builder.new(name, *x.shape, dtype=x.dtype)
        for name, x in (("C", C), ("n", n), ("m", m))
    }
    h = builder.new("h", B, H, V, dtype=v.dtype)

    def strides(name: str, axes: str) -> dict[str, int]:
        x = arrays[name]
        found = (0,) * len(axes) if x is None else x.strides
        return {f"stride_{name}{axis}": step for axis, step in zip(axes, found, strict=False)}

    c = C.strides
    builder.launch(
        "step",
        _step_kernel,
        (B * H * tiles,),
        WARPS,
        1,
        reads={name: arrays[name] for name in "qkvif"}
        | {"slots": None}
        | {name: arrays[name] for name in ("C", "n", "m")},
        updates={"arrived": arrived},
        writes={**after, "h": h},
        numbers={"scale": options.scale}
        | {k: v for name in "qkv" for k, v in strides(name, "bh").items()}
        | {k: v for name in "if" for k, v in strides(name, "bh").items()}
        | {"stride_cn": c[0], "stride_ch": c[1], "stride_cv": c[3]}
        | strides("n", "nhk")
        | strides("m", "nh")
        | {"H": H, "K": K, "V": V, "R": H // G, "rows": B},
        constants={
            "BLOCK_K": block_k,
            "BLOCK_V": block_v,
            "STRIDE_CK": c[2],
            "LOG_I": form_of(options.input_gate).log_i,
            "SIGMOID_F": options.sigmoid_f,
        },
    )
    made = [x for x in after.values() if x is not None]
    (program,) = builder.programs([*made, h])
    places = [None if x is None else x.buffer for x in arrays.values()]
    overwrites = {
        new.buffer: old.buffer
        for new, old in zip(after.values(), (C, n, m), strict=True)
        if new is not None and old is not None
    }
    return program, places, None if arrived is None else arrived.buffer, overwrites
