"""Does few-step quality fall faster with poor text features than many-step quality? The figures of runs, and a verdict.

EMF's thesis (arXiv 2604.18168) is that MeanFlow needs discriminative text features more than flow matching does. Here
the same network is trained on encoders of graded discriminability, by flow matching and then by MeanFlow, several seeds
each. What is compared is the share of its own parent's many-step score that a model keeps at few steps: were the thesis
true, that share would rise with the encoder's discriminability. Beside it stands the share of its own many-step score,
in which what the adaptation did to the model at any number of steps has no part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.encoders.study import Estimate
from emf_lightning.evaluation.reports.figures import STYLE, step_colour, step_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 30
"""Network steps of the parent that few-step scores are held against."""
FEW = (1, 2, 4)
PARENT, OWN = "parent", "own"
"""Whose many-step score a share is of."""
CONTROLS = "sD^v<>"
"""Markers of the controls in the figure."""


@dataclass(frozen=True)
class ClaimRun:
    """One encoder and one training seed.

    Attributes:
        grade: name of the encoder's quality.
        graded: whether it belongs to the scale; otherwise it is a control beside it.
        seed: of the training.
        discriminability: of the encoder's raw features.
        flow_matching: network steps -> score of the parent.
        meanflow: network steps -> score of the model adapted from it.
    """

    grade: str
    graded: bool
    seed: int
    discriminability: Estimate
    flow_matching: dict[int, float]
    meanflow: dict[int, float]

    def kept(self, steps: int, of: str = PARENT) -> float:
        """The share that MeanFlow keeps of its parent's many-step score, or its own; NaN where that is 0."""
        whole = (self.flow_matching if of == PARENT else self.meanflow)[MANY]
        return self.meanflow[steps] / whole if whole else math.nan


@dataclass(frozen=True)
class Slope:
    """How the share kept at ``steps`` changes with discriminability.

    Attributes:
        steps: network steps.
        of: whose many-step score the share is of.
        mean: of the seeds' least-squares slopes: share kept per unit of discriminability.
        standard_error: over seeds; NaN for one.
        margin: of the 95 % interval around the mean, by Student's t over the seeds: three seeds need 4.3 standard
            errors.
        verdict: what it says of the claim.
    """

    steps: int
    of: str
    mean: float
    standard_error: float
    margin: float
    verdict: str


