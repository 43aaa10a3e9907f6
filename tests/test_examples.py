"""Every example runs as its reader would run it, and what it shows is true."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


@functools.cache
def run(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_and_says_something(path: Path) -> None:
    assert run(path).strip()


def test_quickstart_shows_that_the_parts_equal_the_whole() -> None:
    out = run(next(path for path in EXAMPLES if path.stem == "quickstart"))
    differences = [float(x) for x in re.findall(r"relative difference (\S+)", out)]
    assert len(differences) == 2
    assert max(differences) < 1e-5
    assert re.search(r"norms of the gradients: q \S+, k \S+, v \S+, i \S+, f \S+", out)
    assert "nan" not in out


def test_digits_are_learned() -> None:
    out = run(next(path for path in EXAMPLES if path.stem == "digits"))
    accuracies = [float(x) for x in re.findall(r"(\S+)%", out)]
    assert len(accuracies) == 2
    assert min(accuracies) > 85
