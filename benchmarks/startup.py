"""Measures the CPU time of a verb's start, and of a run up to its first step by part. Writes into docs/performance.md.

`python -m benchmarks.startup --help` names the options. Needs the small shapes world's shards (`make shards`).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from benchmarks.pages import MACHINE, rows, write_tables

EMF = ("-m", "emf_lightning")
EXPERIMENT = "experiments/shapes/demo.yaml"
LEAST = """
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
LightningCLI(LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True)
"""
COMMANDS = {
    "`import torch`": ("-c", "import torch"),
    "`emf --help`": (*EMF, "--help"),
    **{f"`emf {verb} --help`": (*EMF, verb, "--help") for verb in ("report", "score", "export", "cache", "encoders")},
    f"`emf plan --config {EXPERIMENT}`": (*EMF, "plan", "--config", EXPERIMENT),
    "`emf fit --help`": (*EMF, "fit", "--help"),
    "a `LightningCLI` of two lines, `fit --help`": ("-c", LEAST, "fit", "--help"),
}
PARTS = (
    "imports, parsing, network",
    "data, the parent's images, scores before the first step",
    "first batch, self-check",
    "first step",
)


class Stamps(Callback):
    """Prints the process's CPU seconds at the end of each part, and ends the process after the first step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def _stamp(self) -> None:
        self.times.append(time.process_time())

    def setup(self, *args: Any, **options: Any) -> None:
        self._stamp()

    def on_train_start(self, *args: Any) -> None:
        self._stamp()

    def on_train_batch_start(self, *args: Any) -> None:
        self._stamp()

    def on_train_batch_end(self, *args: Any) -> None:
        self._stamp()
        print("stamps", *self.times, flush=True)
        os._exit(0)  # without final scores


def run(command: tuple[str, ...], sources: str | None = None) -> tuple[float, str]:
    """CPU seconds of a Python process and its children, and what it printed."""
    path = os.pathsep.join(part for part in (sources, os.environ.get("PYTHONPATH"), ".") if part)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def first_step() -> list[float]:
    """CPU seconds of the parts of a run up to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        stamps = ["--trainer.default_root_dir", folder, "--trainer.callbacks+", "benchmarks.startup.Stamps"]
        _, said = run((*EMF, "fit", "--config", EXPERIMENT, *stamps))
    times = [float(part) for part in next(line for line in said.splitlines() if line.startswith("stamps")).split()[1:]]
    return [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="src of an earlier checkout, for a column of its own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    sources = {"CPU s": None} | ({"before, CPU s": options.before} if options.before else {})
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    parts: list[list[float]] = []
    for turn in range(options.rounds + 1):  # the first turn fills the file system's cache
        for about, command in COMMANDS.items():
            for column, where in sources.items():
                used, _ = run(command, where)
                if turn:
                    seconds[about, column].append(used)
        if turn:
            parts.append(first_step())
    cells = [
        [about, *(statistics.median(seconds[about, column]) for column in reversed(sources))] for about in COMMANDS
    ]
    means = [statistics.median(column) for column in zip(*parts, strict=True)]
    how = f"`python -m benchmarks.startup`: medians of {options.rounds} rounds, in turn, bytecode compiled; {MACHINE}."
    write_tables(
        options.out,
        {
            "STARTS": [how, "", *rows(["command", *reversed(sources)], cells)],
            "FIRST": rows(["part", "CPU s"], [*zip(PARTS, means, strict=True), ("sum", sum(means))]),
        },
    )


if __name__ == "__main__":
    main()
