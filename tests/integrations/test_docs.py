"""What the documentation says of other packages is true: its programs run where they are."""

import importlib
import warnings
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks, execute, peers

import tfla.integrations.mlstm_kernels

PAGES = [page for page in DOCS if peers("\n".join(blocks(page, "python")))]


@pytest.mark.peers
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_programs_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = blocks(page, "python")
    needed = peers("\n".join(programs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn about when they are imported
        for name in sorted(needed):
            try:
                importlib.import_module(name)
            except ImportError:
                pytest.skip(f"needs {name}, of the extra peers")
        if needed & {"xlstm", "mlstm_kernels"}:
            pytest.importorskip("mlstm_kernels.torch.chunkwise")
    monkeypatch.chdir(tmp_path)
    try:
        execute(page, *programs)
    finally:
        tfla.integrations.mlstm_kernels.uninstall()


def test_pages_of_other_packages_have_programs() -> None:
    """Each bridge has its program."""
    names = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    assert {"migrate/transformers.md", "migrate/mlstm_kernels.md"} <= names
