"""The backend "triton" in Triton's interpreter: what tfla.jax does around the kernels, which have
tests of their own. Skipped where Triton is not installed."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is imported

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import Problem, assert_close, loss, parts
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from tfla.jax import State, linear_attention, mlstm, mlstm_step

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is missing"),
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="TRITON_INTERPRET is not 1"),
    # As in tests/interpreter/conftest.py.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
FP32 = 1e-5  # both backends compute in fp32, and sum in their own order
SMALL = {"B": 1, "T": 12, "G": 1, "H": 2, "K": 16, "V": 16, "dtype": jnp.float32}


def results(x: Any, state: State | None, backend: str, **options: Any) -> list[Array]:
    h, end = mlstm(*x, initial_state=state, output_final_state=True, backend=backend, **options)
    return parts(h, end)


def gradients(x: Any, state: State | None, backend: str, **options: Any) -> Any:
    return jax.grad(lambda x, state: loss(results(x, state, backend, **options)), (0, 1))(x, state)


CASES = {
    "exp, state, groups": (SMALL | {"B": 2}, {}),
    "exp, state, many heads of a group": (SMALL | {"H": 5}, {}),
    "sigmoid, state, negative scale": (
        SMALL | {"normalized": False},
        {"input_gate": "sigmoid", "scale": -0.3},
    ),
    "packed, state, mirrored": (
        SMALL | {"N": 3},
        {"cu_seqlens": jnp.array([0, 5, 5, 12]), "reverse": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_states_and_gradients_are_those_of_the_reference(name: str) -> None:
    sizes, options = CASES[name]
    problem = Problem(**sizes)  # type: ignore[arg-type]
    x, state = problem.operands(), problem.state()
    found = [f(x, state, "triton", **options) for f in (results, gradients)]
    assert_close(found, [f(x, state, "reference", **options) for f in (results, gradients)], FP32)


def test_tokens_of_no_sequence_get_zeros() -> None:
    """Offsets that are traced and wrong; what is allocated is NaN in the interpreter."""
    x = Problem(**SMALL).operands()
    offsets = jnp.array([2, 7, 5, 10])

    def run(backend: str) -> Any:
        def call(*x: Array) -> Array:
            return mlstm(*x, cu_seqlens=offsets + jnp.zeros_like(offsets), backend=backend)[0]

        h, pull = jax.vjp(jax.jit(call), *x)
        return h, pull(jnp.ones_like(h))

    found = jax.jit(run, static_argnums=0)("triton")
    assert_close(found, jax.jit(run, static_argnums=0)("reference"), FP32)
    outside = np.array([0, 1, 10, 11])
    assert all((y[:, outside] == 0).all() for y in jax.tree.leaves(found))


def test_gates_of_a_head_and_other_dtypes() -> None:
    q, k, v, i, _ = (y.astype(jnp.float16) for y in Problem(**SMALL).operands())
    log_f = -jnp.arange(1.0, 3.0) / 10

    def run(backend: str) -> Any:
        def call(q: Array, i: Array, log_f: Array) -> Array:
            h, _ = linear_attention(q, k, v, log_f, i, normalize=True, backend=backend)
            return (h.astype(jnp.float32) ** 2).sum()

        return jax.value_and_grad(call, (0, 1, 2))(q, i, log_f)

    found, expected = run("triton"), run("reference")
    wide = [jax.tree.map(lambda y: y.astype(jnp.float32), tree) for tree in (found, expected)]
    assert_close(*wide, 5e-3)
    assert [y.dtype for y in jax.tree.leaves(found)] == [y.dtype for y in jax.tree.leaves(expected)]


def test_a_batch_of_vmap_is_one_call_bit_for_bit() -> None:
    problems = [Problem(**(SMALL | {"seed": seed})) for seed in range(2)]
    xs, states = zip(*[(p.operands(), p.state()) for p in problems], strict=True)
    q = xs[0][0]  # the same for all

    def both(x: Any, state: State) -> Any:
        x = (q, *x[1:])
        return results(x, state, "triton"), gradients(x, state, "triton")

    stacked = jax.tree.map(lambda *y: jnp.stack(y), *zip(xs, states, strict=True))
    text = str(jax.make_jaxpr(jax.vmap(both))(*stacked))
    assert "while" not in text and "scan" not in text
    apart = [both(x, state) for x, state in zip(xs, states, strict=True)]
    assert_close(jax.vmap(both)(*stacked), jax.tree.map(lambda *y: jnp.stack(y), *apart), 1e-6)


@pytest.mark.slow
def test_a_batch_of_packed_calls_is_a_loop() -> None:
    xs = [Problem(**(SMALL | {"seed": seed})).operands() for seed in range(2)]
    offsets = jnp.array([[0, 7, 12], [0, 0, 12]])

    def run(x: Any, offsets: Array) -> list[Array]:
        return results(x, None, "triton", cu_seqlens=offsets)

    found = jax.vmap(run)(jax.tree.map(lambda *y: jnp.stack(y), *xs), offsets)
    apart = [run(x, row) for x, row in zip(xs, offsets, strict=True)]
    assert_close(found, jax.tree.map(lambda *y: jnp.stack(y), *apart), 0.0)


@pytest.mark.slow  # tests/tfla_jax/test_ahead.py compiles the same
@pytest.mark.parametrize("remat", [True, False])
def test_scan_over_layers_is_the_unrolled_loop(remat: bool) -> None:
    problem = Problem(**SMALL)
    q, k, _, i, f = problem.operands()
    weights = jnp.array([0.5, 1.5])

    def layer(x: Array, weight: Array) -> Array:
        y = weight * x
        return x + mlstm(y[..., :1, :], k, y, i, f, backend="triton")[0]

    one = jax.checkpoint(layer) if remat else layer

    def scanned(weights: Array, x: Array) -> Array:
        return loss([lax.scan(lambda x, weight: (one(x, weight), None), x, weights)[0]])

    def unrolled(weights: Array, x: Array) -> Array:
        for weight in weights:
            x = layer(x, weight)
        return loss([x])

    x = problem.operands()[2]
    found = jax.jit(jax.value_and_grad(scanned, (0, 1)))(weights, x)
    assert_close(found, jax.value_and_grad(unrolled, (0, 1))(weights, x), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_splits_the_batch(check_vma: bool) -> None:
    mesh = jax.make_mesh((2,), ("b",), (AxisType.Auto,), devices=jax.devices()[:2])
    problem = Problem(**(SMALL | {"B": 2}))
    (q, k, v, i, _), state = problem.operands(), problem.state()
    log_f = -jnp.arange(1.0, 3.0) / 10  # the same for all rows
    rows = PartitionSpec("b")

    def run(q: Array, k: Array, v: Array, log_i: Array, log_f: Array, state: State) -> Any:
        return linear_attention(
            *(q, k, v, log_f, log_i),
            normalize=True,
            initial_state=state,
            output_final_state=True,
            backend="triton",
        )

    specs = (rows, rows, rows, rows, PartitionSpec(), State(rows, rows, rows))
    outs = rows, State(rows, rows, rows)
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=check_vma)

    def value(function: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *y: loss(parts(*function(*y))), range(6)))

    x = q, k, v, i, log_f, state
    assert_close(value(split)(*x), value(run)(*x), FP32)


def test_steps_are_those_of_the_reference() -> None:
    """With a state in bf16, in rows of a larger one, under vmap, and differentiated."""
    problem = Problem(**(SMALL | {"B": 3, "V": 24}))
    token, state = [y[:, 0] for y in problem.operands()], problem.state()

    def step(backend: str, state: State, token: Any = token, **options: Any) -> Any:
        return mlstm_step(*token, state, backend=backend, **options)

    assert_close(step("triton", state), step("reference", state), FP32)
    low = State(state.C.astype(jnp.bfloat16), state.n.astype(jnp.bfloat16), state.m)
    found, expected = (
        jax.tree.map(lambda y: y.astype(jnp.float32), step(name, low))
        for name in ("triton", "reference")
    )
    assert_close(found, expected, 0.01)

    larger = [Problem(**(SMALL | {"B": 5, "V": 24, "seed": 1})).state() for _ in range(2)]
    slots = jnp.array([4, 0, 2])
    found, expected = (
        step(name, x, slots=slots, inplace=True)
        for name, x in zip(("triton", "reference"), larger, strict=True)
    )
    assert_close(found, expected, FP32)

    states = jax.tree.map(lambda y: jnp.stack([y, y + 0.5]), state)
    found = jax.vmap(lambda s: step("triton", s))(states)
    assert_close(found, jax.vmap(lambda s: step("reference", s))(states), FP32)

    def grads(backend: str) -> Any:
        def f(token: Any, state: State) -> Array:
            return loss(parts(*step(backend, state, token)))

        return jax.grad(f, (0, 1))(token, state)

    assert_close(grads("triton"), grads("reference"), FP32)


def test_what_is_not_offered_is_refused() -> None:
    q = jnp.ones((1, 3, 1, 16))
    i = q[..., 0]

    def f(q: Array) -> Array:
        return mlstm(q, q, q, i, i, backend="triton")[0].sum()

    with pytest.raises(NotImplementedError, match="first derivatives"):
        jax.grad(lambda q: jax.grad(f)(q).sum())(q)
    with jax.enable_x64(True), pytest.raises(RuntimeError, match=r"fp16, bf16 and fp32"):
        wide = q.astype(jnp.float64)
        mlstm(wide, wide, wide, i, i, backend="triton")


def test_empty_calls() -> None:
    for B, T in ((0, 3), (2, 0)):
        x = Problem(**(SMALL | {"B": B, "T": T})).operands()
        h, end = mlstm(*x, output_final_state=True, backend="triton")
        assert h.shape == (B, T, 2, 16) and end is not None and end.C.shape == (B, 2, 16, 16)
