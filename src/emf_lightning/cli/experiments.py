"""`emf experiments`: the experiments that this package ships, with the question and the cost of each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap

from emf_lightning.cli.shipped import SHIPPED

_NAMES = re.compile(r"`([\w/]+)\.yaml`")


@dataclass(frozen=True)
class Entry:
    """A row of a table in experiments/README.md: the experiments that it names, and its cells by column."""

    names: list[str]
    cells: dict[str, str]


def entries() -> Iterator[tuple[str, list[Entry]]]:
    """(title, entries) of each table in experiments/README.md, in its order."""
    title, columns, rows = "", list[str](), list[Entry]()
    for line in [*(SHIPPED / "README.md").read_text(encoding="utf-8").splitlines(), ""]:
        if found := re.match(r"\*\*(.+?)\*\*", line):
            title = found[1]
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not columns:
                columns = cells
            elif names := _NAMES.findall(cells[0]):
                rows.append(Entry(names, dict(zip(columns, cells, strict=True))))
        elif columns:
            yield title, rows
            columns, rows = [], []


def experiments() -> None:
    """List the experiments that this package ships, with the question and the cost of each.

    `emf fit --config NAME` trains one; `emf new DIR --experiment NAME` copies one, to change it.
    """
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    for title, rows in entries():
        print(f"{title}\n")
        for entry in rows:
            texts = [text for column, text in entry.cells.items() if column in ("question", "effect", "contents")]
            cost = [f"Cost: {entry.cells['cost']}."] if "cost" in entry.cells else []
            names = wrap(", ".join(entry.names), width - 2)
            lines = wrap(" ".join([*texts, *cost]).replace("`", ""), width - 6)
            print(*(f"  {line}" for line in names), *(f"      {line}" for line in lines), sep="\n")
        print()
    print(f"Files, with the results to expect: {SHIPPED}")
