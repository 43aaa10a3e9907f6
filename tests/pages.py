"""The programs and other blocks of code in Markdown pages."""

import re
from pathlib import Path


def blocks(page: Path, language: str) -> list[str]:
    """What stands between ```language and ```; without a language: language=""."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def peers(program: str) -> set[str]:
    """The packages of others that a program needs beside torch and tfla."""
    return set(re.findall(r"^from (transformers|xlstm)\b", program, re.MULTILINE))


def execute(program: str, page: Path) -> None:
    """Run a program of a page as a script."""
    exec(compile(program, str(page), "exec"), {"__name__": "__main__"})