@dataclass(frozen=True)
class Claim:
    """All runs."""

    runs: tuple[ClaimRun, ...]

    def slopes(self) -> list[Slope]:
        """Of both shares, for each few-step count."""
        return [self._slope(steps, of) for of in (PARENT, OWN) for steps in FEW]

    def _slope(self, steps: int, of: str) -> Slope:
        """A seed whose graded runs are not all there has no say."""
        from scipy.stats import t as student_t

        graded = [run for run in self.runs if run.graded]
        grades = {run.grade for run in graded}
        of_seed = []
        for seed in sorted({run.seed for run in graded}):
            mine = [run for run in graded if run.seed == seed and not math.isnan(run.kept(steps, of))]
            if {run.grade for run in mine} == grades and len(mine) > 1:
                x, y = [r.discriminability.mean for r in mine], [r.kept(steps, of) for r in mine]
                of_seed.append(float(np.polyfit(x, y, 1)[0]))
        mean = float(np.mean(of_seed)) if of_seed else math.nan
        error = float(np.std(of_seed, ddof=1) / len(of_seed) ** 0.5) if len(of_seed) > 1 else math.nan
        margin = error * float(student_t.ppf(0.975, len(of_seed) - 1)) if len(of_seed) > 1 else math.nan
        return Slope(steps, of, mean, error, margin, _verdict(mean, margin))

    def write(self, directory: Path) -> None:
        """Writes ``claim.json``, ``claim.md`` and ``claim.png`` into ``directory``, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"runs": [asdict(run) for run in self.runs], "slopes": [asdict(slope) for slope in self.slopes()]}
        (directory / "claim.json").write_text(json.dumps(content, indent=1) + "\n")
        (directory / "claim.md").write_text(self.markdown())
        self.figure().savefig(directory / "claim.png")

    def markdown(self) -> str:
        """Tables of all encoders, the slopes, and what they say, be it for the claim or against it."""
        lines = ["# Does few-step quality need better text features than many-step quality?", "", "Scores:", ""]
        counts = (*FEW, MANY)
        lines += self._table(
            {
                f"flow matching, {step_name(n)}": [run.flow_matching.get(n, math.nan) for run in self.runs]
                for n in counts
            }
            | {f"MeanFlow, {step_name(n)}": [run.meanflow.get(n, math.nan) for run in self.runs] for n in counts}
        )
        shares = [(of, n) for of in (PARENT, OWN) for n in FEW]
        lines += ["", f"Shares that MeanFlow keeps of a {MANY}-step score:", ""]
        lines += self._table(
            {f"{_whose(of)}, {step_name(n)}": [run.kept(n, of) for run in self.runs] for of, n in shares}
        )
        lines += ["", "± is the standard error over training seeds. Share kept per unit of discriminability:", ""]
        for slope in self.slopes():
            value = f"{slope.mean:+.2f}" if not math.isnan(slope.mean) else "not known"
            if not math.isnan(slope.margin):
                low, high = slope.mean - slope.margin, slope.mean + slope.margin
                value += f" ± {slope.standard_error:.2f}, 95 % interval [{low:+.2f}, {high:+.2f}]"
            lines += [f"- **{step_name(slope.steps)}**, {_whose(slope.of)}: {value}: {slope.verdict}."]
        return "\n".join([*lines, ""])

    def _table(self, columns: dict[str, list[float]]) -> list[str]:
        """A row for each encoder: means and errors of the columns, which hold a value for each run."""
        lines = [
            "| encoder | discriminability | seeds | " + " | ".join(columns) + " |",
            "|---|" + "---|" * (len(columns) + 2),
        ]
        for numbers in self._by_grade():
            run = self.runs[numbers[0]]
            name = run.grade if run.graded else f"{run.grade} (control)"
            values = (_mean_and_error([column[i] for i in numbers]) for column in columns.values())
            lines += ["| " + " | ".join([name, str(run.discriminability), str(len(numbers)), *values]) + " |"]
        return lines

    def figure(self) -> Figure:
        """Scores of both objectives, and share kept, against discriminability, with standard errors."""
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(8.4, 2.9), layout="constrained")
            parents, models, kept = figure.subplots(1, 3)
            models.sharey(parents)
            for n in (*FEW, MANY):
                self._line(parents, [run.flow_matching[n] for run in self.runs], step_colour(n), step_name(n))
                self._line(models, [run.meanflow[n] for run in self.runs], step_colour(n), step_name(n))
            for n in FEW:
                self._line(kept, [run.kept(n) for run in self.runs], step_colour(n), step_name(n))
            parents.set(title="flow matching", ylabel="score", ylim=(-0.02, 1.02))
            models.set(title="MeanFlow from it")
            kept.set(title=f"MeanFlow, share of the parent's {MANY} steps", ylim=(-0.02, None))
            kept.axhline(1, color="#999999", linestyle=":", linewidth=0.8)
            if any(run.graded for run in self.runs):
                models.legend(loc="best", handlelength=1.8, labelspacing=0.3)
            names = dict.fromkeys(run.grade for run in self.runs if not run.graded)
            marks = [
                Line2D([], [], marker=marker, color="#555555", mfc="none", ls="none", label=name)
                for name, marker in zip(names, CONTROLS, strict=False)
            ]
            if marks:
                kept.legend(handles=marks, loc="best", title="controls", title_fontsize=7.0, labelspacing=0.3)
            figure.supxlabel("discriminability of the encoder", fontsize="medium")
        return figure

    def _line(self, axes: Axes, values: list[float], colour: str, label: str) -> None:
        """One line through the graded encoders' means; controls stand beside it, hollow."""
        points = []
        for numbers in self._by_grade():
            of_grade, run = [values[i] for i in numbers], self.runs[numbers[0]]
            error = float(np.std(of_grade, ddof=1) / len(numbers) ** 0.5) if len(numbers) > 1 else math.nan
            points.append((run.discriminability.mean, float(np.mean(of_grade)), error, run.graded))
        scale = sorted(point[:3] for point in points if point[3])
        lines: list[tuple[Any, dict[str, Any]]] = [(scale, {"marker": "o", "label": label})] if scale else []
        controls = [[point[:3]] for point in points if not point[3]]
        lines += [(one, {"marker": m, "mfc": "none", "ls": "none"}) for one, m in zip(controls, CONTROLS, strict=False)]
        for chosen, style in lines:
            x, y, errors = zip(*chosen, strict=True)
            axes.errorbar(x, y, yerr=errors, color=colour, capsize=2, elinewidth=0.8, **style)

    def _by_grade(self) -> list[list[int]]:
        """The runs' numbers, those of a grade together."""
        grades = dict.fromkeys(run.grade for run in self.runs)
        return [[i for i, run in enumerate(self.runs) if run.grade == grade] for grade in grades]


def _verdict(mean: float, margin: float) -> str:
    """What a slope says, at 95 %."""
    if math.isnan(mean):
        return "undecided: no seed has its whole scale yet, with parents that draw anything"
    if math.isnan(margin):
        return "undecided, for it takes two seeds or more"
    if abs(mean) <= max(margin, 1e-6):  # rounding is no slope
        return "undecided: the 95 % interval holds 0"
    if mean > 0:
        return "for the claim: with better features a larger share of the parent's score survives"
    return "against the claim: with better features a smaller share of the parent's score survives"


def _whose(of: str) -> str:
    return "of its parent's" if of == PARENT else "of its own"


def _mean_and_error(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    error = f" ± {np.std(known, ddof=1) / len(known) ** 0.5:.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{error}"
