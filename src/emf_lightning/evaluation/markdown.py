"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SEPARATORS = {"": "---", "l": ":---", "c": ":---:", "r": "---:"}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "") -> str:
    """A Markdown table, without a final newline.

    Args:
        columns: headings.
        rows: cells of each row, as many as ``columns``.
        align: ``l``, ``c`` or ``r`` for each column; the renderer decides for columns that it does not reach.

    Raises:
        ValueError: for a row of another length than ``columns``, or another letter in ``align``.
    """
    if len(align) > len(columns) or not set(align) <= set("lcr"):
        raise ValueError(f"align must be at most {len(columns)} letters of l, c, r, got {align!r}")
    separators = [SEPARATORS[letter] for letter in align] + [SEPARATORS[""]] * (len(columns) - len(align))
    lines = [_line(columns), f"|{'|'.join(separators)}|"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"rows: {list(row)} has {len(row)} cells, the table has {len(columns)} columns")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
