"""The functions by themselves: steps, parts and the whole agree, and so do all ways to say a call.

test_against_torch.py holds the whole against the recurrence.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from arrays import (
    VARIANTS,
    Problem,
    assert_close,
    is_normalized,
    loss,
    parts,
    true_size,
)
from jax import Array, lax

from tfla.jax import State, linear_attention, mlstm, mlstm_step

pytestmark = pytest.mark.usefixtures("x64")
variants = pytest.mark.parametrize(("input_gate", "normalize"), VARIANTS)


def closed_form(
    q: Array, k: Array, v: Array, log_f: Array, log_i: Array, normalize: bool, scale: float
) -> Array:
    """h from the T x T matrix of weights, which knows neither a loop nor a stabiliser."""
    T, repeats = q.shape[1], v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, repeats, 2), jnp.repeat(k, repeats, 2)
    b = jnp.cumsum(log_f, 1)
    exponent = log_i[:, None] + b[:, :, None] - b[:, None]  # (B, T, S, H)
    past = jnp.tril(jnp.ones((T, T), bool))[None, :, :, None]
    w = jnp.exp(jnp.where(past, exponent, -jnp.inf)) * scale * jnp.einsum("bthk,bshk->btsh", q, k)
    h = jnp.einsum("btsh,bshv->bthv", w, v)
    return h / jnp.maximum(jnp.abs(w.sum(2)), 1.0)[..., None] if normalize else h


@variants
def test_the_closed_form(input_gate: str, normalize: bool | None) -> None:
    q, k, v, i, f = Problem().operands()
    h, _ = mlstm(q, k, v, i, f, input_gate=input_gate, normalize=normalize, scale=0.3)
    log_f = jax.nn.log_sigmoid(f)
    log_i = i if input_gate == "exp" else jax.nn.log_sigmoid(i)
    normalized = is_normalized(input_gate, normalize)
    assert_close(h, closed_form(q, k, v, log_f, log_i, normalized, 0.3))
    h, _ = linear_attention(q, k, v, log_f, log_i, normalize=normalized, scale=0.3)
    assert_close(h, closed_form(q, k, v, log_f, log_i, normalized, 0.3))


@variants
def test_steps_and_parts_make_the_whole(input_gate: str, normalize: bool | None) -> None:
    problem = Problem(normalized=is_normalized(input_gate, normalize))
    x, state = problem.operands(), problem.state()
    options: Any = {"input_gate": input_gate, "normalize": normalize}
    whole = mlstm(*x, initial_state=state, output_final_state=True, **options)

    def step(state: State, tokens: tuple[Array, ...]) -> tuple[State, Array]:
        h, state = mlstm_step(*tokens, state, **options)
        return state, h

    end, h = lax.scan(step, state, tuple(jnp.moveaxis(y, 1, 0) for y in x))
    assert_close(parts(jnp.moveaxis(h, 0, 1), end), parts(*whole))

    first, between = mlstm(
        *(y[:, :33] for y in x), initial_state=state, output_final_state=True, **options
    )
    second, end = mlstm(
        *(y[:, 33:] for y in x), initial_state=between, output_final_state=True, **options
    )
    assert_close(parts(jnp.concatenate([first, second], 1), end), parts(*whole))


def test_gates_per_head_and_gates_that_are_not_there() -> None:
    q, k, v, i, f = Problem().operands()
    log_f = -jnp.arange(1.0, 5.0) / 10
    every = jnp.broadcast_to(log_f, f.shape)
    h, _ = linear_attention(q, k, v, log_f)
    assert_close(h, linear_attention(q, k, v, every, jnp.zeros_like(i))[0])
    grad = jax.grad(lambda log_f: loss(parts(*linear_attention(q, k, v, log_f))))
    assert_close(grad(log_f), grad(every).sum((0, 1)))
    h, state = linear_attention(q, k, v, output_final_state=True)
    by_state = jnp.einsum("bgk,bgpkv->bgpv", q[:, -1], state.C.reshape(2, 2, 2, 6, 5)) * 6**-0.5
    assert_close(h[:, -1], by_state.reshape(2, 4, 5))


def repeated(x: tuple[Array, ...]) -> tuple[Array, ...]:
    """A group for every head."""
    q, k, v, i, f = x
    return *(jnp.repeat(y, v.shape[2] // y.shape[2], 2) for y in (q, k)), v, i, f


def test_groups_are_heads_that_read_one_q_and_k() -> None:
    problem = Problem()
    x, state = problem.operands(), problem.state()

    def whole(x: tuple[Array, ...], state: State) -> list[Array]:
        return parts(*mlstm(*x, initial_state=state, output_final_state=True))

    assert_close(whole(x, state), whole(repeated(x), state))
    grads = jax.grad(lambda *y: loss(whole(*y)), (0, 1))
    assert_close(
        grads(x, state), jax.grad(lambda x, s: loss(whole(repeated(x), s)), (0, 1))(x, state)
    )
    token = tuple(y[:, 0] for y in x)
    each = tuple(y[:, 0] for y in repeated(x))
    assert_close(mlstm_step(*token, state), mlstm_step(*each, state))


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_computed_each_by_itself(reverse: bool) -> None:
    offsets = jnp.array([0, 0, 70, 70, 73, 137], jnp.int32)
    documents = [slice(*map(int, ends)) for ends in pairwise(offsets)]
    problem = Problem(B=1, T=137, N=5)
    x, state = problem.operands(), problem.state()
    options: Any = {"output_final_state": True, "reverse": reverse}

    def packed(x: tuple[Array, ...], state: State) -> list[Array]:
        return parts(*mlstm(*x, initial_state=state, cu_seqlens=offsets, **options))

    def apart(x: tuple[Array, ...], state: State) -> list[Array]:
        ends = []
        for row, part in enumerate(documents):
            own = jax.tree.map(lambda y, row=row: y[row : row + 1], state)
            ends.append(parts(*mlstm(*(y[:, part] for y in x), initial_state=own, **options)))
        h, C, n = zip(*ends, strict=True)
        return [jnp.concatenate(h, 1), jnp.concatenate(C), jnp.concatenate(n)]

    assert_close(packed(x, state), apart(x, state))
    grads = jax.jit(jax.grad(lambda *y: loss(packed(*y)), (0, 1)))(x, state)
    assert_close(grads, jax.jit(jax.grad(lambda *y: loss(apart(*y)), (0, 1)))(x, state))


def test_reverse_is_the_mirror_image() -> None:
    problem = Problem()
    x, state = problem.operands(), problem.state()
    options: Any = {"initial_state": state, "output_final_state": True}
    h, end = mlstm(*(jnp.flip(y, 1) for y in x), **options)
    assert_close(parts(*mlstm(*x, reverse=True, **options)), parts(jnp.flip(h, 1), end))


def test_offsets_that_the_host_does_not_read_may_be_any() -> None:
    """Out of range or falling, each counts as the nearest that is not; tokens that are then in no
    sequence get zeros, in h and in gradients."""
    x = Problem(B=1, T=40).operands()

    @jax.jit
    def run(x: tuple[Array, ...], offsets: Array) -> tuple[list[Array], Any]:
        def results(x: tuple[Array, ...]) -> tuple[Array, list[Array]]:
            found = parts(*mlstm(*x, cu_seqlens=offsets, output_final_state=True))
            return loss(found), found

        grads, found = jax.grad(results, has_aux=True)(x)
        return found, grads

    given, used = jnp.array([3, 20, 7, 99, 30]), jnp.array([3, 20, 20, 40, 40])
    assert_close(run(x, given), run(x, used))
    (h, C, n), grads = run(x, jnp.array([-5, 3, 30, 30, 30]))
    assert (h[:, 30:] == 0).all() and all((y[:, 30:] == 0).all() for y in grads)
    assert (h[:, :30] != 0).all() and (C[2:] == 0).all() and (C[:2] != 0).any()


def test_nothing_to_compute() -> None:
    problem = Problem(T=0)
    x, state = problem.operands(), problem.state()
    h, end = mlstm(*x, initial_state=state, output_final_state=True)
    assert h.shape == (2, 0, 4, 5)
    assert_close(end, state)
    h, end = mlstm(*x, output_final_state=True)
    assert all((y == 0).all() for y in end)
    x = Problem(B=0).operands()
    h, end = mlstm(*x, output_final_state=True)
    assert h.shape == (0, 70, 4, 5) and end.C.shape == (0, 4, 6, 5)
    x = Problem(B=1, T=0).operands()
    h, end = mlstm(*x, cu_seqlens=jnp.zeros(3, jnp.int32), output_final_state=True)
    assert h.shape == (1, 0, 4, 5) and end.C.shape == (2, 4, 6, 5) and (end.C == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_come_back(dtype: Any) -> None:
    x = [y.astype(dtype) for y in Problem(T=10).operands()]
    h, end = mlstm(*x, output_final_state=True)
    assert h.dtype == dtype and all(y.dtype == jnp.float32 for y in end)
    grads = jax.grad(lambda x: mlstm(*x)[0].astype(jnp.float32).sum())(x)
    assert all(y.dtype == dtype for y in grads)
    low = State(end.C.astype(jnp.bfloat16), end.n.astype(jnp.bfloat16), end.m)
    h, after = mlstm_step(*(y[:, 0] for y in x), low)
    assert h.dtype == dtype and [y.dtype for y in after] == [y.dtype for y in low]


# ---------------------------------------------------------------- the step's state


def test_an_inplace_step_lies_where_its_state_lay() -> None:
    problem = Problem(T=1)
    token, state = [y[:, 0] for y in problem.operands()], problem.state()
    expected = mlstm_step(*token, state)
    assert not state.C.is_deleted()
    address = state.C.unsafe_buffer_pointer()
    h, after = mlstm_step(*token, state, inplace=True)
    assert all(y.is_deleted() for y in state)
    assert after.C.unsafe_buffer_pointer() == address
    assert_close((h, after), expected)


def test_a_state_is_not_donated_where_a_derivative_needs_it() -> None:
    problem = Problem(T=1)
    token, state = [y[:, 0] for y in problem.operands()], problem.state()

    def grads(inplace: bool) -> State:
        return jax.grad(lambda s: loss(parts(*mlstm_step(*token, s, inplace=inplace))))(state)

    assert_close(grads(True), grads(False), 0.0)
    assert not any(y.is_deleted() for y in state)


def test_slots_are_rows_of_a_larger_state() -> None:
    problem = Problem(T=1, N=5)
    token, state = [y[:, 0] for y in problem.operands()], problem.state()
    rows = jnp.array([3, 0])
    before = jax.tree.map(jnp.copy, state)
    h, after = mlstm_step(*token, jax.tree.map(lambda y: y[rows], state))
    expected = jax.tree.map(lambda x, y: x.at[rows].set(y), state, after)
    assert_close(mlstm_step(*token, state, inplace=True, slots=rows), (h, expected))

    # Rows that do not exist, where the host does not see them.
    step = jax.jit(lambda state, slots: mlstm_step(*token, state, inplace=True, slots=slots))
    for slots in ([3, 5], [3, -1]):
        h, after = step(before, jnp.array(slots))
        assert jnp.isnan(h[1]).all() and jnp.isfinite(h[0]).all()
        same = [jax.tree.map(lambda y: jnp.delete(y, 3, 0), s) for s in (after, before)]
        assert_close(*same, 0.0)
        assert_close(true_size(after)[0][3], true_size(expected)[0][3])


# ---------------------------------------------------------------- what is not finite, or extreme


@pytest.mark.parametrize("name", "qkvif")
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays(name: str, value: float) -> None:
    """In its row and its head, or in the heads that read its group; a gate's, in later tokens."""
    if name in "if" and value == jnp.inf:
        pytest.skip("an exact limit")
    x = dict(zip("qkvif", Problem(T=80).operands(), strict=True))
    at = "qkvif".index(name)

    def results(*x: Array) -> tuple[Array, Array]:
        h, _ = mlstm(*x)
        return loss([h]), h

    run = jax.jit(jax.grad(results, (0, 1, 2, 3, 4), has_aux=True))
    clean, h = run(*x.values())
    x[name] = x[name].at[0, 70, 0].set(value)
    grads, spoilt = run(*x.values())
    heads = slice(2, 4) if at < 2 else slice(1, 4)
    for a, b in zip((*grads, spoilt), (*clean, h), strict=True):
        assert_close(a[1], b[1])
        groups = a.shape[2] == 2
        own = slice(1, 2) if groups else heads
        assert_close(a[0, :, own], b[0, :, own])
    assert_close(spoilt[0, :64], h[0, :64])
    if name in "if":
        assert_close(spoilt[0, :70], h[0, :70])
        assert jnp.isnan(spoilt[0, 70:, 0]).all()


