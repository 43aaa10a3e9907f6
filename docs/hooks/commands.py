"""The reference of the command `tfla`: its own help, read from the command itself."""

from __future__ import annotations

import re
from typing import Any

import typer

from tfla import cli


def plain(text: str | None) -> str:
    """Help without the markup of the terminal."""
    text = re.sub(r"\[/?bold\]", "`", text or "")
    text = re.sub(r"\\(\[)", r"\1", text)
    return " ".join(text.replace("<", "&lt;").replace("*", r"\*").split())


def options(command: Any) -> list[str]:
    lines = []
    for parameter in command.params:
        words = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "argument":
            words = f"`{parameter.name.upper()}`"
        shown = plain(getattr(parameter, "help", None))
        default = parameter.default
        simple = isinstance(default, (int, float, str)) and not isinstance(default, bool)
        if getattr(parameter, "show_default", False) and simple and default != "":
            shown += f" Default: `{default}`."
        lines.append(f"{words}\n:   {shown or '-'}\n")
    return lines


def sections(name: str, command: Any, level: int) -> list[str]:
    lines = [f"{'#' * level} `{name}`", "", plain(command.help), ""]
    if epilog := plain(getattr(command, "epilog", None)):
        lines += [epilog, ""]
    below = getattr(command, "commands", {})
    if not below:
        lines += options(command)
    for word, other in below.items():
        if not other.hidden:
            lines += sections(f"{name} {word}", other, level + 1)
    return lines


def page() -> str:
    cli.complete(cli.app)
    command = typer.main.get_command(cli.app)
    lines = sections("tfla", command, 1)
    lines[0] = "# The command tfla"
    return "\n".join(lines)
