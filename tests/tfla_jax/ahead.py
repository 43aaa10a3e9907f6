"""Compiles calls of tfla.jax for four H200s that are not there, and writes what XLA makes of them.

    python tests/tfla_jax/ahead.py FOLDER

Of each program FOLDER has its optimised HLO, NAME.hlo, and where its values lie, NAME.memory. It
needs Triton, the wheels jax-cuda13-plugin and jax-cuda13-pjrt, which need no GPU and no CUDA, and
the environment that test_ahead.py gives it: XLA writes into FOLDER/dump.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tfla.jax import State, lowering, mlstm, mlstm_step
from tfla.jax.dispatch import planned_for
from tfla.plan import Device

FOLDER = Path(sys.argv[1])
H200 = Device((9, 0), 132, 232448)
TARGET = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
"""
B, T, H, K, V, N, LAYERS = 4, 2048, 4, 128, 256, 3, 3
DEVICES = topologies.get_topology_desc(
    "", platform="cuda", target_config=TARGET, topology="1x1x4"
).devices


def shape(*sizes: int, half: bool = False, whole: bool = False, sharding: Any = None) -> Any:
    dtype = jnp.int32 if whole else jnp.bfloat16 if half else jnp.float32
    where = sharding or SingleDeviceSharding(DEVICES[0])
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)


def operands(*lead: int, sharding: Any = None, K: int = K, V: int = V) -> list[Any]:
    half = {"half": True, "sharding": sharding}
    q, v = shape(*lead, T, H, K, **half), shape(*lead, T, H, V, **half)
    gate = shape(*lead, T, H, sharding=sharding)
    return [q, q, v, gate, gate]


def loss(*x: Array) -> Array:
    return sum((y.astype(jnp.float32).sum() for y in x), jnp.zeros(()))


def call(*x: Array, **options: Any) -> Array:
    return mlstm(*x, backend="triton", **options)[0]


def gradient(function: Callable[..., Any], count: int = 5) -> Callable[..., Any]:
    return jax.grad(lambda *x: loss(*jax.tree.leaves(function(*x))), range(count))


def with_states(q: Array, k: Array, v: Array, i: Array, f: Array, state: State) -> Any:
    return mlstm(q, k, v, i, f, initial_state=state, output_final_state=True, backend="triton")


def packed(*x: Array) -> Array:
    return call(*x[:5], cu_seqlens=x[5])


def layers(gate: str, remat: bool) -> Callable[..., Any]:
    def layer(y: Array, weight: Array) -> Array:
        x = (weight * y).astype(jnp.bfloat16)
        gates = [y[..., n].astype(jnp.float32) for n in range(2)]
        return y + call(x[..., :K], x[..., K:], x, *gates, input_gate=gate)

    one = jax.checkpoint(layer) if remat else layer

    def run(weights: Array, y: Array) -> Array:
        return lax.scan(lambda y, weight: (one(y, weight), None), y, weights)[0]

    return gradient(run, 2)


def steps(states: State, *token: Array) -> Any:
    """A token through layers whose states are stacked."""

    def layer(h: Array, state: State) -> Any:
        after, state = mlstm_step(*token[:2], h, *token[3:], state, backend="triton")
        return after, state

    return lax.scan(layer, token[2], states)


def programs() -> dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any]]]:
    x, n = operands(B), {"half": True}
    state = State(shape(B, H, K, V), shape(B, H, K), shape(B, H))
    stacked = State(shape(LAYERS, B, H, K, V), shape(LAYERS, B, H, K), shape(LAYERS, B, H))
    token = [shape(B, H, K, **n), shape(B, H, K, **n), shape(B, H, V, **n)]
    token += [shape(B, H), shape(B, H)]
    wide = operands(B, K=512)
    wide_state = State(shape(B, H, 512, V), shape(B, H, 512), shape(B, H))
    one = [*operands(1), shape(N + 1, whole=True)]
    found: dict[str, Any] = {
        "forward": (call, x),
        "sigmoid": (gradient(lambda *x: call(*x, input_gate="sigmoid")), x),
        "gradient": (gradient(call), x),
        "states": (gradient(with_states, 6), [*x, state]),
        "slices": (gradient(with_states, 6), [*wide, wide_state]),
        "packed": (gradient(packed), one),
        "vmap": (jax.vmap(call), operands(N, B)),
        "vmap of gradient": (jax.vmap(gradient(call)), operands(N, B)),
        "step": (lambda s, *t: mlstm_step(*t, s, backend="triton"), [state, *token]),
        "steps of layers": (steps, [stacked, *token]),
    }
    for gate in ("exp", "sigmoid"):
        for remat in (False, True):
            name = f"layers {gate}{' remat' if remat else ''}"
            found[name] = layers(gate, remat), [shape(LAYERS), shape(B, T, H, V, half=True)]
    mesh = Mesh(np.array(DEVICES), "b")
    rows = NamedSharding(mesh, PartitionSpec("b"))
    split = jax.shard_map(
        call, mesh=mesh, in_specs=(PartitionSpec("b"),) * 5, out_specs=PartitionSpec("b")
    )
    found["shard_map"] = gradient(split), operands(B, sharding=rows)
    donating = {"step": {"donate_argnums": 0}, "steps of layers": {"donate_argnums": 0}}
    return {name: (*rest, donating.get(name, {})) for name, rest in found.items()}


def write(name: str, function: Callable[..., Any], arguments: list[Any], options: Any) -> None:
    with planned_for(H200):
        traced = jax.jit(function, **options).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    (FOLDER / f"{name}.hlo").write_text(compiled.as_text())
    dump = sorted((FOLDER / "dump").glob("*buffer-assignment.txt"))[-1]
    (FOLDER / f"{name}.memory").write_text(dump.read_text())
    for file in (FOLDER / "dump").iterdir():
        file.unlink()


def main() -> None:
    found = programs()
    for name, program in found.items():
        write(name, *program)
    # What the tests must see: buffers that are no longer than what they hold.
    jax.clear_caches()
    lowering.elements = lambda buffer: math.prod(buffer.shape)
    write("broken", *found["layers exp"])
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
