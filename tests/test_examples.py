"""Every example runs as its reader would run it, and what it shows is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


def quickstart(out: str) -> None:
    """The parts equal the whole, and all gradients are there."""
    differences = [float(x) for x in re.findall(r"relative difference (\S+)", out)]
    assert len(differences) == 2
    assert max(differences) < 1e-5
    assert re.search(r"norms of the gradients: q \S+, k \S+, v \S+, i \S+, f \S+", out)
    assert "nan" not in out


def digits(out: str) -> None:
    """Both layers learn; one guess in ten would be right by chance."""
    accuracies = [float(x) for x in re.findall(r"(\S+)%", out)]
    assert len(accuracies) == 2
    assert min(accuracies) > 85


def ragged(out: str) -> None:
    """Both layers are timed on both kinds of batches. Which is faster is the machine's matter."""
    assert [float(x) > 0 for x in re.findall(r"(\S+) ms", out)] == [True] * 4


CHECKS = {"quickstart": quickstart, "digits": digits, "ragged": ragged}
OF_JAX = {"jax_nnx"}  # run by tests/tfla_jax


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem not in OF_JAX], ids=lambda path: path.stem
)
def test_example_shows_what_it_says(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    CHECKS[path.stem](done.stdout)
