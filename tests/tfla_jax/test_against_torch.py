"""tfla.jax against the recurrence in fp64, by the rule that tfla itself is held to.

The truth is the recurrence of the suite, in torch. JAX may be in another environment, for its
Python may be another one: TFLA_JAX_PYTHON names that interpreter. Without it this one must have
both.
"""

import functools
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import (
    CANCELLING,
    assert_close,
    failures,
    run_one_digit_off,
    run_recurrence,
)
from problems import EXTREME, RESETS, VARIANTS, Case, Inputs, make_inputs, offsets, packed
from torch import Tensor

import tfla

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@functools.cache
def python_with_jax() -> str:
    """The interpreter that has JAX, or a skip that says why there is none."""
    python = os.environ.get("TFLA_JAX_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", "import tfla.jax"], capture_output=True, text=True, env=environment()
    )
    if done.returncode:
        pytest.skip(f"{done.stderr.strip().splitlines()[-1]} TFLA_JAX_PYTHON may name a Python.")
    return python


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def answers(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What worker.py says to all of them, in one process."""
    done = subprocess.run(
        [python_with_jax(), "-W", "error", str(HERE / "worker.py")],
        input=pickle.dumps(calls),
        capture_output=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return pickle.loads(done.stdout)


def tensors(answer: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x).clone() for name, x in answer.items()}


# ---------------------------------------------------------------- a case, on both sides


def call_of(case: Case, inputs: Inputs, c: Tensor | None) -> dict[str, Any]:
    leaves = inputs.leaves()
    fixed = {"dh": inputs.dh.double(), "G_C": inputs.G_C, "G_n": inputs.G_n, "c": c}
    if case.lengths is not None:
        fixed["cu_seqlens"] = offsets(case.lengths)
    return {
        "function": "sequence",
        "leaves": {name: x.double().numpy() for name, x in leaves.items()},
        "dtypes": {name: str(x.dtype).removeprefix("torch.") for name, x in leaves.items()},
        "fixed": {name: x.numpy() for name, x in fixed.items() if x is not None},
        "options": {
            "input_gate": case.input_gate,
            "normalize": case.normalize,
            "scale": case.scale,
            "output_final_state": case.final,
            "reverse": case.reverse,
        },
    }


EXP, EXP_BARE, SIGMOID, SIGMOID_NORMALIZED = (
    dict(input_gate=gate, normalize=normalize) for gate, normalize in VARIANTS
)
REGIMES = [
    *((EXP, gates) for gates in ("ordinary", *EXTREME, *RESETS, "initial", "infinite")),
    *((SIGMOID, gates) for gates in ("ordinary", "f=-1e5", "f=-12", "i=-30", *RESETS, "infinite")),
    *((EXP_BARE, gates) for gates in ("ordinary", "i=+30", "resets 50%", "infinite")),
    *((SIGMOID_NORMALIZED, gates) for gates in ("ordinary", "f=-1000", "i=-95", "swings")),
]
# Cases of one shape, variant and dtype share a compilation, which takes seconds.
CASES = [
    *(Case(T=70, gates=gates, **variant) for variant, gates in REGIMES),
    *(Case(T=T) for T in (0, 1)),
    Case(T=130, K=1, V=33, B=1, state=False, final=False),
    Case(T=70, scale=-0.7, state=False, gates="infinite"),
    packed(0, 70, 0, 3, 0),
    packed(0, 70, 0, 3, 0, gates="resets 50%"),
    packed(64, 1, 130, state=False, final=False, input_gate="sigmoid"),
    Case(T=70, H=4, groups=2, reverse=True),
    packed(0, 33, 0, 37, H=4, groups=2, reverse=True),
    *(
        Case(T=70, gates=gates, dtype=torch.float32, **variant)
        for variant, gates in REGIMES
        if variant in (EXP, SIGMOID) and gates not in ("infinite", "i=+95")
    ),
    # An initial state would weigh e^-95, which XLA takes for 0 in fp32, as all below 2^-126. The
    # yardstick keeps such numbers, and its dn0 is as large as 1e-34 where n . q is near 0.
    Case(T=70, gates="i=+95", state=False, dtype=torch.float32),
    packed(0, 70, 0, 3, dtype=torch.float32),
    Case(T=70, dtype=torch.float16, gate_dtype=torch.float32),
    Case(T=70, H=4, groups=1, dtype=torch.bfloat16, gate_dtype=torch.float32),
]


@pytest.fixture(scope="module")
def solved() -> dict[Case, tuple[Inputs, Any, Tensor | None, dict[str, Tensor]]]:
    """Of each case its inputs, the truth, its gauge and what tfla.jax says."""
    python_with_jax()
    truths = []
    for case in CASES:
        inputs = make_inputs(case)
        truths.append((inputs, *run_recurrence(case, inputs, torch.float64)))
    calls = [call_of(case, inputs, c) for case, (inputs, _, c) in zip(CASES, truths, strict=True)]
    found = zip(CASES, truths, answers(calls), strict=True)
    return {case: (*truth, tensors(answer)) for case, truth, answer in found}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_states_and_gradients(case: Case, solved: dict[Case, Any]) -> None:
    """1e-9 in fp64; below it twice the error of the plain recurrence in the same dtype."""
    inputs, truth, c, ours = solved[case]
    assert all(torch.isfinite(t).all() for t in ours.values()), f"{case}: not finite"
    exact = case.dtype == torch.float64
    plain = None if exact else run_recurrence(case, inputs, case.dtype, c)[0]
    needed = exact or case.gates in CANCELLING
    floor_eps = torch.finfo(case.state_dtype).eps if needed else 0.0
    broken = failures(ours, truth, plain, case, inputs, floor_eps)
    if broken and exact:  # a truth that one digit of the inputs moves by more
        near = run_one_digit_off(case, inputs, c)
        beyond = failures(ours, truth, near, case, inputs, floor_eps)
        beyond = {line.split(":")[0] for line in beyond}
        broken = [line for line in broken if line.split(":")[0] in beyond]
    assert not broken, f"{case}\n" + "\n".join(broken)


# ---------------------------------------------------------------- a token


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("input_gate", "normalize"), VARIANTS)
def test_steps(input_gate: str, normalize: bool | None, dtype: torch.dtype) -> None:
    case = Case(
        T=20, gates="swings", input_gate=input_gate, normalize=normalize, dtype=dtype, final=True
    )
    inputs = make_inputs(case)
    truth, c = run_recurrence(case, inputs, torch.float64)
    call = call_of(case, inputs, c)
    for name in ("output_final_state", "reverse"):
        del call["options"][name]
    (answer,) = answers([call | {"function": "steps"}])
    ours = tensors(answer)
    if "m" in ours:
        size = (ours["m"] - c).exp()
        ours["C"], ours["n"] = ours["C"] * size[..., None, None], ours["n"] * size[..., None]
    plain = run_recurrence(case, inputs, dtype, c)[0] if dtype == torch.float32 else None
    known = {name: truth[name] for name in ("h", "C", "n") if name in truth}
    floor_eps = torch.finfo(dtype).eps  # swings: see CANCELLING
    broken = failures(ours, known, plain, case, inputs, floor_eps)
    assert not broken, "\n".join(broken)


# ---------------------------------------------------------------- one interface


def test_signatures_are_those_of_torch() -> None:
    """A Tensor here is an Array there; names, kinds and defaults are the same."""
    names = ("mlstm", "mlstm_step", "linear_attention")
    (found,) = answers([{"function": "signatures", "names": names}])
    for name in names:
        parameters = inspect.signature(getattr(tfla, name)).parameters.values()
        assert found[name] == [(p.name, p.kind, p.default) for p in parameters]


def zeros(*shape: int, dtype: str = "float32") -> tuple[Any, ...]:
    return "zeros", shape, dtype


def state(*parts: Any) -> tuple[Any, ...]:
    return "State", *parts


X = {
    "q": zeros(2, 5, 2, 4),
    "k": zeros(2, 5, 2, 4),
    "v": zeros(2, 5, 2, 3),
    "i": zeros(2, 5, 2),
    "f": zeros(2, 5, 2),
}
ONE_ROW = {name: ("zeros", (1, *x[1][1:]), x[2]) for name, x in X.items()}
TOKEN = {name: ("zeros", (2, *x[1][2:]), x[2]) for name, x in X.items()}
STATE = state(zeros(2, 2, 4, 3), zeros(2, 2, 4), zeros(2, 2))
FAMILY = {name: X[name] for name in "qkv"}
WRONG = [
    ("mlstm", X | change)
    for change in (
        {"q": 3},
        {"q": [1]},
        {"q": zeros(5, 2, 4)},
        {"v": zeros(2, 5, 2, 4, 1)},
        {"q": zeros(2, 5, 2, 4, dtype="int32")},
        {"k": zeros(2, 5, 2, 4, dtype="float16")},
        {"k": zeros(2, 5, 2, 5)},
        {"q": zeros(2, 5, 0, 4), "k": zeros(2, 5, 0, 4)},
        {"v": zeros(2, 5, 3, 4)},
        {"v": zeros(2, 6, 2, 3)},
        {"i": None},
        {"i": zeros(2, 5, 2, dtype="int32")},
        {"f": zeros(2, 5)},
        {"f": zeros(2)},
        {"input_gate": "tanh"},
        {"input_gate": None},
        {"normalize": 1},
        {"output_final_state": "yes"},
        {"reverse": 1},
        {"scale": "1"},
        {"scale": float("inf")},
        {"backend": "cuda"},
        {"initial_state": 3},
        {"initial_state": state(zeros(2, 2, 4, 3), None, None)},
        {"initial_state": STATE, "input_gate": "sigmoid"},
        {"initial_state": state(zeros(2, 2, 4, 3), zeros(2, 2, 3), zeros(2, 2))},
        {"initial_state": state(zeros(2, 2, 4, 3, dtype="bfloat16"), *STATE[2:])},
        {"cu_seqlens": zeros(3)},
        {"cu_seqlens": zeros(1, dtype="int32")},
        {"cu_seqlens": zeros(3, dtype="int32")},
    )
]
WRONG += [
    ("mlstm", ONE_ROW | {"cu_seqlens": [0, 4]}),
    ("mlstm", ONE_ROW | {"cu_seqlens": [0, 4, 3, 5]}),
    ("mlstm", ONE_ROW | {"cu_seqlens": [0, 2, 5], "initial_state": state(*STATE[1:3], None)}),
    ("linear_attention", FAMILY | {"log_f": zeros(3)}),
    ("linear_attention", FAMILY | {"log_i": 1.0}),
    ("linear_attention", FAMILY | {"normalize": None}),
    ("mlstm_step", TOKEN | {"state": None}),
    ("mlstm_step", TOKEN | {"state": STATE, "q": zeros(2, 1, 2, 4)}),
    ("mlstm_step", TOKEN | {"state": STATE, "i": zeros(2, 1, 2)}),
    ("mlstm_step", TOKEN | {"state": STATE, "inplace": 1}),
    ("mlstm_step", TOKEN | {"state": STATE, "slots": [0, 1]}),
    ("mlstm_step", TOKEN | {"state": STATE, "slots": [0], "inplace": True}),
    ("mlstm_step", TOKEN | {"state": STATE, "slots": [1, 1], "inplace": True}),
    ("mlstm_step", TOKEN | {"state": STATE, "slots": [0, 2], "inplace": True}),
    ("mlstm_step", TOKEN | {"state": state(*STATE[1:3], zeros(2, 2, dtype="bfloat16"))}),
]


def error_of_torch(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    def made(x: Any) -> Any:
        if isinstance(x, tuple):
            kind, *values = x
            if kind == "zeros":
                shape, dtype = values
                return torch.zeros(shape, dtype=getattr(torch, dtype))
            return tfla.State(*map(made, values))
        return torch.tensor(x) if isinstance(x, list) else x

    try:
        getattr(tfla, name)(**{name: made(x) for name, x in arguments.items()})
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {"type": None, "text": ""}


def in_words_of_jax(text: str) -> str:
    for here, there in (
        ("a torch.Tensor", "a jax.Array"),
        ("tfla.State", "tfla.jax.State"),
        ("torch.", ""),
        (" on cpu", ""),
        ("tensor", "array"),
        ("x.transpose(1, 2) makes", "jnp.swapaxes(x, 1, 2) makes"),
        (", without a copy.", "."),
    ):
        text = text.replace(here, there)
    return text


def test_errors_are_those_of_torch() -> None:
    calls = [{"function": "errors", "name": name, "arguments": x} for name, x in WRONG]
    for (name, x), found in zip(WRONG, answers(calls), strict=True):
        expected = error_of_torch(name, x)
        assert found["type"] is not None, (name, x)
        assert found == expected | {"text": in_words_of_jax(expected["text"])}


def test_what_is_not_offered_is_refused() -> None:
    call = {"function": "errors", "name": "mlstm", "arguments": X | {"group": "world"}}
    (found,) = answers([call])
    assert found["type"] == "NotImplementedError" and "jax.shard_map" in found["text"]


def test_kernels_that_cannot_run_here_are_refused_as_for_torch() -> None:
    call = {"function": "errors", "name": "mlstm", "arguments": X | {"backend": "triton"}}
    (found,), expected = answers([call]), error_of_torch("mlstm", X | {"backend": "triton"})
    assert found["type"] == expected["type"] == "RuntimeError"
    start = 'backend="triton" cannot serve this call: '
    assert found["text"].startswith(start) and expected["text"].startswith(start)


# ---------------------------------------------------------------- the example learns the same


class TorchModel:
    """The model of examples/jax_nnx.py, from its weights by name."""

    def __init__(self, weights: dict[str, Tensor], heads: int, depth: int) -> None:
        self.weights, self.heads, self.depth = weights, heads, depth

    def loss(self, text: Tensor) -> Tensor:
        w = self.weights
        x = w["embedding.embedding"][text[:, :-1]]
        for layer in range(self.depth):
            x = self.layer(f"layers.{layer}", x)
        logits = self.norm("norm", x) @ w["head.kernel"]
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    def layer(self, name: str, x: Tensor) -> Tensor:
        w, (B, T, _) = self.weights, x.shape
        y = self.norm(f"{name}.norm", x)
        q, k, v = (y @ w[f"{name}.qkv.kernel"]).view(B, T, 3 * self.heads, -1).chunk(3, 2)
        i, f = (y @ w[f"{name}.gates.kernel"] + w[f"{name}.gates.bias"]).chunk(2, 2)
        h, _ = tfla.mlstm(q, k, v, i, f)
        return x + h.flatten(2) @ w[f"{name}.out.kernel"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.scale"], 1e-6)


def test_the_example_trains_as_it_would_in_torch() -> None:
    """Same weights, same batches, ten steps of Adam in fp64: the losses agree to 1e-9.

    A step multiplies a rounding of 1e-16 by what Adam divides by, at least its eps of 1e-8, and by
    the rate of 3e-3, which is 3e-11 of a weight at most, for a gradient of exactly 0.
    """
    if not has_flax():
        pytest.skip("the example needs flax and optax beside JAX: pip install flax optax")
    rate, depth, heads = 3e-3, 2, 2
    (found,) = answers(
        [
            {
                "function": "training",
                "path": str(ROOT / "examples" / "jax_nnx.py"),
                "sizes": (16, heads, depth),
                "batches": (10, 3, 40),
                "rate": rate,
            }
        ]
    )
    weights = {name: x.clone().requires_grad_() for name, x in tensors(found["weights"]).items()}
    model = TorchModel(weights, heads, depth)
    optimizer = torch.optim.Adam(weights.values(), rate)
    losses = []
    for text in torch.from_numpy(found["batches"]).long():
        optimizer.zero_grad()
        loss = model.loss(text)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    theirs = torch.from_numpy(found["losses"])
    assert theirs.dtype == torch.float64 and theirs[-1] < theirs[0] - 0.1
    assert_close(torch.stack(losses), theirs, 1e-9)


def has_flax() -> bool:
    code = "import flax.nnx, optax"
    return not subprocess.run([python_with_jax(), "-c", code], capture_output=True).returncode
