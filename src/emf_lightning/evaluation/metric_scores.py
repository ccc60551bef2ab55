"""The numbers of one metric: value, unit and direction, of any metric alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emf_lightning.evaluation.geneval.task_scores import SHARE, TaskScores

if TYPE_CHECKING:
    from emf_lightning.evaluation.image_metric import ImageMetric

SUMMARY = ("score", "strict", "se", "spread", "seen", "held_out", "held_out_se", "images", "width", "height")
"""Names of ``compute`` that are no part of a benchmark, as its tasks, styles or categories are."""


@dataclass(frozen=True)
class MetricScores:
    """The numbers of one metric of one set of images.

    Attributes:
        title: heading in tables and figures.
        unit: quantity on a figure's axis.
        values: name -> number as ``ImageMetric.compute`` gives them: ``score`` is the main one.
        higher_is_better: direction of ``score``; None where it has none.
    """

    title: str
    unit: str
    values: dict[str, float]
    higher_is_better: bool | None = True

    @property
    def score(self) -> float:
        """The main number; NaN without one."""
        return self.values.get("score", math.nan)

    @property
    def error(self) -> float:
        """Standard error of ``score``, or its spread over subsets; NaN where it has neither."""
        return self.values.get("se", self.values.get("spread", math.nan))

    @property
    def parts(self) -> dict[str, float]:
        """Scores of the benchmark's parts: its tasks, styles or categories; subcategories are left out."""
        return {name: v for name, v in self.values.items() if name not in SUMMARY and " - " not in name}

    @property
    def heading(self) -> str:
        """Heading of a column: the title, and the direction where a smaller number is the better one."""
        return self.title if self.higher_is_better is not False else f"{self.title}, lower is better"

    def text(self, name: str = "score") -> str:
        """A number as tables show it; empty where it is missing or not finite."""
        value = self.values.get(name, math.nan)
        return f"{value:.3f}" if self.unit == SHARE and math.isfinite(value) else format_number(value)

    def of(self, values: Mapping[str, float]) -> MetricScores:
        """The same metric with other numbers, e.g. a level of it."""
        return MetricScores(self.title, self.unit, dict(values), self.higher_is_better)

    @classmethod
    def compute(cls, metric: ImageMetric) -> MetricScores:
        """The numbers of ``metric``; a collective of all ranks."""
        values = {name: float(value) for name, value in metric.compute().items()}
        return cls(metric.title, metric.unit or metric.title, values, metric.higher_is_better)

    @classmethod
    def of_tasks(cls, scores: TaskScores, title: str) -> MetricScores:
        """The numbers of a suite's verdicts."""
        return cls(title, SHARE, scores.numbers())

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> MetricScores:
        """Inverts ``dataclasses.asdict``; null is NaN."""
        values = {name: math.nan if value is None else float(value) for name, value in row["values"].items()}
        return cls(str(row["title"]), str(row["unit"]), values, row["higher_is_better"])


def format_number(value: float) -> str:
    """Two decimals; of a large number none. Empty if it is not finite."""
    if not math.isfinite(value):
        return ""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"
