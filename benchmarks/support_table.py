"""Measures which strategy, derivative, precision and compilation go together, on two CPU processes (gloo).

Writes the table of docs/results/devices.md: for each combination the relative error of the first training gradient
against one process in fp32 with the exact derivative, on the same samples. `--no-compile` leaves out the compiled
column, which takes half a minute a cell.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import ranks  # noqa: E402  the runs are those of the tests

from emf_lightning.flow.derivative.base import Derivative  # noqa: E402
from emf_lightning.flow.derivative.finite_difference import FiniteDifference  # noqa: E402
from emf_lightning.flow.derivative.forward_mode import ForwardMode, Fused  # noqa: E402

DOCUMENT = ROOT / "docs" / "results" / "devices.md"
MARKS = ("<!-- measured by benchmarks/support_table.py -->", "<!-- end of what was measured -->")
STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "one process": dict,
    "DDP": ranks.replicated,
    "FSDP2": lambda: ranks.sharded(2),
    "FSDP2, `gather_once`": lambda: ranks.sharded(2),
}
DERIVATIVES: dict[str, Callable[[], Derivative]] = {
    "`ForwardMode`": ForwardMode,
    "`ForwardMode(fast=False)`": lambda: ForwardMode(fast=False),
    "`Fused`": Fused,
    # the network reads 10 t: between the best steps for t and for 1000 t
    "`FiniteDifference(1e-3)`": lambda: FiniteDifference(1e-3),
}
COLUMNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, checkpointing": {"net": {"gradient_checkpointing": True}},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "fp32, compiled": {"net": {"compile": True}},
}
NOT_RUN = "not run"


def cell(out: Path, rank: int, places: list[ranks.Place], strategy: str, derivative: str, column: str) -> str | None:
    """The error of one combination, on rank 0; None on the others."""
    torch._dynamo.reset()
    model = {"derivative": DERIVATIVES[derivative](), "gather_once": "once" in strategy}
    try:
        ranks.train(out, "cell", places, max_steps=1, model=model, **COLUMNS[column], **STRATEGIES[strategy]())
    except Exception as error:  # every combination gets its cell
        return f"refused: {type(error).__name__}" if rank == 0 else None
    if rank:
        return None
    measured, exact = (torch.load(out / f"{name}.pt")["gradient"] for name in ("cell", "exact"))
    error = sum((measured[name] - exact[name]).square().sum() for name in exact)
    return f"{float((error / sum(gradient.square().sum() for gradient in exact.values())).sqrt()):.0e}"


def measure(rank: int, out: Path, strategies: list[str], columns: list[str]) -> None:
    """Leaves the cells of ``strategies`` in ``cells-<first strategy>.json``."""
    single = strategies == ["one process"]
    places = ranks.JOINED if single else ranks.OWN[rank]
    if single:
        ranks.train(out, "exact", places, max_steps=1)
    cells = {}
    for strategy, derivative, column in product(strategies, DERIVATIVES, columns):
        cells["|".join((strategy, derivative, column))] = cell(out, rank, places, strategy, derivative, column)
    if rank == 0:
        (out / f"cells-{len(strategies)}.json").write_text(json.dumps(cells))


def table(cells: dict[str, str]) -> str:
    """The cells in Markdown."""
    rows = [f"| strategy | derivative | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for strategy, derivative in product(STRATEGIES, DERIVATIVES):
        found = [cells.get("|".join((strategy, derivative, column)), NOT_RUN) for column in COLUMNS]
        rows.append(f"| {strategy} | {derivative} | {' | '.join(found)} |")
    return "\n".join(rows)


def main() -> None:
    """Runs all cells and writes them into the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled column out")
    columns = [name for name in COLUMNS if not parser.parse_args().no_compile or "compiled" not in name]
    pairs = [name for name in STRATEGIES if name != "one process"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ranks.run(1, lambda rank, out: measure(rank, out, ["one process"], columns), out)
        ranks.run(2, lambda rank, out: measure(rank, out, pairs, columns), out)
        cells = {k: v for file in out.glob("cells-*.json") for k, v in json.loads(file.read_text()).items()}
    text = DOCUMENT.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{table(cells)}\n\n{MARKS[1]}{after}")
    print(table(cells))


if __name__ == "__main__":
    main()
