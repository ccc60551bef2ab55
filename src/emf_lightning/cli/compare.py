"""`emf compare`: tables and a figure of experiments trained for the same time or the same steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import yaml

from emf_lightning.cli.parsing.experiment_files import settings_of
from emf_lightning.cli.parsing.experiment_loggers import holds_settings
from emf_lightning.cli.shipped import named_experiments
from emf_lightning.cli.trainings import check_seeds, fit, run_in_parallel
from emf_lightning.evaluation.reports.comparison import Run, comparison, comparison_figure
from emf_lightning.evaluation.reports.figures import save_figure
from emf_lightning.files import read_json, write_atomic

CALIBRATION = 40
"""Optimiser steps that measure an experiment's speed."""

SHORT = 100
"""Runs of fewer steps have no warm-up, and no scores during training."""

TOLERANCE = 0.04
"""Relative difference in steps below which runs of the same steps also count as runs of the same time."""

SUMMARY = "summary.json"
TABLE, FIGURE = "comparison.md", "comparison.png"


@dataclass(frozen=True)
class Training:
    """One run of a comparison.

    Attributes:
        experiment: experiment file.
        overlays: files on top of the experiment.
        steps: optimiser steps.
        seed: seed of all random numbers.
        folder: run directory.
        images_per_prompt: images of each prompt for distances and diversity; 0 leaves these out.
        trial: whether the run only measures speed, without scores.
    """

    experiment: Path
    overlays: tuple[Path, ...]
    steps: int
    seed: int
    folder: Path
    images_per_prompt: int = 0
    trial: bool = False

    @property
    def done(self) -> bool:
        return (self.folder / SUMMARY).is_file()

    @property
    def file(self) -> Path:
        """Configuration file of this run."""
        return self.folder / "compared.yaml"

    @property
    def record(self) -> Path:
        """The settings of the experiment's and the overlays' files, as this run was trained with them."""
        return self.folder / "trained.yaml"

    def check(self) -> None:
        """Raises a ``ValueError`` where the folder holds a run of other files, or of files that have changed."""
        if self.file.is_file() and not holds_settings(self.file, self._config()):
            raise ValueError(f"out: {self.folder} holds a run of other files or settings; choose another folder")
        if self.record.is_file() and not holds_settings(self.record, self._contents()):
            raise ValueError(
                f"out: {self.experiment}, or a file that it builds on, has changed since {self.folder} was trained; "
                "choose another folder, or delete this one"
            )

    def train(self, jobs: int = 1) -> None:
        """Trains in a separate process, so that its peak memory is the run's, unless the run is done."""
        if self.done:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, self._config())
        write_atomic(self.record, self._contents())
        # an experiment's own warm-ups may be longer than a short run
        warmups = [f"--{place}.warmup" for place in _warmups(self._settings())] if self.steps < SHORT else []
        fit(["--config", str(self.file), *(part for name in warmups for part in (name, "0"))], self.folder, jobs)
        if not self.done:
            raise ValueError(f"the training in {self.folder} ended without {SUMMARY}; its output tells why")

    def _settings(self) -> list[Any]:
        """The settings of all files, oldest first."""
        return settings_of((self.experiment, *self.overlays))

    def _contents(self) -> str:
        return yaml.safe_dump(self._settings(), sort_keys=False)

    def _config(self) -> str:
        """Content of the configuration file of this run."""
        summary = {"class_path": "RunSummary", "init_args": {"images_per_prompt": self.images_per_prompt}}
        short = self.steps < SHORT
        callbacks = {"callbacks": ["TrainingLog", summary]} if self.trial else {"callbacks+": [summary]}
        config: dict[str, Any] = {
            "base": [str(file.resolve()) for file in (self.experiment, *self.overlays)],
            "seed_everything": self.seed,
            "trainer": {
                "max_steps": self.steps,
                # scores and checkpoints: a run killed after a checkpoint at its last step would lose its last scores
                "val_check_interval": self.steps if short else self.steps // 8 + 1,
                "limit_val_batches": 0,  # validation losses of different methods do not compare
                "default_root_dir": str(self.folder.parent),
                **callbacks,
            },
        }
        return yaml.safe_dump(config, sort_keys=False)


