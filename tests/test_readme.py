"""The README is short, says first what matters most, and its program runs."""

import re
from pathlib import Path

from pages import ROOT, blocks, execute

PAGE = ROOT / "README.md"
README = PAGE.read_text("utf-8")


def test_program_runs(tmp_path: Path) -> None:
    programs = blocks(PAGE, "python")
    assert programs
    execute(PAGE, *programs)


def test_is_read_in_five_minutes() -> None:
    """At most 900 words, its programs and tables among them."""
    assert len(README.split()) <= 900


def test_first_program_comes_early() -> None:
    """What it is and the recurrence, how to install it, then a program of at most eight lines."""
    places = [
        README.index(x) for x in ("C_t =", "## Install", "import torch, tfla", "gpu-length.png")
    ]
    assert places == sorted(places)
    lines = [line for line in blocks(PAGE, "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 8


def test_make_targets_exist() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)\b", text, re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"demo", "test", "docs"} <= named <= targets


def test_table_of_gpus_is_that_of_the_documentation() -> None:
    table = re.search(r"^\| GPU \|.*\n(?:\|.*\n)+", README, re.MULTILINE)
    assert table
    assert table[0] in (ROOT / "docs/performance/other_gpus.md").read_text("utf-8")
