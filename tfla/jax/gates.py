"""Gates become the weights of a chunk: the mathematics and the limits of ``tfla.gates``, for JAX.

With a normaliser the recurrence is written in a gauge m, and its gates are *stabilised*:

    m_t = max(log_f_t + m_{t-1}, log_i_t)
    a_t = log_f_t + m_{t-1} - m_t            the log-decay of the state       a, u <= 0, and one of
    u_t = log_i_t - m_t                      the log-weight of the token      the two is 0

Without one m = 0, a = log_f and u = log_i. Token s then weighs D_ts = exp(u_s + a_{s+1} + ... +
a_t) at token t, and the state that enters the chunk exp(a_1 + ... + a_t).

JAX has no fp64 unless a program asks for it, so all is computed in the dtype of the gates, fp32 or
fp64. Two things make fp32 enough. The sums start at each token s and are never differences of two
sums from the start of the chunk, so no gate takes digits from tokens behind it, and the derivative
of log_f is the plain sum of what flows past that token. And a_t is exact for whatever numbers the
gauges are, because what rounding takes from log_f + m is added to it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from tfla.jax.spec import Options
from tfla.limits import EMPTY, FOLLOWED, LIMIT, LOG_F_NOTHING, LOG_I_NOTHING

# Is log_i the logsigmoid of i, and is h divided by the normaliser where the caller does not say?
INPUT_GATES = {"exp": (False, True), "sigmoid": (True, False)}


def log_gates(i: Array, f: Array, options: Options) -> tuple[Array, Array]:
    """(log_i, log_f) from pre-activations in fp32 or fp64, finite unless NaN."""
    is_sigmoid, _ = INPUT_GATES[options.input_gate]
    return _log_gate(is_sigmoid, LOG_I_NOTHING, i), _log_gate(options.sigmoid_f, LOG_F_NOTHING, f)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _log_gate(is_sigmoid: bool, nothing: float, x: Array) -> Array:
    """logsigmoid(x) or x within the limits: what is above 2^100 counts as that, what is below
    -2^100 as -inf, whose stand-in is ``nothing``."""
    y = jax.nn.log_sigmoid(x) if is_sigmoid else x
    return jnp.where(y < -LIMIT, nothing, jnp.minimum(y, LIMIT))


@_log_gate.defjvp
def _log_gate_jvp(
    is_sigmoid: bool, nothing: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """The derivative knows no limits: at them it is multiplied by weights of 0."""
    (x,), (dx,) = primals, tangents
    return _log_gate(is_sigmoid, nothing, x), dx * jax.nn.sigmoid(-x) if is_sigmoid else dx


def stabilize(log_i: Array, log_f: Array, m: Array) -> tuple[Array, Array, Array]:
    """(u, a, m_t) of a chunk. log_i, log_f: (..., L). m: (...) gauge of the state that enters.

    No result depends on the gauges, so derivatives take them for constants, but for the one that
    comes in: du = dlog_i, da = dlog_f, and da_1 = dlog_f_1 + dm. (Not by a rule of jax.custom_jvp:
    in JAX 0.11 a second derivative loses it where jax.checkpoint stands in lax.scan.)
    """
    m = jnp.clip(m, EMPTY, -EMPTY)
    fixed_i, fixed_f, fixed_m = map(lax.stop_gradient, (log_i, log_f, m))
    is_past, sums = _sums(fixed_f)
    top = jnp.max(jnp.where(is_past, fixed_i[..., None, :] + sums, EMPTY), -1)
    m_t = jnp.maximum(fixed_m[..., None] + jnp.cumsum(fixed_f, -1), top)
    m_t = jnp.maximum(m_t, EMPTY)
    before = jnp.concatenate([fixed_m[..., None], m_t[..., :-1]], -1)
    # log_f + before - m_t: a gauge of 1e5 has steps of 0.008 in fp32.
    carried, lost = _sum_and_rest(fixed_f, before)
    a = carried - m_t + jnp.where(jnp.abs(lost) > FOLLOWED, 0.0, lost)
    # What is added are zeros that have a derivative.
    a = (a + (log_f - fixed_f)).at[..., 0].add(m - fixed_m)
    return log_i - m_t, a, m_t


def _sum_and_rest(x: Array, y: Array) -> tuple[Array, Array]:
    """x + y, and what rounding takes from it (two-sum, Knuth)."""
    total = x + y
    kept = total - x
    return total, (x - (total - kept)) + (y - kept)


def final_gauge(m: Array) -> Array:
    """The gauge that goes out: where nothing was ever written it may as well be 0."""
    return jnp.where(m <= EMPTY, 0.0, m)


def chunk_weights(u: Array, a: Array) -> tuple[Array, Array]:
    """(D, w) of u, a (..., L): D (..., L, L) of token s at token t, w (..., L) of the state."""
    is_past, sums = _sums(a)
    # exp(u) exp(sums), and not the exp of a rounded sum: beside log_i = -30 a decay of 0.05 has
    # steps of 2e-6 in fp32.
    total = u[..., None, :] + sums
    _, rest = _sum_and_rest(*map(lax.stop_gradient, (u[..., None, :], sums)))
    return _exp(total, is_past, rest), _exp(jnp.cumsum(a, -1), True, 0.0)


def _sums(a: Array) -> tuple[Array, Array]:
    """Of a (..., L), for each token t and each s: is s <= t, (L, L), and the sum of those behind s
    up to t, (..., L, L)."""
    t, s = jnp.arange(a.shape[-1])[:, None], jnp.arange(a.shape[-1])
    return s <= t, jnp.cumsum(jnp.where(s < t, a[..., :, None], 0.0), -2)


def _exp(x: Array, keep: Array | bool, rest: Array | float) -> Array:
    """exp(x + rest), for a small rest, and 0 where it is not kept. Where it is 0 its derivative is,
    too, whatever comes back: what has no weight may be a product beyond the range of its dtype, and
    inf times 0 is NaN."""
    is_positive = keep & (jnp.exp(x) != 0.0)  # or NaN
    x, rest = (jnp.where(is_positive, y, 0.0) for y in (x, rest))
    return jnp.where(is_positive, jnp.exp(x) * (1.0 + rest), 0.0)


def weighted(weight: Array, x: Array) -> Array:
    """weight * x, which is 0 where the weight is 0, whatever x is there."""
    return weight * jnp.where(weight != 0.0, x, 0.0)


def inverse_denominator(nu: Array, m_t: Array) -> Array:
    """1 / max(|nu|, exp(-m_t)): the normaliser. It stays finite, and so does its derivative by a
    nu of size 1 / 2^126: written as a quotient it would be a square of that."""
    info = jnp.finfo(m_t.dtype)
    size, floor = jnp.abs(nu), jnp.clip(jnp.exp(-m_t), info.tiny, info.max)
    return _reciprocal(jnp.where(size > floor, size, floor))


@jax.custom_jvp
def _reciprocal(x: Array) -> Array:
    return 1.0 / x


@_reciprocal.defjvp
def _reciprocal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _reciprocal(primals[0])
    return y, -((tangents[0] * y) * y)
