"""Docstrings as mkdocstrings reads them: their one example is a section with a program."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Makes of a docstring's "Example:" the section "Examples:" that Google's style knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)
