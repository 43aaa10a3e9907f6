"""The notebooks run from top to bottom, and what is stored in them is what such a run leaves."""

import json
import os
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


# Those that train take longer; .ci/run asks for them.
SLOW = {"time_series", "hybrid_block"}
PARAMETERS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("notebook", PARAMETERS)
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """Its cells as one script; they assert what their text says."""
    script = tmp_path / f"{notebook.stem}.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code(notebook)), "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "template"},  # plots are made, and shown nowhere
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_in_the_order_of_the_cells(notebook: Path) -> None:
    """`make notebooks` stores them; none is an error."""
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds and "error" not in kinds
