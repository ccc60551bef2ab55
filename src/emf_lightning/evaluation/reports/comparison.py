"""Methods side by side: scores, distances to real images and cost of runs, in tables and a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.geneval.task_scores import SHARE
from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.files import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Column = tuple[str, str]
"""Metric and ``SamplingConfig.title``."""

REAL = "real"
"""Key in ``summary.json`` of the distances between two sets of real images."""


@dataclass(frozen=True)
class Run:
    """One run of one method.

    Attributes:
        method: name of the run's experiment.
        summary: content of ``summary.json``, which ``RunSummary`` wrote.
        scores: column -> the final score and its standard error.
        curves: column -> (optimiser step, score) points during training.
        units: metric -> its unit.
    """

    method: str
    summary: dict[str, Any]
    scores: dict[Column, tuple[float, float]]
    curves: dict[Column, list[tuple[int, float]]]
    units: dict[str, str]

    @classmethod
    def read(cls, method: str, folder: Path) -> Run:
        """The run in a run directory.

        Raises:
            ValueError: where a file is missing, or no metric was computed.
        """
        try:
            summary = read_json(folder / "summary.json", "delete the run's folder and repeat")
            files = sorted(folder.glob("*/scores.jsonl"))
            rows = [(file.parent.name, json.loads(line)) for file in files for line in file.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"compare: {folder} holds no complete run ({error}); delete it and repeat") from error
        scores: dict[Column, tuple[float, float]] = {}
        curves: dict[Column, list[tuple[int, float]]] = {}
        units: dict[str, str] = {}
        for suite, row in rows:
            title = SamplingConfig.from_row(row).title
            for metric, unit, score, deviation in _numbers(suite, row):
                units[metric] = unit
                curves.setdefault((metric, title), []).append((row["step"], score))
                if row["stage"] == "final":
                    scores[metric, title] = score, deviation
        if not scores:
            raise ValueError(
                f"compare: {folder} has no metric to compare; give the experiments' FewStepSampling `benchmarks` or "
                "`extra_metrics`"
            )
        return cls(method, summary, scores, curves, units)

    def distances(self) -> dict[str, dict[str, Any]]:
        """``SamplingConfig.title`` -> distances to real images; empty for a summary without distances."""
        found = self.summary.get("distribution", {})
        return {SamplingConfig.from_row({"label": k, **row}).title: row for k, row in found.items() if k != REAL}


def comparison(groups: Mapping[str, Sequence[Run]]) -> str:
    """A Markdown page: for each group of runs, by its title, tables of scores and cost, and of distances."""
    lines = ["# Methods side by side", "", *ABOUT]
    for title, runs in groups.items():
        tables = [methods_table(runs), distances_table(runs)]
        lines += ["", f"## {title}"]
        for head, *rows in tables if any(run.distances() for run in runs) else tables[:1]:
            lines += ["", markdown_table(head, rows)]
    return "\n".join([*lines, ""])


ABOUT = (
    "Written by `emf compare`. Scores are overall ones, at 1, 2, ... network steps; ± is the standard error over",
    "training seeds where there are several (all sample the same prompts), else over prompts. Minutes are of training",
    "alone, without evaluation. KID and FID are taken between features of a fixed random network: compare them with",
    "each other only. Diversity is the mean distance between images of one prompt, divided by that of real images.",
    "All numbers are means over seeds.",
)


def methods_table(runs: Sequence[Run]) -> list[list[str]]:
    """A heading, then a row for each method: scores at each step count, and cost, as means over seeds."""
    columns = list(dict.fromkeys(column for run in runs for column in run.scores))
    rows = [["method", *_headings(columns), "minutes", "training steps", "GB", "seeds"]]
    for method, seeds in _by_method(runs).items():
        seconds, steps, memory = (_mean([run.summary[n] for run in seeds]) for n in ("seconds", "steps", "memory_gb"))
        scores = [_score(seeds, column) for column in columns]
        rows.append([method, *scores, f"{seconds / 60:.1f}", f"{steps:.0f}", f"{memory:.2f}", str(len(seeds))])
    return rows


def distances_table(runs: Sequence[Run]) -> list[list[str]]:
    """A heading, then a row for each method and step count: NFE, distances to real images, diversity, over seeds."""
    rows = [["method", "steps", "NFE", "KID x 1000 (random features)", "FID (random features)", "diversity"]]
    measured = [run for run in runs if run.distances()]
    for method, seeds in _by_method(measured).items():
        of_seeds = [run.distances() for run in seeds]
        for title, first in of_seeds[0].items():
            rows.append([method, title, str(first["nfe"]), *_distances([found[title] for found in of_seeds])])
    rows.append(["real images", "", "", *_distances([run.summary["distribution"][REAL] for run in measured])])
    return rows


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Score against training time, a panel for each step count and a line for each method (its first seed)."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(column for run in runs for column in run.curves))
    units = {metric: unit for run in runs for metric, unit in run.units.items()}
    figure = Figure(figsize=(4.2 * len(columns), 3.6), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    firsts = list({run.method: run for run in reversed(runs)}.values())[::-1]
    for panel, column, heading in zip(panels, columns, _headings(columns), strict=True):
        for number, run in enumerate(firsts):
            points = np.array(run.curves.get(column, []), float).reshape(-1, 2)
            minutes = points[:, 0] * run.summary["step_seconds"] / 60
            panel.plot(minutes, points[:, 1], label=run.method, color=f"C{number}", marker=".")
        panel.set(title=heading, xlabel="minutes of training", ylabel=units[column[0]])
        if units[column[0]] == SHARE:
            panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {method: [run for run in runs if run.method == method] for method in dict.fromkeys(r.method for r in runs)}


def _numbers(suite: str, row: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """Name, unit, score and error of each metric in a line of ``scores.jsonl``."""
    if row.get("scores"):
        error = row["scores"]["standard_error"]
        yield suite, SHARE, row["overall"], math.nan if error is None else error
    for name, found in row.get("metrics", {}).items():
        values = found["values"]
        score, error = (math.nan if value is None else value for value in (values.get("score"), values.get("se")))
        yield name if name == suite else f"{suite}: {name}", found["unit"], score, error


def _headings(columns: Sequence[Column]) -> list[str]:
    """The columns' sampling, with the metric before it where there are several."""
    several = len({metric for metric, _ in columns}) > 1
    return [f"{metric}, {title}" if several else title for metric, title in columns]


def _score(runs: Sequence[Run], column: Column) -> str:
    scores = [run.scores[column] for run in runs if column in run.scores]
    if not scores:
        return ""
    values = [score for score, _ in scores]
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else scores[0][1]
    return f"{_mean(values):.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _distances(of_seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{_mean([found[name] for found in of_seeds]):.2f}" for name in ("kid", "fid", "diversity")]


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean(np.array(values, float))) if values else float("nan")  # null in a file is NaN
