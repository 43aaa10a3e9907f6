"""Notebooks as pages, by nbconvert, with the outputs that are stored in them."""

from __future__ import annotations

from pathlib import Path

from nbconvert import MarkdownExporter


def convert(path: Path) -> tuple[str, dict[str, bytes]]:
    """The page in Markdown, and its pictures by their names."""
    page, resources = MarkdownExporter().from_filename(
        str(path), resources={"output_files_dir": f"{path.stem}_files"}
    )
    pictures = {Path(name).name: data for name, data in resources["outputs"].items()}
    note = f"\nThis page is the notebook `docs/notebooks/{path.name}`, run from top to bottom.\n"
    title, _, rest = page.lstrip().partition("\n")
    return f"{title}\n{note}{rest}", pictures
