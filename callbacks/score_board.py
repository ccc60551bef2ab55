"""Where the scores and images of an evaluation are shown: TensorBoard and the run directory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emf_lightning.callbacks.charts import Layout, multiline
from emf_lightning.callbacks.score_history import ScoreHistory, ScoreRecord
from emf_lightning.evaluation.geneval.task_scores import TaskScores, score_table
from emf_lightning.evaluation.prompt_suite import PromptSuite
from emf_lightning.evaluation.reports.figures import contact_sheet, step_count_figure, step_name, training_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


LINES = (r"\d+step", r"\d+step_cfg[\d.]+", "ceiling", "chance")
"""What the lines of a chart are called."""


@dataclass(frozen=True)
class Levels:
    """What scores are read against.

    Attributes:
        ceiling: what perfect images score.
        chance: what good images of other prompts score.
        reference: the last records of another run.
        reference_name: what that run is called.
    """

    ceiling: TaskScores | None = None
    chance: TaskScores | None = None
    reference: tuple[ScoreRecord, ...] = ()
    reference_name: str = "parent"


@dataclass(frozen=True)
class Sheet:
    """The same prompts drawn in several ways.

    Attributes:
        prompts: R captions.
        images: heading -> ``[R, H, W, 3]``, 8-bit RGB.
        correct: heading -> R truths.
    """

    prompts: list[str]
    images: dict[str, NDArray[np.uint8]]
    correct: dict[str, list[bool]]


class ScoreBoard:
    """One suite's scores in one run, as curves, figures, files and a table; for the process of rank 0 only.

    Args:
        directory: for the PNG files.
        suite: its name.
        levels: what to show beside the scores.
        writers: of TensorBoard; none is fine.
    """

    def __init__(self, directory: Path, suite: str, levels: Levels, writers: Sequence[SummaryWriter] = ()) -> None:
        self.directory = directory
        self.suite = suite
        self.levels = levels
        self.writers = writers

    def plot(self, records: Sequence[ScoreRecord]) -> None:
        """Adds a point to every curve of each of ``records``, and to the two levels."""
        for writer in self.writers:
            for record in records:
                numbers = record.scores.values() | record.also | {"nfe": record.nfe, "seconds": record.seconds}
                for name, value in numbers.items():
                    writer.add_scalar(f"eval/{self.suite}/{name}/{record.label}", value, record.step)
            for level, scores in (("ceiling", self.levels.ceiling), ("chance", self.levels.chance)):
                for name, value in ({**scores.correct, "overall": scores.overall} if scores else {}).items():
                    for step in {record.step for record in records}:
                        writer.add_scalar(f"eval/{self.suite}/{name}/{level}", value, step)

    def show(self, records: Sequence[ScoreRecord], sheet: Sheet) -> None:
        """Shows what was drawn, and the score against the number of steps, as images and PNG files."""
        step = records[-1].step
        self._show("contact_sheet", contact_sheet(sheet.prompts, sheet.images, sheet.correct), step)
        series = {"this run": {record.steps: record.scores for record in _main(records)}}
        if self.levels.reference:
            series[self.levels.reference_name] = {r.steps: r.scores for r in _main(self.levels.reference)}
        self._show("step_counts", step_count_figure(series, self.levels.ceiling, self.levels.chance), step)

    def show_curves(self, history: ScoreHistory, records: Sequence[ScoreRecord]) -> None:
        """Shows the training so far, one line for each step count."""
        curves = {}
        for record in _main(records):
            points = history.curve(record.label)
            names = ("overall", *points[-1].scores.correct) if points else ()
            curves[record.steps] = {
                name: [(point.step, point.scores.values()[name]) for point in points] for name in names
            }
        reference = {record.steps: record.scores for record in _main(self.levels.reference)}
        levels = self.levels
        figure = training_curves(curves, levels.ceiling, levels.chance, reference, levels.reference_name)
        self._show("training_curves", figure, records[-1].step)

    def table(self, records: Sequence[ScoreRecord]) -> str:
        """The scores of ``records`` in columns; the reference's, the ceiling and chance below them."""
        rows = {heading(record): record.scores for record in records}
        for record in self.levels.reference:
            rows[f"{self.levels.reference_name}: {heading(record)}"] = record.scores
        rows |= {
            name: scores
            for name, scores in (("ceiling", self.levels.ceiling), ("chance", self.levels.chance))
            if scores is not None
        }
        return _aligned(score_table(rows))

    def _show(self, name: str, figure: Figure, step: int) -> None:
        from PIL import Image

        png = io.BytesIO()
        figure.savefig(png, format="png")
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / f"{name}.png").write_bytes(png.getvalue())
        pixels = np.asarray(Image.open(png).convert("RGB"))
        for writer in self.writers:
            writer.add_image(f"eval/{self.suite}/{name}", pixels, step, dataformats="HWC")


def score_charts(suite: PromptSuite) -> Layout:
    """Charts of a suite's overall score, of each task, then of the rest.

    The lines are regular expressions, the same in every run, whatever its step counts: TensorBoard shows the charts
    of all runs of a folder together, and those that differ twice.
    """
    prompts = suite.prompts()
    otherwise = ["strict", *(["seen", "held_out"] if any(prompt.held_out for prompt in prompts) else [])]
    charts = {
        f"{suite.name}, {name}": multiline([f"eval/{suite.name}/{name}/{line}" for line in LINES])
        for name in ("overall", *dict.fromkeys(prompt.tag for prompt in prompts), *otherwise)
    }
    return {f"{suite.name}: score by network steps": charts}


def heading(record: ScoreRecord) -> str:
    """What a table calls a way of drawing: steps, NFE, and the guidance scale where there is any."""
    guidance = "" if record.guidance == 1 else f", guidance {record.guidance:g}"
    return f"{step_name(record.steps)}, {record.nfe} NFE{guidance}"


def _main(records: Sequence[ScoreRecord]) -> list[ScoreRecord]:
    """Those drawn with the main guidance scale, whose labels are bare."""
    return [record for record in records if record.label == f"{record.steps}step"]


def _aligned(table: str) -> str:
    """A Markdown table without its marks, its columns as wide as they need to be."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.replace("**", "").splitlines()]
    del rows[1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
