"""What every test shares. Nothing here imports Triton, so a test decides itself how it runs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

# One thread a worker and a child: those of many workers would wait for each other's cores without
# end, and the tensors of tests are so small that a second thread costs more than it gains. It is
# set before torch is imported, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from commands import Call  # noqa: E402

torch.set_num_threads(1)
os.environ.setdefault("MPLBACKEND", "Agg")

# The same random problems on every machine: a failure in CI is a failure at home. Raise the number
# of them with --hypothesis-profile=long.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("default")

# Triton reads the variable when a kernel is decorated: a process interprets all kernels or none.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["interpreter"]


def pytest_report_header() -> str:
    if INTERPRETED:
        return "kernels: run in Triton's interpreter"
    return "kernels: not run here, tests/interpreter is left out; it needs TRITON_INTERPRET=1"


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
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that breaks no line and shows no colour."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], wide: None) -> Call:
    """Exit status, standard output and standard error of the command, in this process."""
    from tfla import cli

    def run(line: str, *more: str) -> tuple[int, str, str]:
        status = cli.run_command([*line.split(), *more])
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library's sources, 60 KB."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
