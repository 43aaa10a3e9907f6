"""docs/integrations.md is true, and so is what the README says of other packages: the programs run
where the packages are that they import."""

import importlib
import re
import warnings
from pathlib import Path

import pytest
from pages import blocks, execute, peers

import tfla.integrations.mlstm_kernels

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/integrations.md"


PROGRAMS = blocks(PAGE, "python")
BRIDGES = [program for program in blocks(ROOT / "README.md", "python") if peers(program)]


@pytest.mark.peers
@pytest.mark.parametrize("program", PROGRAMS + BRIDGES, ids=lambda p: p.splitlines()[-1][:30])
def test_program_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn about when they are imported
        for name in peers(program):
            try:
                importlib.import_module(name)
                importlib.import_module("mlstm_kernels.torch.backend_module")
                importlib.import_module("mlstm_kernels.torch.chunkwise")
            except ImportError:
                pytest.skip(f"needs {name} and mlstm_kernels, of the extra peers")
    monkeypatch.chdir(tmp_path)
    try:
        execute(program, PAGE)
    finally:
        tfla.integrations.mlstm_kernels.uninstall()


def test_each_bridge_has_its_program() -> None:
    assert [peers(program) for program in PROGRAMS] == [
        {"transformers"},
        {"transformers"},
        {"xlstm"},
        set(),
    ]
    assert [peers(p) for p in BRIDGES] == [{"transformers"}, {"transformers"}, {"xlstm"}]


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()) if "://" not in link]
    assert links and all((PAGE.parent / link).is_file() for link in links)
