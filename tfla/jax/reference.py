"""The backend "reference": chunk by chunk in jax.numpy, on all that JAX runs on.

It is differentiated by JAX itself, any number of times and in both modes, computes in fp32 (fp64
for fp64 q), in time and memory linear in T, and is the specification of the other backend.

A chunk of L tokens, with the weights D and w of ``tfla.jax.gates`` and (C, n, m) as it enters:

    scores_ts = D_ts (q_t . k_s)         nu_t = sum_s scores_ts + w_t q_t . n
    h_t = (sum_s scores_ts v_s + w_t C^T q_t) / max(|nu_t|, exp(-m_t))
    C'  = w_L C + sum_s D_Ls k_s v_s^T   n' = w_L n + sum_s D_Ls k_s

Source: arXiv 2503.14376, section 3. Below, head h of group g is (g, p): P = H / G heads a group.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tfla.jax import gates, shards
from tfla.jax.spec import Inputs, Options
from tfla.limits import EMPTY, LOG_I_NOTHING

L = 64  # tokens a chunk


class Memory(NamedTuple):
    """A state as the chunks have it, in fp32 or fp64; n and m are None when not normalised."""

    C: Array  # (R, G, P, K, V)
    n: Array | None  # (R, G, P, K)
    m: Array | None  # (R, G, P)


class Tokens(NamedTuple):
    """Tokens of a chunk, with log-gates in place of gates. In ``sequence`` a leading axis counts
    chunks; R is B, or 1 where sequences are packed."""

    q: Array  # (R, G, L, K)
    k: Array  # (R, G, L, K)
    v: Array  # (R, G, P, L, V)
    log_i: Array  # (R, G, P, L)
    log_f: Array  # (R, G, P, L)


def sequence(x: Inputs, options: Options) -> tuple[Array, Array, Array | None, Array | None]:
    """(h, C, n, m) of a call over sequences."""
    (B, T, G, K), (H, V) = x.q.shape, x.v.shape[2:]
    dtype = jnp.promote_types(x.q.dtype, jnp.float32)
    log_gates = gates.log_gates(x.i.astype(dtype), x.f.astype(dtype), options)
    grouped = [y.reshape(B, T, G, H // G, *y.shape[3:]) for y in (x.v, *log_gates)]
    tokens = Tokens(x.q, x.k, *grouped)
    N = B if x.cu_seqlens is None else len(x.cu_seqlens) - 1
    memory = _memory(x, options, (N, G, H // G, K, V), dtype)
    if T == 0:
        h = x.v
    elif x.cu_seqlens is None:
        h, memory = _rows(tokens, memory, options)
    else:
        h, memory = _packed(tokens, memory, options, x.cu_seqlens)
    m = None if memory.m is None else gates.final_gauge(memory.m).reshape(N, H)
    n = None if memory.n is None else memory.n.reshape(N, H, K)
    return h.reshape(B, T, H, V).astype(x.v.dtype), memory.C.reshape(N, H, K, V), n, m


def _memory(x: Inputs, options: Options, shape: tuple[int, ...], dtype: Any) -> Memory:
    """The initial state, or one that holds nothing."""
    if x.C is not None:
        n = None if x.n is None else x.n.reshape(shape[:-1])
        return Memory(x.C.reshape(shape), n, None if x.m is None else x.m.reshape(shape[:-2]))
    memory = Memory(jnp.zeros(shape, dtype), None, None)
    if options.normalize:
        n, m = jnp.zeros(shape[:-1], dtype), jnp.full(shape[:-2], EMPTY, dtype)
        memory = Memory(memory.C, n, m)
    return shards.varying(memory, shards.axes_of(x))


# ---------------------------------------------------------------- where the chunks lie


def _rows(tokens: Tokens, memory: Memory, options: Options) -> tuple[Array, Memory]:
    """B rows of T tokens each, side by side. h: (B, T, G, P, V)."""
    B, T = tokens.q.shape[:2]
    size = min(L, T)
    count = -(-T // size)

    def cut(y: Array, fill: float = 0.0) -> Array:
        y = jnp.flip(y, 1) if options.reverse else y
        past = [(0, count * size - T) if axis == 1 else (0, 0) for axis in range(y.ndim)]
        y = jnp.pad(y, past, constant_values=fill)
        return jnp.moveaxis(y.reshape(B, count, size, *y.shape[2:]), 1, 0)

    def body(memory: Memory, tokens: Tokens) -> tuple[Memory, Array]:
        h, memory = _chunk(tokens, memory, options)
        return memory, h

    memory, h = lax.scan(body, memory, _cut(tokens, cut))
    h = jnp.moveaxis(h, (0, 4), (1, 2))  # (count, B, G, P, size, V), tokens behind their chunk
    h = h.reshape(B, count * size, *h.shape[3:])[:, :T]
    return jnp.flip(h, 1) if options.reverse else h, memory


def _packed(
    tokens: Tokens, memory: Memory, options: Options, cu_seqlens: Array
) -> tuple[Array, Memory]:
    """N sequences packed along T, one chunk after the other; none lies in two sequences. Offsets
    may be traced: out of order, each counts as the nearest that is not, and tokens that are in no
    sequence get zeros. h: (1, T, G, P, V)."""
    T, N = tokens.q.shape[1], len(cu_seqlens) - 1
    size = min(L, T)
    count = T // size + N  # at most: each sequence has one chunk that is not full
    offsets = lax.cummax(jnp.clip(cu_seqlens.astype(jnp.int32), 0, T))
    start, end = offsets[:-1], offsets[1:]
    chunks = -(-(end - start) // size)
    behind = jnp.cumsum(chunks)  # the chunk behind the last one of each sequence
    first = behind - chunks

    # Of each chunk its sequence, and of each of its tokens the place in T.
    chunk = jnp.arange(count)
    row = jnp.minimum(jnp.searchsorted(behind, chunk, side="right"), N - 1)
    position = (chunk - first[row])[:, None] * size + jnp.arange(size)
    place = end[row, None] - 1 - position if options.reverse else start[row, None] + position
    past = position >= (end - start)[row, None]
    place = jnp.where(past, T, place)

    def cut(y: Array, fill: float = 0.0) -> Array:
        return y[0].at[place].get(mode="fill", fill_value=fill)[:, None]

    def body(
        carry: tuple[Memory, Memory], x: tuple[Tokens, Array, Array, Array]
    ) -> tuple[tuple[Memory, Memory], Array]:
        now, final = carry
        tokens, row, is_first, is_used = x
        now = _map(lambda new, old: jnp.where(is_first, new[row][None], old), memory, now)
        h, now = _chunk(tokens, now, options)
        where = jnp.where(is_used, row, N)
        final = _map(lambda all, new: all.at[where].set(new[0], mode="drop"), final, now)
        return (now, final), h

    now = _map(lambda y: y[:1], memory)
    xs = _cut(tokens, cut), row, chunk == first[row], chunk < behind[-1]
    (_, final), h = lax.scan(body, (now, memory), xs)
    h = jnp.moveaxis(h[:, 0], 3, 1)  # (count, size, G, P, V)

    # And of each token its chunk, and the place there.
    token = jnp.arange(T)
    row = jnp.minimum(jnp.searchsorted(end, token, side="right"), N - 1)
    position = end[row] - 1 - token if options.reverse else token - start[row]
    inside = (start[row] <= token) & (token < end[row])
    position = jnp.where(inside, position, 0)
    h = h[jnp.minimum(first[row] + position // size, count - 1), position % size]
    return jnp.where(inside[:, None, None, None], h, 0.0)[None], final


def _cut(tokens: Tokens, cut: Any) -> Tokens:
    """(B, T, ...) -> (chunks, R, ..., L, .) by ``cut``, which brings them to (chunks, R, L, ...).
    Past the end of a sequence a token writes nothing and forgets nothing."""
    return Tokens(
        q=jnp.moveaxis(cut(tokens.q), 2, 3),
        k=jnp.moveaxis(cut(tokens.k), 2, 3),
        v=jnp.moveaxis(cut(tokens.v), 2, 4),
        log_i=jnp.moveaxis(cut(tokens.log_i, LOG_I_NOTHING), 2, 4),
        log_f=jnp.moveaxis(cut(tokens.log_f), 2, 4),
    )


def _map(function: Any, *memories: Memory) -> Memory:
    return jax.tree.map(function, *memories)


# ---------------------------------------------------------------- a chunk, and a token


# Only the states between chunks are kept for the backward pass: all else of a chunk would be about
# ten times as much.
@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _chunk(tokens: Tokens, memory: Memory, options: Options) -> tuple[Array, Memory]:
    """h (R, G, P, L, V) of the tokens, and the state after them."""
    C, n, m = memory
    q, k, v = (y.astype(C.dtype) for y in tokens[:3])
    q = q * options.scale
    u, a, m_t = tokens.log_i, tokens.log_f, None
    if m is not None:
        u, a, m_t = gates.stabilize(u, a, m)
    D, w = gates.chunk_weights(u, a)
    decay, writes = w[..., -1], D[..., -1, :]

    scores = gates.weighted(D, _product("rgtk,rgsk->rgts", q, k)[:, :, None])
    reads = w
    if n is not None and m_t is not None:
        nu = scores.sum(-1) + gates.weighted(w, _product("rgtk,rgpk->rgpt", q, n))
        r = gates.inverse_denominator(nu, m_t)
        # Where there is no weight, what comes back, dh_t . v_s, may be beyond the range: see _exp.
        scores, reads = jnp.where(D != 0.0, scores * r[..., None], 0.0), reads * r
    from_state = gates.weighted(reads[..., None], _product("rgtk,rgpkv->rgptv", q, C))
    h = _product("rgpts,rgpsv->rgptv", scores, v) + from_state

    k = gates.weighted(writes[..., None], k[:, :, None])
    C = gates.weighted(decay[..., None, None], C) + _product("rgpsk,rgpsv->rgpkv", k, v)
    if n is not None and m_t is not None:
        n, m = gates.weighted(decay[..., None], n) + k.sum(-2), m_t[..., -1]
    return h, Memory(C, n, m)


def step(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: tuple[Any, ...], options: Options
) -> tuple[Array, Any, Any, Any]:
    """(h, C, n, m) of one token. q, k: (B, G, K). v: (B, H, V). i, f: (B, H). The state's dtypes
    come back."""
    (B, G), (H, V), h_dtype = q.shape[:2], v.shape[1:], v.dtype
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    log_gates = gates.log_gates(i.astype(dtype), f.astype(dtype), options)
    u, a = (y.reshape(B, G, H // G, 1) for y in log_gates)

    def by_group(y: Any) -> Any:
        return None if y is None else y.astype(dtype).reshape(B, G, H // G, *y.shape[2:])

    C, n, m = map(by_group, state)
    q, k, v = q.astype(dtype) * options.scale, k.astype(dtype), v.astype(dtype)
    if m is not None:
        u, a, m = gates.stabilize(u, a, m)
    D, decay = gates.chunk_weights(u, a)

    k = gates.weighted(D[..., 0], k[:, :, None])  # (B, G, P, K)
    C = gates.weighted(decay[..., None], C) + k[..., None] * v.reshape(B, G, H // G, 1, V)
    h = _product("bgk,bgpkv->bgpv", q, C)
    if n is not None and m is not None:
        n, m = gates.weighted(decay, n) + k, m[..., 0]
        h = h * gates.inverse_denominator(_product("bgk,bgpk->bgp", q, n), m)[..., None]
        m = gates.final_gauge(m)

    def back(new: Any, old: Any) -> Any:
        return None if old is None else new.reshape(old.shape).astype(old.dtype)

    after = map(back, (C, n, m), state)
    return h.reshape(B, H, V).astype(h_dtype), *after


def _product(subscripts: str, x: Array, y: Array) -> Array:
    """einsum in full precision, where the program has set none: on GPUs and TPUs JAX's own choice
    for fp32 has 8 to 11 bits."""
    chosen = jax.config.jax_default_matmul_precision
    return jnp.einsum(subscripts, x, y, precision=None if chosen else lax.Precision.HIGHEST)
