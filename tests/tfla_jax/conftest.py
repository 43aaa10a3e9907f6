"""What tests of tfla.jax share. They run where JAX is, with torch or without:

    python -m pytest --confcutdir tests/tfla_jax tests/tfla_jax

and each file says why it is skipped where it cannot run.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import jax

    importlib.import_module("tfla.jax")
except ImportError as error:
    WHY_NOT: str | None = str(error)
    if "tfla.jax needs" not in WHY_NOT:
        WHY_NOT = f'tfla.jax needs JAX 0.11 or later ({error}): pip install "tfla[jax]"'
else:
    WHY_NOT = None
    jax.config.update("jax_num_cpu_devices", 4)  # before the first array: for shard_map
    # Compilation takes nearly all of the time. What programs run, test_against_torch.py runs.
    jax.config.update("jax_disable_most_optimizations", True)

# These have torch in their process, and JAX in another one if need be.
OF_TORCH = {"test_against_torch.py"}


class Skipped(pytest.Module):
    """A file that cannot be imported here."""

    reason = ""

    def collect(self) -> Any:
        pytest.skip(self.reason)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    reason = WHY_NOT
    if module_path.name in OF_TORCH:
        has_torch = importlib.util.find_spec("torch") is not None
        reason = None if has_torch else "compares with torch, which is not installed here"
    if reason is None:
        return None
    skipped = Skipped.from_parent(parent, path=module_path)
    skipped.reason = reason
    return skipped


@pytest.fixture
def x64() -> Iterator[None]:
    """fp64, which JAX has where a program asks for it."""
    with jax.enable_x64(True):
        yield
