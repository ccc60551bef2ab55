"""Test of EMF's claim that few-step quality needs better text features than many-step quality.

The claim (arXiv 2604.18168) is that MeanFlow needs discriminative text features more than flow matching does. The same
network is trained on encoders of graded discriminability, by flow matching and then by MeanFlow, or another few-step
objective, with several seeds.
The test compares the share of its parent's many-step score that a model keeps at few steps: if the claim holds, that
share rises with the encoder's discriminability. The share of the model's own many-step score is reported, too: it
leaves out the effect of the adaptation on the many-step score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.bootstrap import Estimate
from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.reports.figures import paper_style, save_figure, step_colour
from emf_lightning.evaluation.sampling_config import step_name
from emf_lightning.files import to_json, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_STEPS = 30
"""Network steps of the many-step scores that few-step scores are divided by."""
FEW_STEPS = (1, 2, 4)
PARENT, OWN = "parent", "own"
"""The model whose many-step score a few-step score is divided by."""
CONTROLS = "sD^v<>"
"""Markers of the controls in the figure."""


@dataclass(frozen=True)
class ClaimRun:
    """One encoder and one training seed.

    Attributes:
        graded: whether the encoder belongs to the scale; otherwise it is a control.
        discriminability: discriminability of the encoder's raw features.
        flow_matching: network steps -> score of the parent.
        meanflow: network steps -> score of the model adapted from the parent.
    """

    grade: str
    graded: bool
    seed: int
    discriminability: Estimate
    flow_matching: dict[int, float]
    meanflow: dict[int, float]

    def kept(self, steps: int, relative_to: str = PARENT) -> float:
        """The adapted model's few-step score divided by its parent's or own many-step score; NaN where that is 0."""
        whole = (self.flow_matching if relative_to == PARENT else self.meanflow)[MANY_STEPS]
        return self.meanflow[steps] / whole if whole else math.nan


@dataclass(frozen=True)
class Slope:
    """Change of the share kept at ``steps`` with discriminability.

    Attributes:
        relative_to: model whose many-step score the share is relative to.
        mean: mean of the seeds' least-squares slopes: share kept per unit of discriminability.
        standard_error: standard error over seeds; NaN for one seed.
        margin: half of the 95 % interval around the mean, by Student's t over the seeds: 4.3 standard errors for three
            seeds.
    """

    steps: int
    relative_to: str
    mean: float
    standard_error: float
    margin: float
    verdict: str


@dataclass(frozen=True)
class Claim:
    """All runs, with the name of the objective of the models that were adapted from the parents."""

    runs: tuple[ClaimRun, ...]
    objective: str = "MeanFlow"

    def slopes(self) -> list[Slope]:
        """The slopes of both shares at each few-step count."""
        return [self._slope(steps, relative_to) for relative_to in (PARENT, OWN) for steps in FEW_STEPS]

    def _slope(self, steps: int, relative_to: str) -> Slope:
        """The slope over seeds; a seed that lacks a graded run is left out."""
        from scipy.stats import t as student_t

        graded = [run for run in self.runs if run.graded]
        grades = {run.grade for run in graded}
        slopes = []
        for seed in sorted({run.seed for run in graded}):
            mine = [run for run in graded if run.seed == seed and not math.isnan(run.kept(steps, relative_to))]
            if {run.grade for run in mine} == grades and len(mine) > 1:
                x, y = [r.discriminability.mean for r in mine], [r.kept(steps, relative_to) for r in mine]
                slopes.append(float(np.polyfit(x, y, 1)[0]))
        mean, error = _mean_and_error(slopes)
        margin = error * float(student_t.ppf(0.975, len(slopes) - 1)) if len(slopes) > 1 else math.nan
        return Slope(steps, relative_to, mean, error, margin, _verdict(mean, margin))

    def write(self, directory: Path, name: str = "claim") -> None:
        """Writes ``NAME.json``, ``NAME.md`` and ``NAME.png`` into ``directory``, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"runs": [asdict(run) for run in self.runs], "slopes": [asdict(slope) for slope in self.slopes()]}
        write_atomic(directory / f"{name}.json", to_json(content))
        write_atomic(directory / f"{name}.md", self.markdown())
        save_figure(self.figure(), directory / f"{name}.png")

    def markdown(self) -> str:
        """Tables of all encoders, the slopes and the verdicts."""
        counts = (*FEW_STEPS, MANY_STEPS)
        scores = {
            f"flow matching, {step_name(n)}": [run.flow_matching.get(n, math.nan) for run in self.runs] for n in counts
        }
        scores |= {
            f"{self.objective}, {step_name(n)}": [run.meanflow.get(n, math.nan) for run in self.runs] for n in counts
        }
        shares = [(model, n) for model in (PARENT, OWN) for n in FEW_STEPS]
        kept = {f"{_whose(model)}, {step_name(n)}": [run.kept(n, model) for run in self.runs] for model, n in shares}
        lines = ["# Does few-step quality need better text features than many-step quality?", "", "Scores:", ""]
        lines += [self._table(scores), "", f"Shares that {self.objective} keeps of a {MANY_STEPS}-step score:", ""]
        lines += [self._table(kept), ""]
        lines += ["± is the standard error over training seeds. Share kept per unit of discriminability:", ""]
        for slope in self.slopes():
            value = f"{slope.mean:+.2f}" if not math.isnan(slope.mean) else "not known"
            if not math.isnan(slope.margin):
                low, high = slope.mean - slope.margin, slope.mean + slope.margin
                value += f" ± {slope.standard_error:.2f}, 95 % interval [{low:+.2f}, {high:+.2f}]"
            lines += [f"- **{step_name(slope.steps)}**, {_whose(slope.relative_to)}: {value}: {slope.verdict}."]
        return "\n".join([*lines, ""])

    def _table(self, columns: dict[str, list[float]]) -> str:
        """A row for each encoder: means and errors of the columns, which hold a value for each run."""
        rows = []
        for numbers in self._by_grade():
            run = self.runs[numbers[0]]
            name = run.grade if run.graded else f"{run.grade} (control)"
            cells = []
            for column in columns.values():
                mean, error = _mean_and_error([column[i] for i in numbers if not math.isnan(column[i])])
                cells.append("" if math.isnan(mean) else f"{mean:.3f}" + f" ± {error:.3f}" * (not math.isnan(error)))
            rows.append([name, str(run.discriminability), str(len(numbers)), *cells])
        return markdown_table(["encoder", "discriminability", "seeds", *columns], rows)

    def figure(self) -> Figure:
        """Scores of both objectives, and share kept, against discriminability, with standard errors."""
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        with paper_style():
            figure = Figure(figsize=(8.4, 2.9), layout="constrained")
            parents, models, kept = figure.subplots(1, 3)
            models.sharey(parents)
            for n in (*FEW_STEPS, MANY_STEPS):
                self._line(parents, [run.flow_matching[n] for run in self.runs], n)
                self._line(models, [run.meanflow[n] for run in self.runs], n)
            for n in FEW_STEPS:
                self._line(kept, [run.kept(n) for run in self.runs], n)
            parents.set(title="flow matching", ylabel="score", ylim=(-0.02, 1.02))
            models.set(title=f"{self.objective} from it")
            kept.set(title=f"{self.objective}, relative to its parent", ylim=(-0.02, None))
            kept.set_ylabel(f"share of the parent's {MANY_STEPS}-step score")
            kept.axhline(1, color="#999999", linestyle=":", linewidth=0.8)
            if any(run.graded for run in self.runs):
                models.legend(loc="best", handlelength=1.8, labelspacing=0.3)
            names = dict.fromkeys(run.grade for run in self.runs if not run.graded)
            style: dict[str, Any] = {"color": "#555555", "mfc": "none", "ls": "none"}
            controls = zip(names, CONTROLS, strict=False)
            if marks := [Line2D([], [], marker=marker, label=name, **style) for name, marker in controls]:
                kept.legend(handles=marks, loc="best", title="controls", title_fontsize=7.0, labelspacing=0.3)
            figure.supxlabel("discriminability of the encoder", fontsize="medium")
        return figure

    def _line(self, axes: Axes, values: list[float], steps: int) -> None:
        """Plots a line through the graded encoders' means at ``steps``, and the controls as hollow markers."""
        scale: list[tuple[float, float, float]] = []
        controls: list[tuple[float, float, float]] = []
        for numbers in self._by_grade():
            run = self.runs[numbers[0]]
            point = run.discriminability.mean, *_mean_and_error([values[i] for i in numbers])
            (scale if run.graded else controls).append(point)
        lines: list[tuple[Any, dict[str, Any]]] = []
        if scale:
            lines += [(sorted(scale), {"marker": "o", "label": step_name(steps)})]
        for point, marker in zip(controls, CONTROLS, strict=False):
            lines += [([point], {"marker": marker, "mfc": "none", "ls": "none"})]
        for points, style in lines:
            x, y, errors = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=errors, color=step_colour(steps), capsize=2, elinewidth=0.8, **style)

    def _by_grade(self) -> list[list[int]]:
        """The indices of the runs of each grade."""
        grades = dict.fromkeys(run.grade for run in self.runs)
        return [[i for i, run in enumerate(self.runs) if run.grade == grade] for grade in grades]


def _verdict(mean: float, margin: float) -> str:
    """Result in words of a slope, at 95 %."""
    if math.isnan(mean):
        return "undecided: no seed has its whole scale yet, with parents that score above 0"
    if math.isnan(margin):
        return "undecided, for it takes two seeds or more"
    if abs(mean) <= max(margin, 1e-6):  # rounding, not a slope
        return "undecided: the 95 % interval holds 0"
    if mean > 0:
        return "for the claim: with better features a larger share of the parent's score survives"
    return "against the claim: with better features a smaller share of the parent's score survives"


def _whose(model: str) -> str:
    return "of its parent's" if model == PARENT else "of its own"


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for no value, and for the error of one."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
    return float(np.mean(values)) if values else math.nan, error
