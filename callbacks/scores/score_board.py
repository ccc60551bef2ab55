"""Scores and images of an evaluation in TensorBoard and in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emf_lightning.callbacks.scores.custom_scalars import Layout, multiline
from emf_lightning.callbacks.scores.score_history import ScoreHistory, ScoreRecord
from emf_lightning.callbacks.scores.scored_images import ScoredImages
from emf_lightning.evaluation.geneval.prompt_suite import PromptSuite
from emf_lightning.evaluation.geneval.task_scores import TaskScores, score_table
from emf_lightning.evaluation.reports.figures import contact_sheet, save_figure, step_count_figure, training_curves
from emf_lightning.evaluation.sampling_config import step_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


CURVES = (r"\d+step", r"\d+step_cfg[\d.]+", "ceiling", "chance")
"""Last parts of the tags that a chart shows, as regular expressions."""


class ScoreBoard:
    """Writes one suite's scores in one run as curves, figures and a table; for the process of rank 0 only.

    Args:
        directory: folder of the PNG files.
        suite: the suite; its ceiling and chance stand beside the run's scores.
        reference: the last records of another run, to show beside this one's.
        reference_name: name of that run.
        writers: TensorBoard writers, possibly none.
    """

    def __init__(
        self,
        directory: Path,
        suite: PromptSuite,
        reference: Sequence[ScoreRecord],
        reference_name: str,
        writers: Sequence[SummaryWriter],
    ) -> None:
        self.directory = directory
        self.suite = suite.name
        self.levels = {"ceiling": suite.ceiling(), "chance": suite.chance()}
        self.reference = reference
        self.reference_name = reference_name
        self.writers = writers

    def add_scalars(self, records: Sequence[ScoreRecord]) -> None:
        """Adds a point to every curve of ``records``, to the ceiling and to chance."""
        for writer in self.writers:
            for record in records:
                numbers = record.values() | {"nfe": record.nfe, "seconds": record.seconds}
                for name, value in numbers.items():
                    writer.add_scalar(f"eval/{self.suite}/{name}/{record.sampling.tag}", value, record.step)
            for level, scores in self.levels.items():
                for name, value in ({**scores.correct, "overall": scores.overall} if scores else {}).items():
                    for step in {record.step for record in records}:
                        writer.add_scalar(f"eval/{self.suite}/{name}/{level}", value, step)

    def add_images(self, records: Sequence[ScoreRecord], results: Sequence[ScoredImages]) -> None:
        """Writes the contact sheet, and the score against the number of steps, as images and PNG files."""
        step = records[-1].step
        shown = {r.config.title: [image for image in r.images if image.image is not None] for r in results}
        prompts = [image.prompt for image in next(iter(shown.values()))]
        images = {title: np.stack([i.image for i in column if i.image is not None]) for title, column in shown.items()}
        correct = {title: [image.row["correct"] for image in column] for title, column in shown.items()}
        self._add_figure("contact_sheet", contact_sheet(prompts, images, correct), step)
        series = {"this run": _by_steps(records)}
        if self.reference:
            series[self.reference_name] = _by_steps(self.reference)
        self._add_figure("step_counts", step_count_figure(series, **self.levels), step)

    def add_training_curves(self, history: ScoreHistory, records: Sequence[ScoreRecord]) -> None:
        """Writes the score against training so far, a line for each step count of ``records``."""
        curves = {}
        for record in records:
            if record.sampling.is_main:
                points = [(point.step, point.scores.values()) for point in history.curve(record.sampling)]
                curves[record.sampling.steps] = {
                    name: [(step, values[name]) for step, values in points]
                    for name in ("overall", *record.scores.correct)
                }
        ceiling, chance, reference = self.levels["ceiling"], self.levels["chance"], _by_steps(self.reference)
        figure = training_curves(curves, ceiling, chance, reference, self.reference_name)
        self._add_figure("training_curves", figure, records[-1].step)

    def table(self, records: Sequence[ScoreRecord]) -> str:
        """The scores of ``records`` in columns, then those of the reference, the ceiling and chance."""
        rows = {_heading(record): record.scores for record in records}
        rows |= {f"{self.reference_name}: {_heading(record)}": record.scores for record in self.reference}
        rows |= {level: scores for level, scores in self.levels.items() if scores is not None}
        return _plain_text(score_table(rows))

    def _add_figure(self, name: str, figure: Figure, step: int) -> None:
        from PIL import Image

        self.directory.mkdir(parents=True, exist_ok=True)
        save_figure(figure, self.directory / f"{name}.png")
        pixels = np.asarray(Image.open(self.directory / f"{name}.png").convert("RGB"))
        for writer in self.writers:
            writer.add_image(f"eval/{self.suite}/{name}", pixels, step, dataformats="HWC")


def score_charts(suite: PromptSuite) -> Layout:
    """Charts of a suite's overall score, of each task, then of the other scores.

    The curves are regular expressions, the same in every run whatever its step counts: TensorBoard shows the charts of
    all runs of a folder together, and shows a chart twice where two runs define it differently.
    """
    prompts = suite.prompts()
    others = ["strict", *(["seen", "held_out"] if any(prompt.held_out for prompt in prompts) else [])]
    charts = {
        f"{suite.name}, {name}": multiline([f"eval/{suite.name}/{name}/{curve}" for curve in CURVES])
        for name in ("overall", *dict.fromkeys(prompt.tag for prompt in prompts), *others)
    }
    return {f"{suite.name}: score by network steps": charts}


def _by_steps(records: Sequence[ScoreRecord]) -> dict[int, TaskScores]:
    """Network steps -> scores with the main guidance scale."""
    return {record.sampling.steps: record.scores for record in records if record.sampling.is_main}


def _heading(record: ScoreRecord) -> str:
    """Heading of a table's row: steps, NFE, and the guidance scale unless it is 1."""
    scale = record.sampling.guidance_scale
    guidance = "" if scale in (None, 1) else f", guidance {scale:g}"
    return f"{step_name(record.sampling.steps)}, {record.nfe} NFE{guidance}"


def _plain_text(table: str) -> str:
    """A Markdown table as plain text in columns of the width of their cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.replace("**", "").splitlines()]
    del rows[1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
