"""The notebooks run from top to bottom, and what is stored in them is what such a run leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def code(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """Its cells as one script; they assert what their text says."""
    script = tmp_path / f"{notebook.stem}.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code(notebook)), "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
