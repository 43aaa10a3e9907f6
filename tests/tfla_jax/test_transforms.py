"""What JAX makes of a function: jit, vmap, grad of grad, scan, checkpoint, shard_map, donation."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from arrays import Problem, assert_close, loss, parts
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec

from tfla.jax import State, linear_attention, mlstm, mlstm_step

pytestmark = pytest.mark.usefixtures("x64")
Operands = tuple[Array, ...]


def whole(x: Operands, state: State | None) -> list[Array]:
    return parts(*mlstm(*x, initial_state=state, output_final_state=True))


def loss_of(x: Operands, state: State | None) -> Array:
    return loss(whole(x, state))


def test_jit_changes_nothing_and_states_are_pytrees() -> None:
    problem = Problem()
    x, state = problem.operands(), problem.state()
    run = jax.jit(lambda x, state: mlstm(*x, initial_state=state, output_final_state=True))
    assert_close(run(x, state), mlstm(*x, initial_state=state, output_final_state=True), 1e-13)
    assert isinstance(run(x, state)[1], State)
    assert len(jax.tree.leaves(State(state.C, None, None))) == 1
    cut = jax.grad(lambda s: sum(y.sum() for y in s.detach()))(state)
    assert all((y == 0).all() for y in cut)


def test_vmap_is_a_loop() -> None:
    """Over states too, and where only some arguments have the axis."""
    q, k, v, i, f = Problem(B=3, T=20).operands()
    states = [Problem(seed=seed, B=3).state() for seed in range(4)]
    stacked = jax.tree.map(lambda *y: jnp.stack(y, 1), *states)  # the axis is the second one
    shifts = jnp.arange(4.0)

    def results(v: Array, shift: Array, state: State) -> tuple[list[Array], Any]:
        grads = jax.grad(lambda q, f: loss_of((q, k, v, i, f + shift), state), (0, 1))(q, f)
        return whole((q, k, v, i, f + shift), state), grads

    found = jax.vmap(results, (None, 0, 1))(v, shifts, stacked)
    one_by_one = [results(v, shift, state) for shift, state in zip(shifts, states, strict=True)]
    assert_close(found, jax.tree.map(lambda *y: jnp.stack(y), *one_by_one))

    token = [y[:, 0] for y in (q, k, v, i, f)]
    found = jax.vmap(lambda state: mlstm_step(*token, state), 1)(stacked)
    one_by_one = [mlstm_step(*token, state) for state in states]
    assert_close(found, jax.tree.map(lambda *y: jnp.stack(y), *one_by_one))


def test_vmap_over_packed_calls() -> None:
    xs = [Problem(B=1, T=20, seed=seed).operands() for seed in range(2)]
    offsets = jnp.array([[0, 7, 20], [0, 0, 20]])

    def run(x: Operands, offsets: Array) -> list[Array]:
        return parts(*mlstm(*x, cu_seqlens=offsets, output_final_state=True))

    found = jax.vmap(run)(jax.tree.map(lambda *y: jnp.stack(y), *xs), offsets)
    apart = [run(x, row) for x, row in zip(xs, offsets, strict=True)]
    assert_close(found, jax.tree.map(lambda *y: jnp.stack(y), *apart))


def test_derivatives_of_both_modes_and_of_derivatives() -> None:
    """Central differences of the gradient: a step of 1e-5 is off by 1e-10 of the next derivatives,
    and by 1e-11 of the gradient from its rounding."""
    problem = Problem(B=1, T=3, G=1, H=1, K=2, V=2)
    z, unravel = ravel_pytree((problem.operands(), problem.state()))

    def f(z: Array) -> Array:
        return loss_of(*unravel(z))

    gradient = jax.jit(jax.grad(f))
    assert_close(jax.jit(jax.jacfwd(f))(z), gradient(z))
    steps = 1e-5 * jnp.eye(len(z))
    differences = jnp.stack([(gradient(z + e) - gradient(z - e)) / 2e-5 for e in steps])
    for outer in (jax.jacfwd, jax.jacrev):
        assert_close(jax.jit(outer(gradient))(z), differences, 1e-8)


def layers(depth: int) -> tuple[Problem, Array]:
    problem = Problem(T=20, G=4, V=6)
    return problem, jnp.linspace(0.5, 1.5, depth)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_is_the_unrolled_loop(remat: bool) -> None:
    problem, weights = layers(3)
    q, k, v, i, f = problem.operands()

    def layer(x: Array, weight: Array) -> Array:
        h, _ = mlstm(weight * x, k, x, i, f)
        return x + h

    one = jax.checkpoint(layer) if remat else layer

    def scanned(weights: Array, x: Array) -> Array:
        x, _ = lax.scan(lambda x, weight: (one(x, weight), None), x, weights)
        return loss([x])

    def unrolled(weights: Array, x: Array) -> Array:
        for weight in weights:
            x = layer(x, weight)
        return loss([x])

    assert_close(
        jax.jit(jax.value_and_grad(scanned, (0, 1)))(weights, q),
        jax.jit(jax.value_and_grad(unrolled, (0, 1)))(weights, q),
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_splits_batch_and_heads(check_vma: bool) -> None:
    """Two by two devices, gradients of what all of them share included."""
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("b", "h"), auto, devices=jax.devices()[:4])
    problem = Problem(B=4, T=70, G=2, H=4)
    (q, k, v, i, _), state = problem.operands(), problem.state()
    log_f = -jnp.arange(1.0, 5.0) / 10  # (H,): the same for all rows
    tokens, per_head = PartitionSpec("b", None, "h"), PartitionSpec("h")
    states = State(*[PartitionSpec("b", "h")] * 3)

    def run(q: Array, k: Array, v: Array, log_i: Array, log_f: Array, state: State) -> Any:
        return linear_attention(
            q,
            k,
            v,
            log_f,
            log_i,
            normalize=True,
            initial_state=state,
            output_final_state=True,
        )

    def without_state(q: Array, k: Array, v: Array, log_i: Array, log_f: Array) -> Array:
        return linear_attention(q, k, v, log_f, log_i)[0]

    specs = (tokens, tokens, tokens, tokens, per_head)
    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(*specs, states),
        out_specs=(tokens, states),
        check_vma=check_vma,
    )
    bare = jax.shard_map(
        without_state, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=check_vma
    )
    x = q, k, v, i, log_f

    def value(function: Any, *y: Any) -> Array:
        return loss(parts(*function(*y)))

    found = jax.jit(jax.value_and_grad(lambda *y: value(split, *y), range(6)))
    plain = jax.jit(jax.value_and_grad(lambda *y: value(run, *y), range(6)))
    assert_close(found(*x, state), plain(*x, state))
    assert_close(jax.jit(bare)(*x), without_state(*x))
    text = jax.jit(split).lower(*x, state).compile().as_text()
    assert "all-gather" not in text and "all-reduce" not in text


def test_a_donated_state_is_updated_in_place_by_a_program() -> None:
    """In the program's own jit, which donates; nothing is donated, and nothing lost, where it does
    not."""
    problem = Problem(T=1)
    token, state = [y[:, 0] for y in problem.operands()], problem.state()
    expected = mlstm_step(*token, state)
    run = jax.jit(lambda s, *x: mlstm_step(*x, s, inplace=True), donate_argnums=0)
    kept = jax.jit(lambda s, *x: mlstm_step(*x, s, inplace=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of buffers that could not be donated
        assert_close(kept(state, *token), expected)
        assert not state.C.is_deleted()
        address = state.C.unsafe_buffer_pointer()
        h, after = run(state, *token)
    assert after.C.unsafe_buffer_pointer() == address and state.C.is_deleted()
    assert_close((h, after), expected)


def test_without_x64_nothing_is_fp64() -> None:
    """As JAX is where a program says nothing: no result, and nothing on the way there."""
    with jax.enable_x64(False):
        problem = Problem(dtype=jnp.float32)
        x, state = problem.operands(), problem.state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            h, end = mlstm(*x, initial_state=state, output_final_state=True)
        assert h.dtype == jnp.float32 and all(y.dtype == jnp.float32 for y in end)
        found = whole(x, state)
        text = str(jax.make_jaxpr(jax.grad(loss_of, (0, 1)))(x, state))
    assert "f64" not in text and "i64" not in text
    wide = jax.tree.map(lambda y: y.astype(jnp.float64), (x, state))
    assert_close([y.astype(jnp.float64) for y in found], whole(*wide), 1e-5)


def test_a_call_is_compiled_once_for_its_shapes(caplog: pytest.LogCaptureFixture) -> None:
    x = Problem(T=23).operands()

    def compiled(*x: Array, **options: Any) -> int:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            jax.block_until_ready(mlstm(*x, **options))
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    again = [y + 1 for y in x]
    assert compiled(*x) > 0
    assert compiled(*again) == 0
    assert compiled(*again, scale=0.5) > 0
