"""tfla.jax.mlstm as a layer of Flax NNX: a small model learns to continue this very file.

It needs JAX, Flax and Optax (pip install "tfla[jax]" flax optax), and no torch.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tfla.jax

WIDTH, HEADS, DEPTH = 64, 2, 2
STEPS, BATCH, LENGTH, RATE = 150, 8, 128, 3e-3


class Layer(nnx.Module):
    """x + out(mlstm(q, k, v, i, f)), all five linear in the normalised x (B, T, width)."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        # Input gates begin small and forget gates open: 0.95 a token at first.
        self.gates = nnx.Linear(
            width,
            2 * heads,
            bias_init=lambda key, shape, dtype: jnp.repeat(jnp.array([-1.0, 3.0], dtype), heads),
            rngs=rngs,
        )
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, T, width = x.shape
        y = self.norm(x)
        q, k, v = jnp.split(self.qkv(y).reshape(B, T, 3 * self.heads, -1), 3, axis=2)
        i, f = jnp.split(self.gates(y), 2, axis=2)
        h, _ = tfla.jax.mlstm(q, k, v, i, f)
        return x + self.out(h.reshape(B, T, width))


class Model(nnx.Module):
    """Logits (B, T, 256) of the byte behind each of bytes (B, T)."""

    def __init__(self, width: int, heads: int, depth: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(256, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.embedding(text)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_of(model: Model, text: jax.Array) -> jax.Array:
    """Nats a byte on text (B, T + 1)."""
    logits = model(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def train(model: Model, batches: jax.Array, rate: float) -> list[float]:
    """One step of Adam for each of batches (steps, B, T + 1); the loss before each of them."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, text: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, text)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, text)) for text in batches]


def pieces(text: bytes, steps: int, batch: int, length: int) -> jax.Array:
    """(steps, batch, length + 1) bytes from random places of a text."""
    starts = jax.random.randint(jax.random.key(1), (steps, batch, 1), 0, len(text) - length)
    return jnp.array(list(text))[starts + jnp.arange(length + 1)]


if __name__ == "__main__":
    model = Model(WIDTH, HEADS, DEPTH, nnx.Rngs(0))
    text = Path(__file__).read_bytes()
    losses = train(model, pieces(text, STEPS, BATCH, LENGTH), RATE)
    print(f"nats a byte: {losses[0]:.2f} at first, {losses[-1]:.2f} after {STEPS} steps")
