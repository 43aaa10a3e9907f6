"""What every test shares. Nothing here imports Triton, so a test decides itself how it runs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread a worker and a child: those of many workers would wait for each other's cores without
# end, and the tensors of tests are so small that a second thread costs more than it gains. It is
# set before torch is imported, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Whatever number of threads a test computes with, the next one starts with one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Run the tests of a file where Triton interprets its kernels on the CPU: it reads the variable
    when a kernel is decorated, hence a process of its own, whose report is the caller's."""

    def run(path: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        print(done.stdout[-6000:])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    return run
