"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of headings and rows, without a final newline.

    Raises:
        ValueError: for a row of another length than ``columns``.
    """
    lines = [list(columns)]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"rows: {list(row)} has {len(row)} cells, the table has {len(columns)} columns")
        lines.append(list(row))
    heading, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([heading, f"|{'---|' * len(columns)}", *body])
