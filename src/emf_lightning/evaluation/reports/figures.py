"""Figures of scores at each step count, of any metrics. Every function returns a matplotlib ``Figure``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.geneval.task_scores import HEADINGS, SHARE
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.reports.letters import use_fonts_of_machine
from emf_lightning.evaluation.sampling_config import step_name
from emf_lightning.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scores = Mapping[str, MetricScores]
"""Metric -> its numbers."""

STEP_COLOURS = {1: "#c8443c", 2: "#e39a2d", 4: "#1f8a83", 8: "#3d5a98", 30: "#6b4c8f"}
"""One colour for each step count, the same in every figure."""
OTHER_COLOUR = "#555555"
DASHES = (0, (4, 2))

STYLE = {
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "figure.dpi": 200.0,
}
"""Matplotlib settings for a two-column paper: 8-point type at the figure's own size."""


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Writes a figure as PNG, atomically; letters that its font lacks come from others."""
    use_fonts_of_machine(figure)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", **options)


def step_colour(steps: int) -> str:
    """The colour of a step count."""
    return STEP_COLOURS.get(steps, OTHER_COLOUR)


def step_count_figure(series: Mapping[str, Mapping[int, Scores]], levels: Mapping[str, Scores] | None = None) -> Figure:
    """Scores against the number of steps: a panel for each metric with its error, and a small one for each part of it.

    Args:
        series: name -> steps -> scores; the first one has the strongest line, e.g. "MeanFlow", then "its parent".
        levels: name of a level line, e.g. "ceiling" -> its scores.
    """
    strokes: list[dict[str, Any]] = [
        {"color": "#1f8a83", "marker": "o"},
        {"color": "#8a8a8a", "marker": "s", "linestyle": "--"},
        {"color": "#3d5a98", "marker": "^", "linestyle": "-."},
        {"color": "#c8443c", "marker": "v", "linestyle": ":"},
    ]
    steps = sorted({count for scores in series.values() for count in scores})
    with paper_style():
        figure, panels = _panels([scores for of_steps in series.values() for scores in of_steps.values()])
        for panel in panels:
            _plot_levels(panel, levels or {})
            for (label, of_steps), stroke in zip(series.items(), strokes, strict=False):
                counts = sorted(count for count in of_steps if panel.value(of_steps[count]) is not None)
                errors = [of_steps[count][panel.metric].error for count in counts] if panel.is_main else None
                style = {"label": label, "capsize": 2, "elinewidth": 0.8, **stroke}
                values = [value for count in counts if (value := panel.value(of_steps[count])) is not None]
                panel.axes.errorbar(counts, values, yerr=errors, **style)
            set_step_axis(panel.axes, steps)
            panel.axes.margins(x=0.08)
            if panel.is_main:
                panel.axes.set_xlabel("network steps")
        handles, labels = panels[0].axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=2.4)
    return figure


def training_curves(
    curves: Mapping[int, Sequence[tuple[int, Scores]]],
    levels: Mapping[str, Scores] | None = None,
    reference: Mapping[int, Scores] | None = None,
    reference_name: str = "parent",
    remark: str = "",
) -> Figure:
    """Scores against training, a line for each step count: a panel for each metric, and a small one for each part.

    Args:
        curves: steps -> (optimiser step, scores) points in order.
        levels: name of a level line, e.g. "ceiling" -> its scores.
        reference: steps -> scores of another model, dashed level lines in the colour of the step count.
        reference_name: name of the other model in the legend.
        remark: heading of the legend, e.g. how the two models' sampling differs.
    """
    from matplotlib.lines import Line2D

    others = reference or {}
    with paper_style():
        figure, panels = _panels([scores for points in curves.values() for _, scores in points])
        for panel in panels:
            _plot_levels(panel, levels or {})
            for steps, points in sorted(curves.items()):
                marker = "o" if panel.is_main and len(points) < 25 else None
                shown = [(step, value) for step, scores in points if (value := panel.value(scores)) is not None]
                if shown:
                    colour = step_colour(steps)
                    panel.axes.plot(*zip(*shown, strict=True), color=colour, marker=marker, markersize=2.5)
            for steps, scores in others.items():
                if (level := panel.value(scores)) is not None:
                    panel.axes.axhline(level, color=step_colour(steps), linewidth=1, linestyle=DASHES, zorder=1)
            panel.axes.margins(x=0.02)
            panel.axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
            panel.axes.locator_params(axis="x", nbins=6 if panel.is_main else 3)
            if panel.is_main:
                panel.axes.set_xlabel("optimiser steps")
        shown_others = any(panel.value(scores) is not None for panel in panels for scores in others.values())
        counts = sorted({*curves, *(others if shown_others else ())})
        handles = []
        for steps in counts:  # a legend fills its columns first: both lines of a step count are one column
            style: dict[str, Any] = {"color": step_colour(steps)}
            none: dict[str, Any] = {"label": " ", "linestyle": ""}
            own = {"label": step_name(steps), **style} if steps in curves else none
            other = {"label": f"{reference_name}, {step_name(steps)}", "linestyle": DASHES, "linewidth": 1, **style}
            handles.append(Line2D([], [], **own))
            if shown_others:
                handles.append(Line2D([], [], **(other if steps in others else none)))
        title = {"title": remark, "title_fontsize": 7.0} if remark and shown_others else {}
        columns = min(len(counts), 4 if len(panels) > 1 else 2 if shown_others else 3)  # as many as the figure is wide
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.4, **title)
    return figure


def paper_style() -> AbstractContextManager[None]:
    """Context of matplotlib's settings for one figure; the caller's settings do not change."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def set_step_axis(axes: Axes, counts: Sequence[int]) -> None:
    """Makes the x axis logarithmic, with a tick at each of the step ``counts``."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


@dataclass(frozen=True)
class _Panel:
    """Axes of one number: a metric's main one, or that of its part."""

    axes: Axes
    metric: str
    part: str = ""

    @property
    def is_main(self) -> bool:
        return not self.part

    def value(self, scores: Scores) -> float | None:
        """The panel's number among ``scores``; None where it is missing."""
        value = scores[self.metric].values.get(self.part or "score") if self.metric in scores else None
        return None if value is None or math.isnan(value) else value


