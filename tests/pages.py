"""The programs and other blocks of code in Markdown pages."""

import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PROJECT = sorted(ROOT.glob("*.md"))
# Packages of others, whose programs run where they are installed.
PEERS = "transformers|xlstm|mlstm_kernels|fla|mamba_ssm|jax|torchao|kernels"


def blocks(page: Path, language: str) -> list[str]:
    """What stands between ```language and ```, in lists too; without a language: language=""."""
    found: list[str] = []
    fence = None
    lines: list[str] = []
    for line in page.read_text("utf-8").splitlines():
        match = re.fullmatch(r"( *)```(.*)", line)
        if match and fence is None:
            fence, lines = match, []
        elif match and fence:
            if fence[2] == language:
                found.append("".join(f"{x.removeprefix(fence[1])}\n" for x in lines))
            fence = None
        else:
            lines.append(line)
    return found


def peers(program: str) -> set[str]:
    """The packages of others that a program needs beside torch and tfla."""
    return set(re.findall(rf"^ *(?:from|import) ({PEERS})\b", program, re.MULTILINE))


def execute(page: Path, *programs: str) -> None:
    """Run the programs of a page, one after the other, as its reader would type them."""
    module = ModuleType("page")
    sys.modules["page"] = module  # classes of a program are looked up there
    try:
        for program in programs:
            exec(compile(program, str(page), "exec"), module.__dict__)
    finally:
        del sys.modules["page"]
