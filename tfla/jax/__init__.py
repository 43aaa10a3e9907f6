"""tfla for JAX: the mLSTM, its decode step and the linear-attention family, as functions of arrays.

    h, state = tfla.jax.mlstm(q, k, v, i, f, output_final_state=True)
    h, state = tfla.jax.mlstm_step(q, k, v, i, f, state)
    h, state = tfla.jax.linear_attention(q, k, v, log_f)

They have the arguments, shapes, meaning and errors of ``tfla.mlstm``, ``tfla.mlstm_step`` and
``tfla.linear_attention``, and work under ``jax.jit``, ``grad``, ``vmap``, ``lax.scan``,
``checkpoint`` and ``shard_map``. On NVIDIA GPUs they run the kernels that torch gets, where Triton
is installed. ``import tfla.jax`` imports neither torch nor Triton;
docs/migrate/jax.md has a table of what is there. ``tfla.jax.mlstm_kernels`` has the functions of
mlstm_kernels.
"""

try:
    import jaxlib
except ImportError as error:
    raise ImportError('tfla.jax needs JAX 0.11 or later: pip install "tfla[jax]"') from error

_needed = (0, 11)
if tuple(int(part) for part in jaxlib.__version__.split(".")[:2]) < _needed:
    raise ImportError(
        f"tfla.jax needs jax and jaxlib 0.11 or later; got jaxlib {jaxlib.__version__}. With "
        'Python 3.12 or later: pip install --upgrade "tfla[jax]"'
    )

from tfla.jax.api import linear_attention, mlstm, mlstm_step  # noqa: E402
from tfla.jax.checks import State  # noqa: E402

__all__ = ["State", "linear_attention", "mlstm", "mlstm_step"]
