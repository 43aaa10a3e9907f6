"""Answers the calls of test_against_torch.py in a process that has JAX, and may have no torch.

    python worker.py < calls > answers

Both are pickles of lists. A call is a dict of plain values and NumPy arrays, an answer a dict of
NumPy arrays; arrays whose dtype NumPy does not know travel in fp64, beside its name.
"""

import inspect
import pickle
import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tfla.jax

jax.config.update("jax_enable_x64", True)

Arrays = dict[str, Any]


def sequence(call: dict[str, Any]) -> Arrays:
    """h, C and n (as C e^(m-c), n e^(m-c)), m, and the gradient of every leaf, of the loss

    L = <dh, h> + <G_C, C exp(m - c)> + <G_n, n exp(m - c)>
    """
    leaves = {name: jnp.asarray(x, call["dtypes"][name]) for name, x in call["leaves"].items()}
    fixed = {name: jnp.asarray(x) for name, x in call["fixed"].items()}
    results, grads = _sequence_and_grads(leaves, fixed, **call["options"])
    out = results | {f"d{name}": x for name, x in grads.items()}
    for name, x in leaves.items():
        assert grads[name].dtype == x.dtype and grads[name].shape == x.shape, name
    assert results["h"].dtype == leaves["v"].dtype
    return {name: np.asarray(x.astype(jnp.float64)) for name, x in out.items()}


def _sequence_and_grads(leaves: Arrays, fixed: Arrays, **options: Any) -> tuple[Arrays, Arrays]:
    @jax.jit
    def run(leaves: Arrays, fixed: Arrays) -> tuple[Arrays, Arrays]:
        grads, results = jax.grad(loss, has_aux=True)(leaves, fixed)
        return results, grads

    def loss(leaves: Arrays, fixed: Arrays) -> tuple[Any, Arrays]:
        state = None
        if "C0" in leaves:
            state = tfla.jax.State(leaves["C0"], leaves.get("n0"), leaves.get("m0"))
        h, end = tfla.jax.mlstm(
            *(leaves[name] for name in "qkvif"),
            initial_state=state,
            cu_seqlens=fixed.get("cu_seqlens"),
            **options,
        )
        results, loss = {"h": h}, (h.astype(jnp.float64) * fixed["dh"]).sum()
        if end is not None:
            C = end.C.astype(jnp.float64)
            if end.m is not None:
                gauge = jnp.exp(end.m - fixed["c"])
                C, n = C * gauge[..., None, None], end.n * gauge[..., None]
                loss += (n * fixed["G_n"]).sum()
                results |= {"n": n, "m": end.m}
            loss += (C * fixed["G_C"]).sum()
            results["C"] = C
        return loss, results

    key = tuple(sorted(options.items()))
    return _compiled.setdefault((key, "c" in fixed, "C0" in leaves), run)(leaves, fixed)


_compiled: dict[Any, Any] = {}


def steps(call: dict[str, Any]) -> Arrays:
    """h and the state of one token after the other."""
    leaves = {name: jnp.asarray(x, call["dtypes"][name]) for name, x in call["leaves"].items()}
    state = tfla.jax.State(leaves["C0"], leaves.get("n0"), leaves.get("m0"))
    before, rows = [x if x is None else x.dtype for x in state], []
    for t in range(leaves["q"].shape[1]):
        tokens = (leaves[name][:, t] for name in "qkvif")
        h, state = tfla.jax.mlstm_step(*tokens, state, **call["options"])
        rows.append(h)
    assert [x if x is None else x.dtype for x in state] == before
    out = {"h": jnp.stack(rows, 1), **{name: x for name, x in zip("Cnm", state, strict=True)}}
    return {name: np.asarray(x.astype(jnp.float64)) for name, x in out.items() if x is not None}


def signatures(call: dict[str, Any]) -> Arrays:
    """Names, kinds and defaults of the parameters of each public function."""
    functions = {name: getattr(tfla.jax, name) for name in call["names"]}
    return {
        name: [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for name, function in functions.items()
    }


def errors(call: dict[str, Any]) -> Arrays:
    """The type and the text of the error of a call, or None where there is none."""

    def made(x: Any) -> Any:
        if isinstance(x, tuple):
            kind, *values = x
            if kind == "zeros":
                shape, dtype = values
                return jnp.zeros(shape, dtype)
            return tfla.jax.State(*map(made, values))
        return np.asarray(x) if isinstance(x, list) else x

    arguments = {name: made(x) for name, x in call["arguments"].items()}
    try:
        getattr(tfla.jax, call["name"])(**arguments)
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {"type": None, "text": ""}


def training(call: dict[str, Any]) -> Arrays:
    """The example's model in fp64: its first weights, its batches and its losses."""
    from flax import nnx

    example = runpy.run_path(call["path"])
    model = example["Model"](*call["sizes"], nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(model, nnx.Param)))
    model.embedding.dtype = jnp.float64  # it rounds to the dtype that it was made with
    weights = {
        ".".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    batches = example["pieces"](bytes(range(200)) * 3, *call["batches"])
    losses = example["train"](model, batches, call["rate"])
    return {"weights": weights, "batches": np.asarray(batches), "losses": np.asarray(losses)}


def main() -> None:
    answers = []
    functions = (sequence, steps, signatures, errors, training)
    known = {function.__name__: function for function in functions}
    for call in pickle.load(sys.stdin.buffer):
        answers.append(known[call["function"]](call))
    assert "triton" not in sys.modules
    pickle.dump(answers, sys.stdout.buffer)


if __name__ == "__main__":
    main()