def _warmups(settings: Sequence[Any]) -> list[str]:
    """Places of the arguments of all learning-rate schedules that have a warm-up, in files that apply in this order."""

    def merged(old: Any, new: Any) -> Any:
        if not isinstance(old, dict) or not isinstance(new, dict):
            return new
        if new.get("class_path", old.get("class_path")) != old.get("class_path"):
            return new  # another class, without the old one's arguments
        return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}

    def places(node: Any, place: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            schedule = "warmup" in value if isinstance(value, dict) else False
            if key == "init_args" and (schedule or str(node.get("class_path")).endswith("WarmupCosine")):
                yield f"{place}.init_args"
            yield from places(value, f"{place}.{key}")

    whole: Any = reduce(merged, settings, {})
    return list(places(whole.get("model"), "model"))


def compare(
    experiments: list[Path],
    out: Path,
    minutes: float | None = None,
    steps: int | None = None,
    seeds: list[int] | None = None,
    overlays: list[Path] | None = None,
    jobs: int = 1,
    images_per_prompt: int = 8,
) -> None:
    """Train experiments on one data set for the same time, the same steps, or both, and compare their images.

    The tables have the metrics of the experiments' FewStepSampling, and for the shapes world distances to real images.
    For the same time, each experiment first takes 40 steps to measure the time of one; `minutes` of training are then a
    number of steps, so that the learning-rate schedule reaches its end. Sampling is not counted. Repeat an interrupted
    call: complete runs are kept, others resume from their last checkpoint, and a longer list adds to the tables.

    Args:
        experiments: YAML files or names as in `emf experiments`, all on one data set, with the same metrics and from
            the same parent.
        out: folder of the runs, the tables and the figure.
        minutes: minutes of training, for each experiment and seed; 30 where neither minutes nor steps are given.
        steps: optimiser steps of each run.
        seeds: seeds; each experiment runs once with each.
        overlays: YAML files that apply on top of each experiment, e.g. experiments/parts/short_comparison.yaml.
        jobs: trainings at the same time, each with its share of the CPU's threads.
        images_per_prompt: images of each prompt for distances and diversity.
    """
    experiments = list({file.resolve(): file for file in named_experiments("experiments", experiments)}.values())
    names = [file.stem for file in experiments]
    if twice := next((file for file in experiments if names.count(file.stem) > 1), None):
        raise ValueError(f"experiments: two have the name {twice.stem}, also of their folders in out; rename a file")
    on_top = tuple(named_experiments("overlays", overlays or []))
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if minutes is None and steps is None:
        minutes = 30.0
    all_seeds = list(dict.fromkeys(seeds if seeds is not None else [0]))
    if not experiments or not all_seeds:
        raise ValueError(f"{'seeds' if experiments else 'experiments'}: the list is empty; give at least one")
    check_seeds(all_seeds)
    if images_per_prompt < 0 or images_per_prompt == 1:
        raise ValueError(f"images_per_prompt must be 2 or more, or 0 for no distances, got {images_per_prompt}")

    def trainings(counts: dict[Path, int]) -> list[Training]:
        return [
            Training(file, on_top, count, seed, out / file.stem / f"steps{count}-seed{seed}", images_per_prompt)
            for seed in all_seeds
            for file, count in counts.items()
        ]

    groups: dict[str, list[Training]] = {}
    if steps is not None:
        groups[f"The same steps: {steps}"] = trainings(dict.fromkeys(experiments, steps))
    if minutes is not None:
        counts = _steps_in(minutes, steps, experiments, on_top, out, jobs)
        groups[f"The same time: {minutes:g} minutes of training"] = trainings(counts)
    # one seed of both groups after the other; runs that are in both groups once
    todo = dict.fromkeys(t for seed in all_seeds for group in groups.values() for t in group if t.seed == seed)
    for _ in _train([*todo], jobs):
        _write(out, groups)  # after each run, so that partial results are visible
    print((out / TABLE).read_text())
    print(f"tables: {out / TABLE} | figure: {out / FIGURE}")


def _train(trainings: Sequence[Training], jobs: int) -> Iterator[None]:
    """Checks all folders, then trains the unfinished runs; yields after each."""
    for training in trainings:
        training.check()
    yield from run_in_parallel([partial(training.train, jobs) for training in trainings], jobs)


def _steps_in(
    minutes: float, steps: int | None, experiments: Sequence[Path], overlays: tuple[Path, ...], out: Path, jobs: int
) -> dict[Path, int]:
    """Experiment -> optimiser steps in ``minutes`` of training; ``steps`` where that is nearly the same number."""
    trials = [Training(e, overlays, CALIBRATION, 0, out / e.stem / "calibration", trial=True) for e in experiments]
    for _ in _train(trials, jobs):
        pass
    counts = {}
    for trial in trials:
        step_seconds = read_json(trial.folder / SUMMARY, "delete its folder and repeat").get("step_seconds")
        if not isinstance(step_seconds, (int, float)) or step_seconds <= 0:
            raise ValueError(f"{trial.folder / SUMMARY}: step_seconds is {step_seconds}; delete its folder and repeat")
        count = max(round(60 * minutes / step_seconds), CALIBRATION)
        counts[trial.experiment] = steps if steps is not None and abs(count / steps - 1) < TOLERANCE else count
    return counts


def _write(out: Path, groups: dict[str, list[Training]]) -> None:
    """Writes the tables, and the figure of the last group, of the finished runs."""
    shown = {}
    for title, group in groups.items():
        if runs := [Run.read(training.experiment.stem, training.folder) for training in group if training.done]:
            shown[title] = runs
    write_atomic(out / TABLE, comparison(shown))
    save_figure(comparison_figure([*shown.values()][-1]), out / FIGURE, dpi=150)
