"""benchmarks/checkouts.py: two versions in one process, compared before they are timed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = "--device cpu --shape 2,40,2,8,12 --repeats 3 --warm 1 --seconds 1".split()


def compare(root: Path, old: Path, new: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "checkouts.py"), str(old), str(new)]
    return subprocess.run([*command, *SMALL, *words], capture_output=True, text=True)


@pytest.fixture
def changed(root: Path, tmp_path: Path) -> Path:
    """A copy of the package whose scores come out a thousandth too large."""
    shutil.copytree(root / "tfla", tmp_path / "tfla", ignore=shutil.ignore_patterns("__pycache__"))
    api = tmp_path / "tfla" / "__init__.py"
    api.write_text(
        api.read_text()
        + "\n_exact = mlstm\n\n\ndef mlstm(q, *rest, **options):\n"
        + "    return _exact(1.001 * q, *rest, **options)\n"
    )
    return tmp_path


def test_a_version_is_itself_and_one_that_is_wrong_has_no_time(
    root: Path, changed: Path, tmp_path: Path
) -> None:
    done = compare(root, root, changed, "--out", str(tmp_path / "out.json"))
    assert done.returncode == 1, done.stderr
    rows = {r["case"]: r for r in json.loads((tmp_path / "out.json").read_text())["rows"]}
    wrong = {name for name, row in rows.items() if row["wrong"]}
    assert wrong == {name for name in rows if not name.startswith("step")}
    for name in wrong:
        what = "off from fp64" if name.startswith("mlstm") else "off from their sequence"
        assert "new: " in rows[name]["wrong"] and what in rows[name]["wrong"]
    for name, row in rows.items():
        times = row["samples_ms"]
        assert not row["reason"], row
        assert bool(times) == (name not in wrong)
        if times:
            assert row["off"] == 0.0 and {len(x) for x in times.values()} == {3}


def test_cases_of_a_file_are_compared_too(root: Path, changed: Path, tmp_path: Path) -> None:
    """What only one version has is a line, and no failure."""
    (tmp_path / "cases.py").write_text(
        "import torch\n"
        "def fresh(tfla, device, dtype):\n"
        "    x = torch.ones(1, 5, 1, 4), -9 * torch.ones(1, 5, 1)\n"
        "    return lambda: tfla.mlstm(x[0], x[0], x[0], x[1], x[1])[0]\n"
        "def gone(tfla, device, dtype):\n"
        "    return tfla._exact\n"
        "CASES = {'my own': fresh, 'my newest': gone}\n"
    )
    words = ["--cases", str(tmp_path / "cases.py"), "--only", "my "]
    done = compare(root, root, changed, *words)
    lines = done.stdout.splitlines()[2:]
    assert done.returncode == 1 and len(lines) == 2, done.stderr
    assert lines[0].startswith("my own") and "the versions differ by 1" in lines[0]
    assert lines[1].startswith("my newest") and "old does not have it" in lines[1]
