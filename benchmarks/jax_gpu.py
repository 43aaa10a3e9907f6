"""tfla.jax on an NVIDIA GPU: the numbers of torch, bit for bit, and as fast.

    python benchmarks/jax_gpu.py check time --out results.json
    python benchmarks/jax_gpu.py warm                      # compiles for an H200 that is not there

``check`` compares h, states and gradients with those of torch on the same GPU, and transforms of
JAX with plain calls. ``time`` compares device time, host time and memory, command buffers on and
off. JAX takes most of a GPU's memory when it starts, unless XLA_PYTHON_CLIENT_PREALLOCATE=false.
``warm`` fills Triton's cache on a machine without a GPU: it traces what the others run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import tfla.jax
from tfla.jax.dispatch import planned_for
from tfla.plan import Device

H200 = Device((9, 0), 132, 232448)


class Case(NamedTuple):
    """A call of mlstm, forward and backward."""

    name: str
    B: int = 2
    T: int = 2048
    H: int = 4
    K: int = 128
    V: int = 256
    G: int | None = None  # heads of q and k
    gate: str = "exp"
    dtype: str = "bfloat16"
    states: bool = False
    lengths: tuple[int, ...] | None = None
    reverse: bool = False


CASES = [
    *(Case(f"{gate} cut", gate=gate) for gate in ("exp", "sigmoid")),
    *(Case(f"{gate} full", B=4, T=1024, H=16, gate=gate) for gate in ("exp", "sigmoid")),
    *(Case(f"{gate} wide", T=1024, K=256, V=512, gate=gate) for gate in ("exp", "sigmoid")),
    *(Case(f"{gate} states", T=300, gate=gate, states=True) for gate in ("exp", "sigmoid")),
    Case("wide states", T=300, K=512, V=512, states=True),
    Case("packed", B=1, lengths=(1000, 0, 7, 1041)),
    Case("packed states", B=1, lengths=(1000, 0, 7, 1041), states=True),
    Case("groups, reverse", T=300, G=2, reverse=True),
    Case("odd", T=131, K=40, V=24),
    Case("fp32", T=256, K=64, V=64, dtype="float32"),
    Case("fp16", T=256, K=64, V=64, dtype="float16"),
]
SIZES = [(4, 16384, 16, 128, 256), (4, 16384, 16, 256, 512)]


# ---------------------------------------------------------------- correctness


def arrays(case: Case) -> dict[str, np.ndarray]:
    """In fp32, from the name as a seed: inputs, states and cotangents."""
    rng = np.random.default_rng(sum(map(ord, case.name)))
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    N, G = len(case.lengths) if case.lengths else B, case.G or H
    shapes = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V), "i": (B, T, H)}
    shapes |= {"f": (B, T, H), "dh": (B, T, H, V)}
    for d in ("", "d"):
        shapes |= {f"{d}C": (N, H, K, V), f"{d}n": (N, H, K), f"{d}m": (N, H)}
    found = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    found["f"] += 3
    return found


def options(case: Case) -> dict[str, Any]:
    return {
        "input_gate": case.gate,
        "output_final_state": case.states,
        "reverse": case.reverse,
        "backend": "triton",
    }


def offsets(case: Case) -> np.ndarray | None:
    if case.lengths is None:
        return None
    return np.cumsum([0, *case.lengths]).astype(np.int32)


OPERANDS = ("q", "k", "v")
TOKENS = (*OPERANDS, "i", "f")


def by_jax(case: Case, x: dict[str, Any]) -> dict[str, Any]:
    """Of arrays or of shapes: results and gradients, by name."""
    normalized = case.gate == "exp"
    names = ("C", "n", "m") if normalized else ("C",)
    taken = TOKENS + names * case.states

    def call(*given: Any) -> tuple[Any, ...]:
        by_name = dict(zip(taken, given, strict=True))
        state = None
        if case.states:
            state = tfla.jax.State(by_name["C"], by_name.get("n"), by_name.get("m"))
        tokens = [by_name[name] for name in TOKENS]
        cu_seqlens = offsets(case)
        h, end = tfla.jax.mlstm(
            *tokens,
            initial_state=state,
            cu_seqlens=None if cu_seqlens is None else jnp.asarray(cu_seqlens),
            **options(case),
        )
        return (h, *(y for y in (end or ()) if y is not None))

    @jax.jit
    def both(given: Any, cotangents: Any) -> tuple[Any, Any]:
        results, pull = jax.vjp(call, *given)
        return results, pull(cotangents)

    given = [x[name] for name in taken]
    cotangents = (x["dh"], *(x[f"d{name}"] for name in names * case.states))
    if isinstance(x["q"], jax.ShapeDtypeStruct):
        both.trace(given, cotangents)
        return {}
    results, grads = both(given, cotangents)
    made = dict(zip(("h", "C_T", "n_T", "m_T"), results, strict=False))
    return made | {f"d{name}": y for name, y in zip(taken, grads, strict=True)}


def in_jax(case: Case) -> dict[str, Any]:
    dtype = jnp.dtype(case.dtype)
    return {
        name: jnp.asarray(x, dtype if name in (*OPERANDS, "dh") else jnp.float32)
        for name, x in arrays(case).items()
    }


def by_torch(case: Case) -> dict[str, Any]:
    import torch

    import tfla

    dtype = getattr(torch, case.dtype)
    x = {
        name: torch.from_numpy(y).cuda().to(dtype if name in (*OPERANDS, "dh") else torch.float32)
        for name, y in arrays(case).items()
    }
    names = ("C", "n", "m") if case.gate == "exp" else ("C",)
    taken = TOKENS + names * case.states
    for name in taken:
        x[name].requires_grad_()
    state = None
    if case.states:
        state = tfla.State(*[x[name] if name in names else None for name in ("C", "n", "m")])
    cu_seqlens = offsets(case)
    h, end = tfla.mlstm(
        *(x[name] for name in TOKENS),
        initial_state=state,
        cu_seqlens=None if cu_seqlens is None else torch.from_numpy(cu_seqlens).cuda(),
        **options(case),
    )
    results = [h, *(y for y in (end or ()) if y is not None)]
    pairs = zip(results, ("h", *names), strict=False)
    with_grad = [(y, x[f"d{name}"]) for y, name in pairs if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in with_grad], [x[name] for name in taken], [dy for _, dy in with_grad]
    )
    made = dict(zip(("h", "C_T", "n_T", "m_T"), results, strict=False))
    return made | {f"d{name}": y for name, y in zip(taken, grads, strict=True)}


def bits(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array):
        x = np.asarray(x)
        return x.view(np.int16 if x.dtype.itemsize == 2 else np.int32)
    import torch

    return x.detach().cpu().view(torch.int16 if x.element_size() == 2 else torch.int32).numpy()


def same(x: Any, y: Any) -> bool:
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(np.array_equal(bits(a), bits(b)) for a, b in pairs)


def compared(case: Case) -> dict[str, Any]:
    """Of each result: is it torch's, bit for bit? dm, which torch sums in fp64: how far it is."""
    ours, theirs = by_jax(case, in_jax(case)), by_torch(case)
    assert ours.keys() == theirs.keys()
    found: dict[str, Any] = {}
    for name, x in ours.items():
        if name == "dm":
            a, b = np.asarray(x), theirs[name].cpu().numpy()
            found[name] = float(np.abs(a - b).max() / np.abs(b).max())
        else:
            found[name] = same(x, theirs[name])
    return found


