"""`emf compare`: several experiments trained for the same time, in one table and one figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from emf_lightning.evaluation.comparison import Run, comparison_figure, comparison_table

CALIBRATION = 24
"""Optimiser steps by which an experiment's speed is found."""

SHORT = 100
"""Runs of fewer steps have no warm-up, and no scores on the way."""

SUMMARY = "summary.json"
TABLE, FIGURE = "comparison.md", "comparison.png"


def compare(
    experiments: list[Path],
    out: Path,
    minutes: float = 30.0,
    seeds: list[int] | None = None,
    steps: int | None = None,
    images_per_prompt: int = 8,
) -> None:
    """Train experiments of the shapes world for the same time, and compare what they draw.

    Each experiment first takes 24 steps to tell how long one is; then `minutes` of training are as many steps, so that
    its learning-rate schedule comes to its end. Sampling is not counted. Runs that are complete are not repeated: an
    interrupted call is given again, and a longer list adds to the table.

    Args:
        experiments: YAML files, all of the shapes world and from the same parent.
        out: folder of the runs, the table and the figure.
        minutes: of training, for each experiment and seed.
        seeds: one run of each experiment for each.
        steps: optimiser steps instead of minutes.
        images_per_prompt: by which distances and diversity are taken.
    """
    for experiment in experiments:
        if not experiment.is_file():
            raise ValueError(f"experiments: no file {experiment}")
    if minutes <= 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    runs = []
    for experiment in experiments:
        for seed in seeds if seeds is not None else [0]:
            folder = out / experiment.stem / f"seed{seed}"
            if not (folder / SUMMARY).is_file():
                count = steps or _steps_in(experiment, out / experiment.stem / "calibration", minutes)
                print(f"compare: {experiment}, seed {seed}: {count} steps", flush=True)
                _fit(experiment, folder, seed, count, images_per_prompt)
            runs.append(Run.read(experiment.stem, folder))
            (out / TABLE).write_text(comparison_table(runs) + "\n")  # after each run: what there is, is shown
            comparison_figure(runs).savefig(out / FIGURE, dpi=150)
    print(comparison_table(runs))
    print(f"table: {out / TABLE} | figure: {out / FIGURE}")


def _steps_in(experiment: Path, folder: Path, minutes: float) -> int:
    """Optimiser steps that ``minutes`` of training are."""
    if not (folder / SUMMARY).is_file():
        _fit(experiment, folder, 0, CALIBRATION, images_per_prompt=0)
    step_seconds = json.loads((folder / SUMMARY).read_text())["step_seconds"]
    return max(round(60 * minutes / step_seconds), CALIBRATION)


def _fit(experiment: Path, folder: Path, seed: int, steps: int, images_per_prompt: int) -> None:
    """Trains in a process of its own, whose peak memory is then the run's, and raises where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    suite = {"class_path": "ShapesSuite", "init_args": {"world": "small"}}
    summary = {"suite": suite, "images_per_prompt": images_per_prompt}
    config: dict[str, Any] = {
        "base": str(experiment.resolve()),
        "seed_everything": seed,
        "trainer": {
            "max_steps": steps,
            "val_check_interval": steps if steps < SHORT else steps // 8,  # the rhythm of the scores
            "limit_val_batches": 0,  # validation errors mean something else for each method
            "logger": {"init_args": {"save_dir": str(folder.parent), "name": "", "version": folder.name}},
            "callbacks+": [{"class_path": "RunSummary", "init_args": summary}],
        },
    }
    path = folder / "compared.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "emf_lightning", "fit", "--config", str(path)]
    if steps < SHORT:
        command += ["--model.init_args.scheduler.init_args.warmup", "0"]  # an experiment's own may be longer than that
    done = subprocess.run(command, check=False)
    if done.returncode != 0 or not (folder / SUMMARY).is_file():
        raise ValueError(
            f"compare: training {experiment} ended with status {done.returncode}; what it said stands above"
        )