def test_what_overflows_at_a_weight_of_zero_is_nothing() -> None:
    """q_5 k_12 overflows, which token 5 does not see; so does q_13 k_12, where the gate of token 12
    is closed, and dh_5 v_12."""
    x = [y.astype(jnp.float32) for y in Problem(B=1, T=20).operands()]
    q, k, v, i, f = x
    q = q.at[0, jnp.array([5, 13]), 0].set(0.0).at[0, jnp.array([5, 13]), 0, 0].set(3e17)
    i = i.at[0, 12].set(-1e5)
    k, v = (y.at[0, 12, 0].set(0.0) for y in (k, v))
    dh = jnp.ones_like(v).at[0, 5].set(1e15)
    grads = jax.jit(jax.grad(lambda *x: (dh * mlstm(*x)[0]).sum(), (0, 1, 2, 3, 4)))
    before = grads(q, k, v, i, f)
    after = grads(q, k.at[0, 12, 0, 0].set(1e25), v.at[0, 12, 0, 0].set(1e25), i, f)
    others = jnp.arange(20) != 12
    assert_close(*([y[:, others] for y in all] for all in (after, before)), 1e-5)


@pytest.mark.parametrize("scale", [None, 1e4])
def test_a_query_of_zeros_where_the_floor_underflows(scale: float | None) -> None:
    """n . q = 0 and exp(-m) is below the least of fp32: 1 / den is its largest."""
    q, k, v, i, f = (y.astype(jnp.float32) for y in Problem().operands())
    q = q.at[:, ::5].set(0.0)

    def results(*x: Array) -> tuple[Array, Array]:
        h, _ = mlstm(*x, scale=scale)
        return h[:, 1::5].sum(), h

    grads, h = jax.grad(results, (0, 1, 2, 3, 4), has_aux=True)(q, k, v, i + 95, f)
    assert (h[:, ::5] == 0).all() and jnp.isfinite(h).all()
    assert all(jnp.isfinite(y).all() for y in grads)


def test_masked_tokens_and_exact_resets() -> None:
    """i = -inf writes nothing, f = -inf keeps nothing, f = +inf keeps all, i = +inf is 2^100."""
    q, k, v, i, f = Problem().operands()
    i, f = i.at[:, 10:20].set(-jnp.inf), f.at[:, 30].set(-jnp.inf)
    h, _ = mlstm(q, k, v, i, f)
    assert_close(h[:, 30:], mlstm(*(y[:, 30:] for y in (q, k, v, i, f)))[0])
    kept = jnp.concatenate([jnp.arange(10), jnp.arange(20, 70)])
    idle = f.at[:, 10:20].set(jnp.inf)
    h, _ = mlstm(q, k, v, i, idle)
    assert_close(h[:, kept], mlstm(*(y[:, kept] for y in (q, k, v, i, f)))[0])
    grads = jax.grad(lambda *x: mlstm(*x)[0].sum(), (0, 1, 2, 3, 4))(q, k, v, i, idle)
    assert all(jnp.isfinite(y).all() for y in grads)
    h, _ = mlstm(q, k, v, i.at[:, 5].set(jnp.inf), f)
    assert_close(h, mlstm(q, k, v, i.at[:, 5].set(2.0**100), f)[0], 0.0)
