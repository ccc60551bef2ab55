"""Figures of images and scores at each step count. Every function returns a matplotlib ``Figure``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.evaluation.geneval.task_scores import HEADINGS, TaskScores
from emf_lightning.evaluation.sampling_config import step_name
from emf_lightning.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP_COLOURS = {1: "#c8443c", 2: "#e39a2d", 4: "#1f8a83", 8: "#3d5a98", 30: "#6b4c8f"}
"""One colour for each step count, the same in every figure."""
OTHER_COLOUR = "#555555"
DASHES = (0, (4, 2))
CORRECT, WRONG = "#1f8a4c", "#c8443c"

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
    """Writes a figure as PNG, atomically."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", **options)


def step_colour(steps: int) -> str:
    """The colour of a step count."""
    return STEP_COLOURS.get(steps, OTHER_COLOUR)


def contact_sheet(
    prompts: Sequence[str],
    columns: Mapping[str, NDArray[np.uint8]],
    correct: Mapping[str, Sequence[bool]] | None = None,
) -> Figure:
    """Images in a grid: a row for each prompt, a column for each sampling config.

    Args:
        prompts: R captions, written beside the rows.
        columns: heading -> images ``[R, H, W, 3]``, 8-bit RGB, e.g. "1 step", "4 steps", "training image".
        correct: heading -> R booleans; these images get a frame, and a tick or a cross. Headings may be left out.
    """
    from matplotlib.figure import Figure

    marks = correct or {}
    cell, gap, label, head = 0.62, 0.035, 1.45, 0.32  # inches
    side = cell - 2 * gap
    with paper_style():
        width, height = label + cell * len(columns), head + cell * len(prompts)
        figure = Figure(figsize=(width, height))
        for column, (heading, images) in enumerate(columns.items()):
            for row, image in enumerate(images):
                left, bottom = label + cell * column + gap, cell * (len(prompts) - 1 - row) + gap
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                axes.imshow(image, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                truth = marks[heading][row] if heading in marks else None
                for spine in axes.spines.values():
                    spine.set(visible=truth is not None, linewidth=1.6, edgecolor=CORRECT if truth else WRONG)
                if truth is not None:
                    badge = {"boxstyle": "circle,pad=0.15", "facecolor": CORRECT if truth else WRONG, "linewidth": 0}
                    mark = "✓" if truth else "✗"  # legible without colour
                    centred: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes}
                    axes.text(0.97, 0.03, mark, fontsize=5, color="white", bbox=badge, **centred)
            x = (label + cell * (column + 0.5)) / width
            words = fill(heading, 11, break_long_words=False)
            figure.text(x, 1 - 0.9 * head / height, words, ha="center", va="bottom", fontsize=6.5, fontweight="bold")
        for row, prompt in enumerate(prompts):
            y = cell * (len(prompts) - 0.5 - row) / height
            text = fill(prompt.removeprefix("a photo of "), 22)
            figure.text((label - 0.08) / width, y, text, ha="right", va="center", fontsize=7.5)
    return figure


def step_count_figure(
    series: Mapping[str, Mapping[int, TaskScores]],
    ceiling: TaskScores | None = None,
    chance: TaskScores | None = None,
) -> Figure:
    """Score against the number of steps: overall with its standard error, and a small panel for each task.

    ``series`` is name -> steps -> scores; the first one has the strongest line, e.g. "MeanFlow", then "its parent".
    ``ceiling`` and ``chance`` are those of the prompt suite.
    """
    strokes: list[dict[str, Any]] = [
        {"color": "#1f8a83", "marker": "o"},
        {"color": "#8a8a8a", "marker": "s", "linestyle": "--"},
        {"color": "#3d5a98", "marker": "^", "linestyle": "-."},
        {"color": "#c8443c", "marker": "v", "linestyle": ":"},
    ]
    steps = sorted({count for scores in series.values() for count in scores})
    with paper_style():
        figure, panels = _panels([task for scores in series.values() for s in scores.values() for task in s.correct])
        for name, axes in panels.items():
            _plot_levels(axes, name, ceiling, chance)
            for (label, scores), stroke in zip(series.items(), strokes, strict=False):
                counts = sorted(count for count in scores if name in scores[count].values())
                values = [scores[count].values()[name] for count in counts]
                errors = [scores[count].standard_error for count in counts] if name == "overall" else None
                axes.errorbar(counts, values, yerr=errors, label=label, capsize=2, elinewidth=0.8, **stroke)
            set_step_axis(axes, steps)
            axes.margins(x=0.08)
        panels["overall"].set_xlabel("network steps")
        panels["overall"].legend(loc="best", handlelength=1.8, labelspacing=0.3)
    return figure


