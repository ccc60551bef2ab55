"""`emf report`: several runs in one table and one figure."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from emf_lightning.cli.runs import CONFIG, find_run
from emf_lightning.evaluation.geneval.prompt_suite import TITLES
from emf_lightning.evaluation.reports.figures import save_figure
from emf_lightning.evaluation.reports.report import REPORT, Report, ReportRow
from emf_lightning.evaluation.reports.report_figures import steps_figure, training_figure
from emf_lightning.evaluation.score_history import ScoreHistory

Curves = dict[str, dict[int, list[tuple[int, float]]]]
Levels = dict[str, dict[str, dict[str, float]]]


def report(runs: list[Path], out: Path = Path("report")) -> None:
    """Put several runs into one table and one figure: score by network steps, and by training: `emf report RUN RUN`.

    Args:
        runs: runs with the report.json of `emf test` or the scores.jsonl of training: their directories, `runs/NAME`
            for its newest version, or one of their checkpoints.
        out: directory for report.json, report.md, steps.png and, for suites watched in training, training-SUITE.png.
    """
    if not runs:
        raise ValueError("runs: give the directories of one or more runs")
    runs = [_directory(run) for run in runs]
    resolved = [run.resolve() for run in runs]
    if twice := next((run for run, path in zip(runs, resolved, strict=True) if resolved.count(path) > 1), None):
        raise ValueError(f"runs: {twice} is given more than once; name each run once")
    if out.resolve() in resolved or (out / CONFIG).is_file():
        raise ValueError(f"out: {out} is a run's directory, whose own {REPORT} would be replaced; give another folder")
    names = _names(runs)
    rows: list[ReportRow] = []
    all_levels: list[Levels] = []
    curves: dict[tuple[str, str], Curves] = {}
    units: dict[str, str] = {}
    unscored: list[str] = []
    states: dict[str, str] = {}
    for run, name in zip(runs, names, strict=True):
        if not run.is_dir():
            raise ValueError(f"runs: no directory {run}")
        histories = {path.parent.name: ScoreHistory.read(path, "runs") for path in sorted(run.glob("*/scores.jsonl"))}
        if empty := next((suite for suite, history in histories.items() if not history.records), None):
            raise ValueError(f"runs: {run / empty}/scores.jsonl holds no scores; delete it, or leave the run out")
        of_training = [row for suite, history in histories.items() for row in _rows(name, suite, history)]
        if (run / REPORT).is_file():
            found = Report.read(run / REPORT)
            rows += [replace(row, run=name) for row in found.rows]
            rows += [row for row in of_training if _pair(row) not in map(_pair, found.rows)]
            all_levels += [found.levels]
            states |= _state(name, found, max((row.step for row in of_training), default=0))
        elif of_training:
            rows += of_training
        elif histories:
            unscored.append(name)
        else:
            raise ValueError(f"runs: {run} has no scores; `emf fit` and `emf test` write them into a run's directory")
        for suite, history in histories.items():
            units |= {metric: scores.unit for record in history.records for metric, scores in record.results.items()}
            for metric, lines in _curves(history).items():
                curves.setdefault((suite, metric), {})[name] = lines
    if not rows:
        raise ValueError(
            f"runs: {', '.join(unscored)} drew prompts without any metric, so there is nothing to tabulate; look at "
            "their contact sheets, or give FewStepSampling extra_metrics"
        )
    about = {"runs": ", ".join(str(run) for run in runs)}
    about |= {"runs without any metric": ", ".join(unscored)} if unscored else {}
    about |= states
    everything = Report(tuple(rows), about, _common_levels(all_levels))
    everything.write(out)
    save_figure(steps_figure(everything), out / "steps.png")
    for (suite, metric), of_run in curves.items():
        nonempty = {run: lines for run, lines in of_run.items() if lines}
        if not nonempty:
            continue
        title = TITLES.get(metric, suite if metric == suite else f"{suite}: {metric}")
        file = f"training-{suite}.png" if metric == suite else f"training-{suite}-{metric}.png"
        save_figure(training_figure(nonempty, title, units[metric]), out / file)
    print(everything.markdown())
    print(f"report.md, report.json and figures: {out}")


def _pair(row: ReportRow) -> tuple[str, str]:
    """The benchmark whose images a row scores, and its metric."""
    return row.benchmark or row.metric, row.metric


def _state(name: str, found: Report, trained: int) -> dict[str, str]:
    """A remark on a run's `emf test` that is not complete, or of a step before the training's last scores."""
    step = max(row.step for row in found.rows)
    parts = [f"{found.about['so far']} so far"] if "so far" in found.about else []
    parts += [f"step {step:,}, before the training's last scores at step {trained:,}"] if trained > step else []
    return {f"`emf test` of {name}": "; ".join(parts)} if parts else {}


def _directory(run: Path) -> Path:
    """The directory that holds a run's scores; ``run`` itself where none is found, for the caller's errors."""
    if (run / REPORT).is_file() or any(run.glob("*/scores.jsonl")):
        return run
    try:
        return find_run(run).directory
    except ValueError:
        return run


def _names(runs: list[Path]) -> list[str]:
    """Short names that tell the runs apart: their paths without the common prefix."""
    paths = [run.resolve() for run in runs]
    common = paths[0].parent.parent if len(paths) == 1 else os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def _common_levels(all_levels: list[Levels]) -> Levels:
    """The ceilings and chances that are equal in all reports that have them: of the same prompts and detector."""
    metrics = dict.fromkeys(metric for levels in all_levels for metric in levels)
    found = {metric: [levels[metric] for levels in all_levels if metric in levels] for metric in metrics}
    return {metric: levels[0] for metric, levels in found.items() if all(other == levels[0] for other in levels)}


def _rows(run: str, suite: str, history: ScoreHistory) -> list[ReportRow]:
    """A row for each metric and sampling config of the training: its last scores."""
    return [
        ReportRow(
            run=run,
            metric=name,
            title=TITLES.get(name, found.title) + ("" if name == suite else f", images of {TITLES.get(suite, suite)}"),
            weights="averaged",
            step=record.step,
            steps=record.sampling.steps,
            guidance_scale=record.sampling.guidance_scale or 1.0,
            nfe=record.nfe,
            images=record.images,
            seeds=(),
            scores=found.values,
            seconds=record.seconds,
            benchmark=suite,
        )
        for record in history.latest()
        for name, found in record.results.items()
    ]


def _curves(history: ScoreHistory) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """Metric -> network steps -> (optimiser step, main number) of the main guidance scale, for two points or more."""
    curves: dict[str, dict[int, list[tuple[int, float]]]] = {}
    configs = {record.sampling.steps: record.sampling for record in history.records if record.sampling.is_main}
    for config in configs.values():
        for record in history.curve(config):
            for name, found in record.results.items():
                curves.setdefault(name, {}).setdefault(config.steps, []).append((record.step, found.score))
    return {
        name: {steps: points for steps, points in lines.items() if len(points) > 1} for name, lines in curves.items()
    }
