"""What surrounds the functions: imports, versions, the example, and the names of mlstm_kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from arrays import Problem, assert_close, true_size

import tfla.jax
from tfla.jax.mlstm_kernels import get_mlstm_kernel, get_mlstm_step_kernel

ROOT = Path(__file__).resolve().parent.parent.parent


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_needs_neither_torch_nor_triton() -> None:
    code = """
import sys
for name in ("torch", "triton", "flax", "mlstm_kernels"):
    sys.modules[name] = None  # importing it raises ImportError
import tfla.jax, tfla.jax.mlstm_kernels
from jax.numpy import ones
h, _ = tfla.jax.mlstm(*[ones((1, 3, 1, 2))] * 3, *[ones((1, 3, 1))] * 2)
print(h.shape)
"""
    assert run(code).strip() == "(1, 3, 1, 2)"
    assert run("import sys, tfla.jax; print(*sys.modules.keys() & {'torch', 'triton'})") == "\n"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sys.modules['jaxlib'] = None", "needs JAX 0.11 or later"),
        ("import jaxlib; jaxlib.__version__ = '0.10.2'", "got jaxlib 0.10.2"),
    ],
)
def test_a_jax_that_is_missing_or_too_old_is_refused(setting: str, words: str) -> None:
    code = f"""
import sys
{setting}
try:
    import tfla.jax
except ImportError as error:
    print(error)
"""
    assert words in run(code) and "pip install" in run(code) and "tfla[jax]" in run(code)


def test_the_examples_of_the_docstrings_run() -> None:
    import doctest

    from tfla.jax import api, mlstm_kernels

    with jax.enable_x64(False):
        found = [doctest.testmod(module) for module in (api, mlstm_kernels)]
    assert all(result.failed == 0 for result in found)
    assert [result.attempted > 0 for result in found] == [True, True]


def test_the_programs_of_the_page_run() -> None:
    """Those of docs/migrate/jax.md, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/migrate/jax.md").read_text(), re.S)
    assert len(blocks) == 2
    run("\n".join(blocks))


def test_the_example_learns() -> None:
    """A model that knew the frequencies of bytes alone would stay above 3 nats."""
    pytest.importorskip("flax", reason="the example needs flax and optax")
    pytest.importorskip("optax", reason="the example needs flax and optax")
    done = subprocess.run(
        [sys.executable, "-W", "error", "examples/jax_nnx.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.findall(r"(\d\.\d\d) (?:at first|after)", done.stdout))
    assert first > 5 and last < 2.5, done.stdout


# ---------------------------------------------------------------- mlstm_kernels


def head_first(x: Any) -> tuple[Any, ...]:
    return tuple(jnp.swapaxes(y, 1, 2) for y in x)


def test_chunkwise_kernels_by_their_names() -> None:
    problem = Problem(G=4, dtype=jnp.float32)
    x, state = problem.operands(), problem.state()
    expected, end = tfla.jax.mlstm(*x, initial_state=state, output_final_state=True)
    for name in ("chunkwise--triton_xl_chunk", "chunkwise--triton_limit_chunk"):
        kernel = get_mlstm_kernel(name)
        h, (c, n, m) = kernel(*head_first(x), *state, return_last_states=True, chunk_size=128)
        assert_close(jnp.swapaxes(h, 1, 2), expected, 0.0)
        assert_close((c, n, m), tuple(end), 0.0)
        assert kernel(*head_first(x)).shape == h.shape
        low = kernel(*head_first(x), autocast_kernel_dtype=jnp.bfloat16)
        assert low.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="together"):
        kernel(*head_first(x), state.C)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_kernel_with_sigmoid_gates(normalize: bool) -> None:
    """It has no m: its states are in the gauge 0."""
    problem = Problem(G=4, dtype=jnp.float32)
    x, (C, n, _) = problem.operands(), problem.state()
    kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk_siging")
    state = (
        tfla.jax.State(C, n, jnp.zeros(C.shape[:2])) if normalize else tfla.jax.State(C, None, None)
    )
    expected, end = tfla.jax.mlstm(
        *x, input_gate="sigmoid", normalize=normalize, initial_state=state, output_final_state=True
    )
    h, after = kernel(*head_first(x), C, n, return_last_states=True, normalize=normalize)
    assert_close(jnp.swapaxes(h, 1, 2), expected, 0.0)
    assert_close(list(after), true_size(end) if normalize else [end.C, n], 1e-6)


def test_the_step_kernel() -> None:
    problem = Problem(G=4, T=1, dtype=jnp.float32)
    (q, k, v, i, f), state = (y[:, 0] for y in problem.operands()), problem.state()
    expected, end = tfla.jax.mlstm_step(q, k, v, i, f, state)
    C, n, m = state
    step = get_mlstm_step_kernel("triton")
    h, (c, n, m) = step(q, k, v, i[..., None], f[..., None], C, n, m[..., None])
    assert_close((h, c, n, m[..., 0]), (expected, *end), 0.0)


def test_other_names_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="chunkwise--triton_xl_chunk_siging.*'parallel--native'"):
        get_mlstm_kernel("parallel--native")
    with pytest.raises(ValueError, match="name must be 'triton'; got 'native'"):
        get_mlstm_step_kernel("native")