def layers(case: Case, remat: bool, unrolled: bool) -> Callable[..., Any]:
    """A loss of three layers, and its gradients."""
    K = case.K

    def layer(y: Any, weight: Any) -> Any:
        x = (weight * y).astype(case.dtype)
        gates = y[..., 0].astype(jnp.float32), y[..., 1].astype(jnp.float32) + 3
        h, _ = tfla.jax.mlstm(x[..., :K], x[..., K : 2 * K], x, *gates, **options(case))
        return (y + h).astype(y.dtype)

    one = jax.checkpoint(layer) if remat else layer

    def loss(weights: Any, y: Any) -> Any:
        if unrolled:
            for n in range(3):
                y = one(y, weights[n])
        else:
            y, _ = jax.lax.scan(lambda y, weight: (one(y, weight), None), y, weights)
        return (y.astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1)))


def transforms() -> dict[str, Callable[[], Any]]:
    """What is run, by name: each gives whether it is what plain calls give, or a message."""
    found: dict[str, Callable[[], Any]] = {}

    def of_layers(gate: str, remat: bool) -> bool:
        case = Case("layers", gate=gate)
        y = jnp.asarray(arrays(case)["v"], case.dtype)
        weights = jnp.asarray([0.5, 1.0, 1.5])
        results = [layers(case, remat, unrolled)(weights, y) for unrolled in (False, True)]
        # The weights' gradients are sums that XLA may order otherwise.
        return same(results[0][1], results[1][1])

    for gate in ("exp", "sigmoid"):
        for remat in (False, True):
            name = f"scan over layers, {gate}{', remat' if remat else ''}"
            found[name] = functools.partial(of_layers, gate, remat)

    def vmapped(gate: str) -> bool:
        cases = [Case(f"vmap {n}", T=600, gate=gate) for n in range(3)]
        xs = [in_jax(case) for case in cases]
        taken = (*TOKENS, "dh")

        def both(*given: Any) -> Any:
            call = functools.partial(tfla.jax.mlstm, **options(cases[0]))
            h, pull = jax.vjp(lambda *y: call(*y)[0], *given[:5])
            return h, pull(given[5])

        stacked = [jnp.stack([x[name] for x in xs]) for name in taken]
        one_by_one = [jax.jit(both)(*[x[name] for name in taken]) for x in xs]
        apart = jax.tree.map(lambda *y: jnp.stack(y), *one_by_one)
        return same(jax.jit(jax.vmap(both))(*stacked), apart)

    found["vmap, exp"] = functools.partial(vmapped, "exp")
    found["vmap, sigmoid"] = functools.partial(vmapped, "sigmoid")

    def sharded() -> bool:
        case = Case("shards", T=600)
        x, count = in_jax(case), min(len(jax.devices()), case.B)
        auto = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((count,), ("b",), (auto,), devices=jax.devices()[:count])
        spec = jax.sharding.PartitionSpec("b")
        given = [x[name] for name in TOKENS]

        def call(*y: Any) -> Any:
            return tfla.jax.mlstm(*y, **options(case))[0]

        split = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec)

        def grads(function: Any) -> Any:
            return jax.jit(
                jax.grad(lambda *y: (function(*y).astype(jnp.float32) ** 2).sum(), range(5))
            )

        if count > 1:  # a part of the batch has a plan of its own
            return bool(jnp.allclose(jax.jit(split)(*given), call(*given), atol=0.02))
        return same(grads(split)(*given), grads(call)(*given))

    found["shard_map"] = sharded

    def step(gate: str, state_dtype: str) -> bool:
        import torch

        import tfla

        case = Case("step", B=3, T=1, gate=gate)
        x = arrays(case)
        names = ("C", "n", "m") if gate == "exp" else ("C",)
        half, low = jnp.dtype(case.dtype), jnp.dtype(state_dtype)
        ours = [jnp.asarray(x[n][:, 0], half if n in OPERANDS else jnp.float32) for n in TOKENS]
        state = [
            jnp.asarray(x[n], jnp.float32 if n == "m" else low) if n in names else None
            for n in ("C", "n", "m")
        ]
        theirs = [
            torch.from_numpy(x[n][:, 0])
            .cuda()
            .to(torch.bfloat16 if n in OPERANDS else torch.float32)
            for n in TOKENS
        ]
        before = [
            torch.from_numpy(x[n])
            .cuda()
            .to(torch.float32 if n == "m" else getattr(torch, state_dtype))
            if n in names
            else None
            for n in ("C", "n", "m")
        ]
        wanted = tfla.mlstm_step(*theirs, tfla.State(*before), input_gate=gate, backend="triton")
        run = jax.jit(
            lambda s, *t: tfla.jax.mlstm_step(*t, s, input_gate=gate, backend="triton"),
            donate_argnums=0,
        )
        address = state[0].unsafe_buffer_pointer()
        h, after = run(tfla.jax.State(*state), *ours)
        in_place = after.C.unsafe_buffer_pointer() == address
        return in_place and same((h, list(after)), (wanted[0], list(wanted[1])))

    for gate in ("exp", "sigmoid"):
        for low in ("float32", "bfloat16"):
            found[f"step, {gate}, state {low}, donated"] = functools.partial(step, gate, low)

    def refused() -> str:
        q = jnp.ones((1, 64, 1, 16), jnp.float32)

        def f(q: Any) -> Any:
            return tfla.jax.mlstm(q, q, q, q[..., 0], q[..., 0], backend="triton")[0].sum()

        try:
            jax.grad(lambda q: jax.grad(f)(q).sum())(q)
        except NotImplementedError as error:
            return f"refused: {error}"
        return "not refused"

    found["second derivative"] = refused
    return found


