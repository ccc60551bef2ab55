"""Methods side by side: a table and a figure of what runs of the same length scored, drew and cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def comparison_table(runs: Sequence[Run]) -> str:
    """A Markdown table: a row for each method and step count, means over seeds.

    ± is the standard error over seeds where there are several, else the score's bootstrap error over prompts.
    """
    head = [
        "method",
        "steps (NFE)",
        "score",
        "KID x 1000",
        "FID",
        "diversity",
        "minutes",
        "training steps",
        "GB",
        "seeds",
    ]
    rows = [head, ["---"] * len(head)]
    for method in dict.fromkeys(run.method for run in runs):
        same = [run for run in runs if run.method == method]
        for label in same[0].scores:
            there = [run.summary["distribution"][label] for run in same if label in run.summary.get("distribution", {})]
            mean, error = _score(same, label)
            nfe = there[0]["nfe"] if there else "?"
            drawn = [_mean([d[name] for d in there]) for name in ("kid", "fid", "diversity")]
            cost = [_mean([run.summary[name] for run in same]) for name in ("seconds", "steps", "memory_gb")]
            rows.append(
                [
                    method,
                    f"{label.removesuffix('step')} ({nfe})",
                    f"{mean:.3f} ± {error:.3f}",
                    *(f"{value:.2f}" for value in drawn),
                    f"{cost[0] / 60:.1f}",
                    f"{cost[1]:.0f}",
                    f"{cost[2]:.2f}",
                    str(len(same)),
                ]
            )
    real = [run.summary["distribution"]["real"] for run in runs if "distribution" in run.summary]
    if real:
        drawn = [_mean([d[name] for d in real]) for name in ("kid", "fid", "diversity")]
        rows.append(["real pictures", "", "", *(f"{value:.2f}" for value in drawn), *[""] * 4])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


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
        panel.set(title=label.replace("step", " step" if label == "1step" else " steps"), xlabel="minutes of training")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("GenEval-style score, shapes world")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _score(runs: Sequence[Run], label: str) -> tuple[float, float]:
    scores = [run.scores[label][0] for run in runs if label in run.scores]
    if len(scores) > 1:
        return float(np.mean(scores)), float(np.std(scores, ddof=1) / len(scores) ** 0.5)
    return runs[0].scores[label]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
