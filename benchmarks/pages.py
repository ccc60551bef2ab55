"""Writes tables into a page, between comments that name them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

MACHINE = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"


def rows(heads: Sequence[str], cells: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown; numbers with three digits."""

    def text(cell: object) -> str:
        if isinstance(cell, float):
            return f"{cell:.3g}" if cell < 999.5 else f"{cell:,.0f}"
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return [*lines, *(f"| {' | '.join(map(text, row))} |" for row in cells)]


def write_tables(page: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Replaces what lies between ``<!-- NAME -->`` and ``<!-- /NAME -->``, and prints it."""
    text = page.read_text()
    for name, lines in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        first, last = text.index(start) + len(start), text.index(end)
        text = text[:first] + "\n" + "\n".join(lines) + "\n" + text[last:]
        print("\n".join(lines), flush=True)
    page.write_text(text)
