"""What every test shares. Nothing here imports Triton, so a test decides itself how it runs."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")

# The same random problems on every machine: a failure in CI is a failure at home. Raise the number
# of them with --hypothesis-profile=long.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def interpreter_env() -> dict[str, str]:
    """The environment of a subprocess in which Triton interprets its kernels on the CPU.

    Triton reads the variable when a kernel is decorated, hence the subprocess.
    """
    return {**os.environ, "TRITON_INTERPRET": "1"}