# ---------------------------------------------------------------- time


def inputs(size: tuple[int, ...], new: Callable[..., Any]) -> list[Any]:
    """q, k, v, i, f, dh; new(*shape, half=) makes one."""
    B, T, H, K, V = size
    half = [new(B, T, H, K, half=True), new(B, T, H, K, half=True), new(B, T, H, V, half=True)]
    gates = [new(B, T, H, half=False) for _ in range(2)]
    return [*half, *gates, new(B, T, H, V, half=True)]


def jax_functions(gate: str) -> dict[str, Callable[..., Any]]:
    def call(*x: Any) -> Any:
        return tfla.jax.mlstm(*x, input_gate=gate, backend="triton")[0]

    def both(*x: Any) -> Any:
        h, pull = jax.vjp(call, *x[:5])
        return h, pull(x[5])

    return {"forward": lambda *x: call(*x[:5]), "forward and backward": both}


def torch_functions(gate: str) -> dict[str, Callable[..., Any]]:
    import torch

    import tfla

    def forward(*x: Any) -> Any:
        with torch.no_grad():
            return tfla.mlstm(*x[:5], input_gate=gate, backend="triton")[0]

    def both(*x: Any) -> Any:
        leaves = [y.detach().requires_grad_() for y in x[:5]]
        h, _ = tfla.mlstm(*leaves, input_gate=gate, backend="triton")
        return torch.autograd.grad(h, leaves, x[5])

    return {"forward": forward, "forward and backward": both}


