"""Sphinx extension: docstrings are plain text with sections, lists and ``literals``.

Docstrings hold formulas such as |u - c|^2 or z_, which reStructuredText would read as substitutions and references.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_LITERAL = re.compile(r"(``.+?``|`[^`]+`)")
_MARKUP = re.compile(r"[*|]|_(?=\W|$)")
_STARRED = re.compile(r"^\s*\*{1,2}\w+:")  # `*args:` in a section, which napoleon escapes


def _escape(line: str) -> str:
    if _STARRED.match(line) or line.lstrip().startswith((">>>", "... ")):
        return line
    parts = _LITERAL.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = part if part.startswith("``") else f"`{part}`"
            if parts[i + 1][:1].isalnum():  # the plural of a class
                parts[i] += "\\ "
        else:
            parts[i] = _MARKUP.sub(lambda mark: "\\" + mark[0], part)
    return "".join(parts)


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [_escape(line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
