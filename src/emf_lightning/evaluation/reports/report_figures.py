"""Figures of a report: score against network steps, and against training, for one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from emf_lightning.evaluation.geneval.task_scores import SHARE
from emf_lightning.evaluation.reports.figures import OTHER_COLOUR, label_level, paper_style, set_step_axis, step_colour
from emf_lightning.evaluation.reports.published import PUBLISHED
from emf_lightning.evaluation.reports.report import FAMILIES, OFFICIAL, Report
from emf_lightning.evaluation.sampling_config import step_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f8a83", "#c8443c", "#3d5a98", "#e39a2d", "#6b4c8f", "#555555")
"""A colour for each run."""
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*")
"""A marker for each guidance scale of each run."""


def steps_figure(report: Report) -> Figure:
    """Score against network steps, a panel for each metric, a line for each run, weights and guidance.

    A run has a colour, each of its guidance scales a marker; weights without averaging are dashed. The paper's EMF and
    its parent are grey, in panels of the same tasks; the legend says where another detector scored them.
    """
    from matplotlib.figure import Figure

    groups = report.groups()
    with paper_style():
        figure = Figure(figsize=(3.3 * max(len(groups), 1), 3.2), layout="constrained")
        panels = figure.subplots(1, max(len(groups), 1), squeeze=False)[0]
        runs = list(dict.fromkeys(row.run for row in report.rows))
        scales = list(dict.fromkeys((row.run, row.guidance_scale) for row in report.rows))
        for axes, group in zip(panels, groups, strict=False):
            name, title = group[0].metric, group[0].title
            counts = sorted({row.steps for row in group})
            by_steps = sorted(group, key=lambda row: row.steps)
            for model in dict.fromkeys(row.model for row in by_steps):
                rows = [row for row in by_steps if row.model == model]
                axes.errorbar(
                    [row.steps for row in rows],
                    [row.scores["score"] for row in rows],
                    yerr=[row.scores.get("se", 0.0) for row in rows],
                    label=model,
                    color=COLOURS[runs.index(rows[0].run) % len(COLOURS)],
                    marker=MARKERS[scales.index((rows[0].run, rows[0].guidance_scale)) % len(MARKERS)],
                    linestyle="-" if rows[0].weights == "averaged" else "--",
                    capsize=2,
                    elinewidth=0.8,
                )
            family = "dpg" if name == OFFICIAL else FAMILIES.get(name, name)
            remark = ", counted by its script" if name == "dpg" else ", its own detector" if name in FAMILIES else ""
            for model, marker in (("EMF", "o"), ("BLIP3o-NEXT 3B", "s")):
                published = [row for row in PUBLISHED if row.model == model and family in row.scores]
                if known := sorted((row.steps, row.scores[family]["score"]) for row in published):
                    label = f"{model} (published{remark})"
                    style = {"color": "#aaaaaa", "linestyle": ":", "marker": marker, "markersize": 3}
                    axes.plot(*zip(*known, strict=True), label=label, **style)
                    counts = sorted({*counts, *(steps for steps, _ in known)})
            for level, scores in report.levels.get(name, {}).items():
                axes.axhline(scores["score"], color="#999999", linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
                label_level(axes, level, scores["score"])
            set_step_axis(axes, counts)
            axes.set(title=fill(title, 44), xlabel="network steps", ylabel="score")
        # one legend for all panels, outside them: most panels show the same runs
        shown = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        columns = min(len(panels), 3)
        figure.set_figheight(2.6 + 0.15 * -(-len(shown) // columns))  # the panels keep their size
        figure.legend(list(shown.values()), list(shown), loc="outside lower center", handlelength=2.4, ncols=columns)
    return figure


def training_figure(
    curves: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]], title: str, unit: str = SHARE
) -> Figure:
    """Score against optimiser steps, a colour for each step count, a line style for each run: the paper's Figure 4.

    ``curves`` is run -> network steps -> (optimiser step, score) points in order; ``unit`` is the score's.
    """
    from matplotlib.figure import Figure

    styles = ("-", "--", "-.", ":")
    with paper_style():
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.subplots()
        for number, (run, lines) in enumerate(curves.items()):
            style = styles[number % len(styles)]
            for steps, points in sorted(lines.items()):
                axes.plot(*zip(*points, strict=True), color=step_colour(steps), linestyle=style)
            axes.plot([], [], color=OTHER_COLOUR, linestyle=style, label=run)
        for steps in sorted({steps for lines in curves.values() for steps in lines}):
            axes.plot([], [], color=step_colour(steps), label=step_name(steps))
        axes.set(title=fill(title, 60), xlabel="optimiser steps", ylabel=fill("score" if unit == SHARE else unit, 40))
        if unit == SHARE:
            axes.set_ylim(-0.02, 1.04)
        axes.legend(loc="best", handlelength=2.2, labelspacing=0.3)
    return figure
