"""Does few-step quality fall faster with poor text features than many-step quality? The figures of runs, and a verdict.

EMF's thesis (arXiv 2604.18168) is that MeanFlow needs discriminative text features more than flow matching does. Here
the same network is trained on encoders of graded discriminability, by flow matching and then by MeanFlow, several seeds
each. What is compared is the share of its own parent's many-step score that a model keeps at few steps: were the thesis
true, that share would rise with the encoder's discriminability.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.encoder_study import Estimate
from emf_lightning.evaluation.figures import STYLE, step_colour, step_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 30
"""Network steps of the parent that few-step scores are held against."""
FEW = (1, 2, 4)


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

    def kept(self, steps: int) -> float:
        """The share of its parent's many-step score that MeanFlow keeps at ``steps``."""
        return self.meanflow[steps] / self.flow_matching[MANY] if self.flow_matching[MANY] else math.nan


@dataclass(frozen=True)
class Slope:
    """How the share kept at ``steps`` changes with discriminability.

    Attributes:
        steps: network steps.
        mean: of the seeds' least-squares slopes: share kept per unit of discriminability.
        standard_error: over seeds; NaN for one.
        margin: of the 95 % interval around the mean, by Student's t over the seeds: three seeds need 4.3 standard
            errors.
        verdict: what it says of the claim.
    """

    steps: int
    mean: float
    standard_error: float
    margin: float
    verdict: str


@dataclass(frozen=True)
class Claim:
    """All runs."""

    runs: tuple[ClaimRun, ...]

    def slopes(self) -> list[Slope]:
        """For each few-step count; a seed whose graded runs are not all there has no say."""
        from scipy.stats import t as student_t

        graded = [run for run in self.runs if run.graded]
        grades = {run.grade for run in graded}
        slopes = []
        for steps in FEW:
            of_seed = []
            for seed in sorted({run.seed for run in graded}):
                mine = [run for run in graded if run.seed == seed and not math.isnan(run.kept(steps))]
                if {run.grade for run in mine} == grades and len(mine) > 1:
                    x, y = [r.discriminability.mean for r in mine], [r.kept(steps) for r in mine]
                    of_seed.append(float(np.polyfit(x, y, 1)[0]))
            mean = float(np.mean(of_seed)) if of_seed else math.nan
            error = float(np.std(of_seed, ddof=1) / len(of_seed) ** 0.5) if len(of_seed) > 1 else math.nan
            margin = error * float(student_t.ppf(0.975, len(of_seed) - 1)) if len(of_seed) > 1 else math.nan
            slopes.append(Slope(steps, mean, error, margin, _verdict(mean, margin)))
        return slopes

    def write(self, directory: Path) -> None:
        """Writes ``claim.json``, ``claim.md`` and ``claim.png`` into ``directory``, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"runs": [asdict(run) for run in self.runs], "slopes": [asdict(slope) for slope in self.slopes()]}
        (directory / "claim.json").write_text(json.dumps(content, indent=1) + "\n")
        (directory / "claim.md").write_text(self.markdown())
        self.figure().savefig(directory / "claim.png")

    def markdown(self) -> str:
        """A table of all encoders, the slopes, and what they say, be it for the claim or against it."""
        lines = ["# Does few-step quality need better text features than many-step quality?\n"]
        heads = [f"parent, {MANY} steps", *(f"MeanFlow, {step_name(n)}" for n in (*FEW, MANY))]
        heads += [f"kept at {step_name(n)}" for n in FEW]
        lines += [
            "| encoder | discriminability | seeds | " + " | ".join(heads) + " |",
            "|---|" + "---|" * (len(heads) + 2),
        ]
        for grade, runs in self._by_grade().items():
            columns = [[run.flow_matching[MANY] for run in runs]]
            columns += [[run.meanflow[n] for run in runs if n in run.meanflow] for n in (*FEW, MANY)]
            columns += [[run.kept(n) for run in runs] for n in FEW]
            name = grade if runs[0].graded else f"{grade} (control)"
            cells = [name, str(runs[0].discriminability), str(len(runs)), *(_mean_and_error(c) for c in columns)]
            lines += ["| " + " | ".join(cells) + " |"]
        lines += ["", "± is the standard error over training seeds.", ""]
        for slope in self.slopes():
            value = f"{slope.mean:+.2f}" if not math.isnan(slope.mean) else "not known"
            if not math.isnan(slope.margin):
                low, high = slope.mean - slope.margin, slope.mean + slope.margin
                value += f" ± {slope.standard_error:.2f}, 95 % interval [{low:+.2f}, {high:+.2f}]"
            unit = "share kept per unit of discriminability"
            lines += [f"- **{step_name(slope.steps)}**: {value} ({unit}): {slope.verdict}."]
        return "\n".join([*lines, ""])

    def figure(self) -> Figure:
        """Score at each step count, and share kept, against measured discriminability, with standard errors."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(7.0, 2.9), layout="constrained")
            scores, kept = figure.subplots(1, 2)
            for n in FEW:
                self._line(scores, lambda run, n=n: run.meanflow[n], step_colour(n), f"MeanFlow, {step_name(n)}")
                self._line(kept, lambda run, n=n: run.kept(n), step_colour(n), step_name(n))
            self._line(scores, lambda run: run.flow_matching[MANY], step_colour(MANY), f"parent, {MANY} steps")
            scores.set(xlabel="discriminability of the encoder", ylabel="score", ylim=(-0.02, 1.04))
            kept.set(xlabel="discriminability of the encoder", ylabel=f"share of the parent's {MANY}-step score")
            kept.axhline(1, color="#999999", linestyle=":", linewidth=0.8)
            for axes in (scores, kept):
                axes.legend(loc="best", handlelength=1.8, labelspacing=0.3)
        return figure

    def _line(self, axes: Axes, value: object, colour: str, label: str) -> None:
        """One line through the graded encoders; controls stand beside it, hollow."""
        assert callable(value)
        points = []
        for runs in self._by_grade().values():
            values = [value(run) for run in runs]
            error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
            points.append((runs[0].discriminability.mean, float(np.mean(values)), error, runs[0].graded))
        filled: dict[str, Any] = {"marker": "o", "label": label}
        hollow: dict[str, Any] = {"marker": "o", "mfc": "none", "ls": "none"}
        for graded, style in ((True, filled), (False, hollow)):
            chosen = sorted(point for point in points if point[3] == graded)
            if chosen:
                x, y, errors, _ = zip(*chosen, strict=True)
                axes.errorbar(x, y, yerr=errors, color=colour, capsize=2, elinewidth=0.8, **style)

    def _by_grade(self) -> dict[str, list[ClaimRun]]:
        groups: dict[str, list[ClaimRun]] = {}
        for run in self.runs:
            groups.setdefault(run.grade, []).append(run)
        return groups


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


def _mean_and_error(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    error = f" ± {np.std(known, ddof=1) / len(known) ** 0.5:.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{error}"