def _panels(everything: Sequence[Scores]) -> tuple[Figure, list[_Panel]]:
    """A figure with a large panel for each metric, and right of it two rows of small ones for the metric's parts."""
    from matplotlib.figure import Figure

    metrics = {name: found for scores in everything for name, found in scores.items()}
    parts = {n: list(dict.fromkeys(p for s in everything if n in s for p in s[n].parts)) for n in metrics}
    columns = {name: -(-len(names) // 2) for name, names in parts.items()}
    widths = [width for name in metrics for width in (2.0, *[1.0] * columns[name])]
    figure = Figure(figsize=(0.7 + sum(2.0 + 1.35 * n for n in columns.values()), 3.0), layout="constrained")
    grid = figure.add_gridspec(2, len(widths), width_ratios=widths)
    panels, left = [], 0
    for name, found in metrics.items():
        main = figure.add_subplot(grid[:, left])
        main.set_ylabel(fill(found.unit, 32))
        direction = "\nlower is better" if found.higher_is_better is False else ""
        main.set_title(fill("overall" if parts[name] else found.title, 30) + direction, fontweight="bold", pad=3)
        panels.append(_Panel(main, name))
        for i, part in enumerate(parts[name]):
            row, column = divmod(i, columns[name])
            axes = figure.add_subplot(grid[row, left + 1 + column])
            axes.set_title(HEADINGS.get(part, part), pad=3)
            below = i + columns[name] >= len(parts[name])
            axes.tick_params(labelbottom=row == 1 or below, labelleft=column == 0 or found.unit != SHARE)
            panels.append(_Panel(axes, name, part))
        if found.unit == SHARE:
            for panel in panels[-1 - len(parts[name]) :]:
                panel.axes.set_ylim(-0.02, 1.08 if panel.is_main else 1.04)  # room above the ceiling for its name
                panel.axes.set_yticks(np.linspace(0, 1, 6 if panel.is_main else 3))
        left += 1 + columns[name]
    return figure, panels


def _plot_levels(panel: _Panel, levels: Mapping[str, Scores]) -> None:
    """Plots ceiling and chance as level lines."""
    for label, scores in levels.items():
        if (level := panel.value(scores)) is not None:
            panel.axes.axhline(level, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
            if panel.is_main:
                label_level(panel.axes, label, level, xytext=(-2, 1.5), textcoords="offset points")


def label_level(axes: Axes, label: str, level: float, **arguments: Any) -> None:
    """Writes ``label`` above the right end of a level line; ``arguments`` are those of ``annotate``."""
    style: dict[str, Any] = {"fontsize": 6.5, "color": "#777777", "ha": "right", "va": "bottom"}
    axes.annotate(label, (1, level), xycoords=("axes fraction", "data"), **style, **arguments)