def training_curves(
    curves: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]],
    ceiling: TaskScores | None = None,
    chance: TaskScores | None = None,
    reference: Mapping[int, TaskScores] | None = None,
    reference_name: str = "parent",
) -> Figure:
    """Score against training: a line for each step count, overall and in a small panel for each task.

    ``curves`` is steps -> "overall" or task -> (optimiser step, score) points in order; tasks may be left out.
    ``ceiling`` and ``chance`` are those of the prompt suite. The scores of another model, ``reference`` (steps ->
    scores), are dashed level lines in the colour of the step count.
    """
    with paper_style():
        figure, panels = _panels([name for lines in curves.values() for name in lines if name in HEADINGS])
        for name, axes in panels.items():
            _plot_levels(axes, name, ceiling, chance)
            for steps, lines in sorted(curves.items()):
                if points := lines.get(name):
                    marker = "o" if name == "overall" and len(points) < 25 else None
                    axes.plot(*zip(*points, strict=True), color=step_colour(steps), marker=marker, markersize=2.5)
            for steps, scores in (reference or {}).items():
                if (level := scores.values().get(name)) is not None:
                    axes.axhline(level, color=step_colour(steps), linewidth=1, linestyle=DASHES, zorder=1)
            axes.margins(x=0.02)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
            axes.locator_params(axis="x", nbins=6 if name == "overall" else 3)
        overall = panels["overall"]
        for steps in sorted(curves):
            overall.plot([], [], color=step_colour(steps), label=step_name(steps))
        known = [steps for steps in reference or {} if steps in curves]
        if known:
            overall.plot([], [], color=OTHER_COLOUR, linewidth=1, linestyle=DASHES, label=reference_name)
        for steps in sorted(set(reference or {}).difference(known)):
            label = f"{reference_name}, {step_name(steps)}"
            overall.plot([], [], color=step_colour(steps), linewidth=1, linestyle=DASHES, label=label)
        overall.set_xlabel("optimiser steps")
        overall.legend(loc="best", handlelength=1.8, labelspacing=0.3)
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


def _panels(tasks: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a large panel "overall" and, to its right, a small one for each of ``tasks``, two rows of them."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(tasks))
    columns = -(-len(names) // 2)
    figure = Figure(figsize=(2.7 + 1.35 * columns, 2.6), layout="constrained")
    grid = figure.add_gridspec(2, 1 + columns, width_ratios=[2.0] + [1.0] * columns)
    panels = {"overall": figure.add_subplot(grid[:, 0])}
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        axes = panels[name] = figure.add_subplot(grid[row, 1 + column])
        axes.set_title(HEADINGS.get(name, name), pad=3)
        axes.tick_params(labelbottom=row == 1 or i + columns >= len(names), labelleft=column == 0)
    panels["overall"].set_ylabel("share of correct images")
    panels["overall"].set_title("overall", fontweight="bold", pad=3)
    for axes in panels.values():
        axes.set_ylim(-0.02, 1.08 if axes is panels["overall"] else 1.04)  # room above the ceiling for its name
        axes.set_yticks(np.linspace(0, 1, 6 if axes is panels["overall"] else 3))
    return figure, panels


def _plot_levels(axes: Axes, name: str, ceiling: TaskScores | None, chance: TaskScores | None) -> None:
    """Plots ceiling and chance as level lines."""
    for scores, label in ((ceiling, "ceiling"), (chance, "chance")):
        if scores is not None and name in (values := scores.values()):
            axes.axhline(values[name], color="#999999", linewidth=0.8, linestyle=":", zorder=1)
            if name == "overall":
                label_level(axes, label, values[name], xytext=(-2, 1.5), textcoords="offset points")


def label_level(axes: Axes, label: str, level: float, **arguments: Any) -> None:
    """Writes ``label`` above the right end of a level line; ``arguments`` are those of ``annotate``."""
    style: dict[str, Any] = {"fontsize": 6.5, "color": "#777777", "ha": "right", "va": "bottom"}
    axes.annotate(label, (1, level), xycoords=("axes fraction", "data"), **style, **arguments)
