"""Trains every objective from the shapes world's parent, over some seeds, and writes one table of their scores.

At equal steps, and at equal training time: as many steps as each takes in the time of MeanFlow's. Runs that are done
are not made again, so it may be stopped and started at will. `python -m benchmarks.objectives --help` names the
options.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emf_lightning.callbacks.score_history import ScoreHistory, ScoreRecord

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "benchmarks" / "objectives.yaml"
REFERENCE = "emf"
OBJECTIVES = {
    "flow_matching_continued": "flow matching, continued",
    REFERENCE: "MeanFlow, the teacher's velocity",
    "meanflow_released": "MeanFlow as EMF's release has it",
    "meanflow_paper": "MeanFlow as EMF's paper has it",
    "improved_meanflow": "improved MeanFlow",
    "alpha_flow": "AlphaFlow",
    "split_meanflow": "SplitMeanFlow",
    "decoupled": "decoupled MeanFlow",
    "transition": "transition (TiM)",
}
STEPS = (1, 2, 4, 30)
SPEED_STEPS = 40
CLOSE = 0.04
"""Share of the steps below which equal time is equal steps."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        experiment: below experiments/shapes.
        seed: of everything.
        steps: optimiser steps.
        out: where all runs are.
    """

    experiment: str
    seed: int
    steps: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / self.experiment / f"steps{self.steps}-seed{self.seed}"

    def scores(self) -> dict[int, ScoreRecord]:
        """Network steps -> the final score; empty where the run is not done."""
        records = ScoreHistory.read_if_there(self.folder / "shapes" / "scores.jsonl").records
        return {record.steps: record for record in records if record.stage == "final" and record.step == self.steps}

    def train(self, *options: str) -> None:
        """Trains, from its last checkpoint where there is one."""
        last = self.folder / "checkpoints" / "last.ckpt"
        fit(
            self.experiment,
            f"--seed_everything={self.seed}",
            f"--trainer.max_steps={self.steps}",
            f"--trainer.logger.init_args.save_dir={self.out}",
            f"--trainer.logger.init_args.name={self.experiment}",
            f"--trainer.logger.init_args.version=steps{self.steps}-seed{self.seed}",
            *options,
            *([f"--ckpt_path={last}"] if last.is_file() else []),
        )


def fit(experiment: str, *options: str) -> None:
    command = [sys.executable, "-m", "emf_lightning", "fit", "--config", f"experiments/shapes/{experiment}.yaml"]
    subprocess.run([*command, "--config", str(SETTINGS), *options], cwd=ROOT, check=True)


def seconds_a_step(experiment: str, out: Path, attempt: int) -> float:
    """Of the second half of a few steps: the first sets things up."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    version = f"attempt{attempt}"  # a mere number would become version_<number>
    folder = out / "speed" / experiment / version
    if not folder.exists():
        fit(
            experiment,
            f"--trainer.max_steps={SPEED_STEPS}",
            "--trainer.limit_val_batches=0",
            "--trainer.callbacks=TrainingLog",
            f"--trainer.logger.init_args.save_dir={out}",
            f"--trainer.logger.init_args.name=speed/{experiment}",
            f"--trainer.logger.init_args.version={version}",
        )
    events = EventAccumulator(str(folder)).Reload().Scalars("train/step_seconds")
    half, whole = (event.value for event in events[-2:])  # averages from the start
    return 2 * whole - half


def speeds(names: Sequence[str], out: Path, attempts: int) -> dict[str, float]:
    """Seconds a step; all take turns, and what else the machine does can only add to them."""
    measured: dict[str, list[float]] = {name: [] for name in names}
    for attempt in range(attempts):
        for name in names:
            measured[name].append(seconds_a_step(name, out, attempt))
    return {name: min(values) for name, values in measured.items()}


def equal_time(names: Sequence[str], seconds: dict[str, float], steps: int) -> dict[str, int]:
    """Steps of each in the time of the reference's ``steps``, in tens; the same number where they are close."""
    planned = {name: steps * seconds[REFERENCE] / seconds[name] for name in names}
    return {name: steps if abs(n / steps - 1) < CLOSE else 10 * round(n / 10) for name, n in planned.items()}


def row(runs: Sequence[Run]) -> list[str] | None:
    """Scores over those seeds that are done: mean and standard error, over prompts where it is one seed."""
    done = [scores for run in runs if len(scores := run.scores()) == len(STEPS)]
    if not done:
        return None
    cells = []
    for n in STEPS:
        values = [scores[n].scores.overall for scores in done]
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
        else:
            error = done[0][n].scores.standard_error
        cells.append(f"{statistics.mean(values):.3f} ± {error:.3f}")
    return [str(runs[0].steps), str(len(done)), *cells]


def table(plan: dict[str, Sequence[Run]], seconds: dict[str, float]) -> list[str]:
    head = ["objective", "seconds a step / MeanFlow's", "steps", "seeds", *(f"{n}-step" for n in STEPS)]
    lines = [head, ["---"] * len(head)]
    for name, runs in plan.items():
        ratio = f"{seconds[name] / seconds[REFERENCE]:.2f}" if seconds else "-"
        lines.append([OBJECTIVES[name], ratio, *(row(runs) or [str(runs[0].steps), "0", *"----"])])
    return [f"| {' | '.join(line)} |" for line in lines]


def report(out: Path, plans: dict[str, dict[str, Sequence[Run]]], seconds: dict[str, float]) -> str:
    lines = [
        "# The objectives, from the same parent",
        "",
        "Written by `make objectives`: each experiment of `experiments/shapes/` with the settings of",
        "`benchmarks/objectives.yaml` on top, so that parent, network, data, optimiser, averages and scoring are the",
        "same and the objective is not. Overall score of 600 images of the small shapes world without guidance; ± is",
        "the standard error over seeds, over prompts where there is one seed. A step is one batch.",
    ]
    for title, plan in plans.items():
        lines += ["", f"## {title}", "", *table(plan, seconds)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of each objective at equal steps")
    parser.add_argument("--attempts", type=int, default=3, help="at measuring the time of a step; the fastest counts")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "objectives")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "objectives.md")
    parser.add_argument("--report", action="store_true", help="train nothing, write what there is")
    options = parser.parse_args()
    names = [REFERENCE, *(name for name in options.objectives if name != REFERENCE)]
    names.sort(key=list(OBJECTIVES).index)
    out = options.out.resolve()

    measured = all((out / "speed" / name / "attempt0").exists() for name in names)
    seconds = {} if options.report and not measured else speeds(names, out, 1 if options.report else options.attempts)
    steps = dict.fromkeys(names, options.steps)
    plans = {
        title: {name: [Run(name, seed, count[name], out) for seed in options.seeds] for name in names}
        for title, count in (
            ("Equal steps", steps),
            ("Equal training time", equal_time(names, seconds, options.steps) if seconds else {}),
        )
        if count
    }
    for seed in range(0 if options.report else len(options.seeds)):
        for plan in plans.values():
            for runs in plan.values():
                if not runs[seed].scores():
                    runs[seed].train()
                options.document.write_text(report(out, plans, seconds))
    text = report(out, plans, seconds)
    options.document.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
