"""Methods side by side: a table and a figure of what runs of the same length scored, drew and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.reports.figures import step_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL = "real"
"""What a summary calls real pictures held against others."""


@dataclass(frozen=True)
class Run:
    """One run of one method.

    Attributes:
        method: its experiment's name.
        summary: what ``RunSummary`` wrote.
        scores: label -> the final overall score and its standard error.
        curve: label -> (optimiser steps, overall score) while training.
    """

    method: str
    summary: dict[str, Any]
    scores: dict[str, tuple[float, float]]
    curve: dict[str, list[tuple[int, float]]]

    @classmethod
    def read(cls, method: str, folder: Path) -> Run:
        """The run in a run directory.

        Raises:
            ValueError: where it is not complete.
        """
        try:
            summary = json.loads((folder / "summary.json").read_text())
            lines = (folder / "shapes" / "scores.jsonl").read_text().splitlines()
        except OSError as error:
            raise ValueError(
                f"compare: {folder} holds no complete run ({error}); delete it, and compare again"
            ) from error
        records = [json.loads(line) for line in lines]
        final = {r["label"]: (r["overall"], r["scores"]["standard_error"]) for r in records if r["stage"] == "final"}
        curve: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            curve.setdefault(record["label"], []).append((record["step"], record["overall"]))
        return cls(method, summary, final, curve)


def comparison(groups: Mapping[str, Sequence[Run]]) -> str:
    """A Markdown page: for each group of runs, by its title, what they scored and cost, and how they drew."""
    lines = ["# Methods side by side", "", *ABOUT]
    for title, runs in groups.items():
        lines += ["", f"## {title}", "", *_rows(score_table(runs))]
        if any("distribution" in run.summary for run in runs):
            lines += ["", *_rows(picture_table(runs))]
    return "\n".join([*lines, ""])


ABOUT = (
    "Written by `emf compare`. Scores are overall ones, at 1, 2, ... network steps; ± is the standard error over",
    "training seeds where there are several (all draw the same prompts), else over prompts. Minutes are of training",
    "alone, scores and pictures not counted. KID (x 1000) and FID are between features of a fixed random network, and",
    "compare with each other alone; diversity is what pictures of one prompt differ by, over what real ones do. All",
    "are means over seeds.",
)


def score_table(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each method: its scores at each step count and its cost, means over seeds."""
    labels = list(dict.fromkeys(label for run in runs for label in run.scores))
    head = ["method", *map(_name, labels), "minutes", "training steps", "GB", "seeds"]
    rows = [head]
    for method, same in _by_method(runs).items():
        scores = [_score(same, label) for label in labels]
        cost = [_mean([run.summary[name] for run in same]) for name in ("seconds", "steps", "memory_gb")]
        costs = [f"{cost[0] / 60:.1f}", f"{cost[1]:.0f}", f"{cost[2]:.2f}"]
        rows.append([method, *scores, *costs, str(len(same))])
    return rows


def picture_table(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each method and step count: evaluations, distances from real pictures, diversity, means over seeds."""
    rows = [["method", "drawn in", "NFE", "KID x 1000", "FID", "diversity"]]
    seen = [run for run in runs if "distribution" in run.summary]
    for method, same in _by_method(seen).items():
        drawn = [run.summary["distribution"] for run in same]
        for label in drawn[0]:
            if label != REAL:
                rows.append([method, _name(label), str(drawn[0][label]["nfe"]), *_distances(drawn, label)])
    rows.append(["real pictures", "", "", *_distances([run.summary["distribution"] for run in seen], REAL)])
    return rows


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Score against training time, a panel for each step count and a line for each method (its first seed)."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for run in runs for label in run.curve))
    figure = Figure(figsize=(4.2 * len(labels), 3.6), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False, sharey=True)[0]
    firsts = list({run.method: run for run in reversed(runs)}.values())[::-1]
    for panel, label in zip(panels, labels, strict=True):
        for number, run in enumerate(firsts):
            points = np.array(run.curve.get(label, []), float).reshape(-1, 2)
            minutes = points[:, 0] * run.summary["step_seconds"] / 60
            panel.plot(minutes, points[:, 1], label=run.method, color=f"C{number}", marker=".")
        panel.set(title=_name(label), xlabel="minutes of training")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("GenEval-style score, shapes world")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {method: [run for run in runs if run.method == method] for method in dict.fromkeys(r.method for r in runs)}


def _name(label: str) -> str:
    """The words for a way of drawing: "2 steps" for ``2step``."""
    steps, _, rest = label.partition("step")
    return step_name(int(steps)) + rest.replace("_", ", ")


def _score(runs: Sequence[Run], label: str) -> str:
    scores = [run.scores[label] for run in runs if label in run.scores]
    if not scores:
        return ""
    values = [overall for overall, _ in scores]
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else scores[0][1]
    return f"{_mean(values):.3f} ± {error:.3f}"


def _distances(drawn: Sequence[dict[str, Any]], label: str) -> list[str]:
    return [f"{_mean([d[label][name] for d in drawn]):.2f}" for name in ("kid", "fid", "diversity")]


def _rows(table: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = table
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