def in_flight(run: Callable[[], Any], wait: Callable[[Any], Any], count: int) -> float:
    """ms a call, of which two are on their way at once."""
    before = [run(), run()]
    for x in before:
        wait(x)
    start = time.perf_counter()
    pending: list[Any] = []
    for _ in range(count):
        pending.append(run())
        if len(pending) > 2:
            wait(pending.pop(0))
    for x in pending:
        wait(x)
    return (time.perf_counter() - start) / count * 1e3


def host(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """us that the host takes for a call, of 20 whose results nobody waits for."""
    samples = []
    for _ in range(10):
        start = time.perf_counter()
        results = [run() for _ in range(20)]
        samples.append((time.perf_counter() - start) / 20 * 1e6)
        wait(results[-1])
    return statistics.median(samples)


def timed_jax(write: Callable[[dict[str, Any]], None]) -> None:
    device = jax.devices()[0]

    def new(*shape: int, half: bool) -> Any:
        key = jax.random.key(sum(shape))
        return jax.random.normal(key, shape, jnp.bfloat16 if half else jnp.float32) + (not half)

    for size in [*SIZES, (1, 256, 2, 128, 256)]:
        for gate in ("exp", "sigmoid"):
            x = inputs(size, new)
            for name, function in jax_functions(gate).items():
                row: dict[str, Any] = {"by": "jax", "size": size, "gate": gate, "what": name}
                for graphs, flags in {
                    "default": {},
                    "off": {"xla_gpu_enable_command_buffer": ""},
                }.items():
                    if graphs == "off" and size[1] > 1000:
                        continue
                    try:
                        compiled = jax.jit(function).lower(*x).compile(compiler_options=flags)
                        run, wait = functools.partial(compiled, *x), jax.block_until_ready
                        # Behind the first batch, in which the pool of memory grows by calls of the
                        # driver: 10.7 ms a call in place of 0.84 (H200, 128/256, forward).
                        samples = [in_flight(run, wait, 10) for _ in range(6)][1:]
                        row[f"ms, command buffers {graphs}"] = statistics.median(samples)
                        row[f"least ms, command buffers {graphs}"] = min(samples)
                        if size[1] < 1000:
                            row[f"host us, command buffers {graphs}"] = host(run, wait)
                        memory = compiled.memory_analysis()
                        row["temporary bytes"] = memory.temp_size_in_bytes
                        row["result bytes"] = memory.output_size_in_bytes
                    except Exception as error:  # the flag, say: the rest goes on
                        row[f"error, {graphs}"] = f"{type(error).__name__}: {error}"[:300]
                row["peak bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
                write(row)
            del x


def timed_torch(write: Callable[[dict[str, Any]], None]) -> None:
    import torch

    def new(*shape: int, half: bool) -> Any:
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16 if half else torch.float32)
        return x + (not half)

    for size in [*SIZES, (1, 256, 2, 128, 256)]:
        for gate in ("exp", "sigmoid"):
            x = inputs(size, new)
            for name, function in torch_functions(gate).items():
                row: dict[str, Any] = {"by": "torch", "size": size, "gate": gate, "what": name}
                run = functools.partial(function, *x)
                for _ in range(3):
                    run()
                torch.cuda.synchronize()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(20):
                    run()
                end.record()
                torch.cuda.synchronize()
                row["ms"] = start.elapsed_time(end) / 20
                row["peak bytes"] = torch.cuda.max_memory_allocated() - held
                if size[1] < 1000:
                    row["host us"] = host(run, lambda _: torch.cuda.synchronize())
                write(row)
            del x


# ---------------------------------------------------------------- the command


def shapes(case: Case) -> dict[str, Any]:
    """Of the arrays of a case."""
    dtype = jnp.dtype(case.dtype)
    return {
        name: jax.ShapeDtypeStruct(x.shape, dtype if name in (*OPERANDS, "dh") else jnp.float32)
        for name, x in arrays(case).items()
    }


def warm() -> None:
    """Traces what ``check`` and ``time`` run, for an H200."""
    of = jax.ShapeDtypeStruct
    half, full = jnp.bfloat16, jnp.float32
    with planned_for(H200):
        for case in CASES:
            by_jax(case, shapes(case))
        for gate in ("exp", "sigmoid"):
            case = Case("layers", gate=gate)
            y = of((case.B, case.T, case.H, case.V), half)
            layers(case, False, False).trace(of((3,), full), y)
            by_jax(case._replace(T=600), shapes(case._replace(T=600)))
            for size in [*SIZES, (1, 256, 2, 128, 256)]:
                x = inputs(size, lambda *s, half: of(s, jnp.bfloat16 if half else jnp.float32))
                for function in jax_functions(gate).values():
                    jax.jit(function).trace(*x)
            for low in (full, half):
                B, H, K, V = 3, 4, 128, 256
                n, m = of((B, H, K), low), of((B, H), full)
                others = (n, m) if gate == "exp" else (None, None)
                state = tfla.jax.State(of((B, H, K, V), low), *others)
                q, v = of((B, H, K), half), of((B, H, V), half)
                step = functools.partial(tfla.jax.mlstm_step, input_gate=gate, backend="triton")
                jax.jit(step).trace(q, q, v, m, m, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=("warm", "check", "time"))
    parser.add_argument("--part", default="0/1", help="of check: the first of so many, 0/2, ...")
    parser.add_argument("--out", help="a file for the results, one JSON a line")
    asked = parser.parse_args()

    def write(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if asked.out:
            with open(asked.out, "a") as file:
                file.write(json.dumps(row) + "\n")

    def guarded(name: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        try:
            found = run()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:800]
        write({"case": name, "same": found, "s": round(time.perf_counter() - start, 2)})

    if "warm" in asked.what:
        warm()
    if "check" in asked.what:
        part, parts = map(int, asked.part.split("/"))
        cases = {case.name: functools.partial(compared, case) for case in CASES} | transforms()
        for name, run in list(cases.items())[part::parts]:
            guarded(name, run)
    if "time" in asked.what:
        timed_jax(write)
        timed_torch(write)


if __name__ == "__main__":
    main()
