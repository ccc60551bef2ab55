"""Scores and images of an evaluation in the loggers and in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emf_lightning.callbacks.loggers.score_log import Points, ScoreLog
from emf_lightning.callbacks.scores.scored_images import ScoredImages
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.reports.contact_sheet import contact_sheet
from emf_lightning.evaluation.reports.figures import Scores, save_figure, step_count_figure, training_curves
from emf_lightning.evaluation.reports.score_table import score_table
from emf_lightning.evaluation.sampling_config import step_name
from emf_lightning.evaluation.score_history import ScoreHistory, ScoreRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PARENT = "parent.npz"
"""File of the images of the weights that a run starts from."""


class ScoreBoard:
    """Writes one benchmark's scores in one run as curves, figures and a table; for the process of rank 0 only.

    Args:
        directory: folder of the PNG files.
        benchmark: the benchmark; its ceiling and chance stand beside the run's scores, where it knows them.
        reference: the last records of another run, to show beside this one's.
        reference_name: name of that run.
        log: curves and pictures in the trainer's loggers.
        run: name of the run in the contact sheet.
    """

    def __init__(
        self,
        directory: Path,
        benchmark: ImageMetric,
        reference: Sequence[ScoreRecord],
        reference_name: str,
        log: ScoreLog,
        run: str = "",
    ) -> None:
        self.directory = directory
        self.suite = benchmark.name
        own = MetricScores(benchmark.name, benchmark.unit or benchmark.title, {}, benchmark.higher_is_better)
        self.levels = {level: own.of(scores) for level, scores in benchmark.levels().items()}
        self.reference = reference
        self.reference_name = reference_name
        self.log = log
        self.run = run

    def add_scalars(self, records: Sequence[ScoreRecord], *, to_files: bool = True) -> None:
        """Adds a point to every curve of ``records``, to the ceiling, to chance and to the reference's."""
        self.log.add(self._group, self._points(records), to_files=to_files)

    def go_on(self, records: Sequence[ScoreRecord], here: Sequence[ScoreRecord]) -> None:
        """Logs the ``records`` of a run that goes on; those ``here`` are in its directory already."""
        self.log.go_on(self._group, self._points(records), self._points(here))

    @property
    def _group(self) -> str:
        return f"eval/{self.suite}"

    def _points(self, records: Sequence[ScoreRecord]) -> list[Points]:
        points = []
        for record in records:
            values = record.values() | {"nfe": record.nfe, "seconds": record.seconds}
            points.append(Points(record.sampling.title, record.sampling.tag, record.step, values))
        levels = {name: found.parts | {"overall": found.score} for name, found in self.levels.items()}
        if self.reference:  # at its largest number of steps, with its main guidance scale
            best = max(self.reference, key=lambda record: (record.sampling.is_main, record.sampling.steps))
            levels[self.reference_name] = best.values()
        names = {name for record in records for name in record.values()}
        for level, scores in levels.items():
            known = {name: value for name, value in scores.items() if name in names}
            steps = dict.fromkeys(record.step for record in records)
            points += [Points(level, level, step, known) for step in steps if known]
        return points

    def keep_parent(self, result: ScoredImages) -> None:
        """Keeps the images of the weights that the run starts from, for the contact sheets of the whole run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        scale, steps = result.config.guidance_scale, step_name(result.config.steps)
        heading = f"{self.reference_name}, {steps}" + ("" if scale in (None, 1) else f", cfg{scale:g}")
        shown = {f"{one.index} {one.prompt}": one.image for one in result.images if one.image is not None}
        np.savez(self.directory / PARENT, heading=heading, prompts=[*shown], images=np.stack([*shown.values()]))

    def add_contact_sheet(self, records: Sequence[ScoreRecord], results: Sequence[ScoredImages]) -> None:
        """Writes the contact sheet: a column for each of ``results``, then the parent's, if it was kept."""
        step = records[-1].step
        shown = {r.config.title: [image for image in r.images if image.image is not None] for r in results}
        prompts = [image.prompt for image in next(iter(shown.values()))]
        images = {title: np.stack([i.image for i in column if i.image is not None]) for title, column in shown.items()}
        judged = {title: column for title, column in shown.items() if all("correct" in image.row for image in column)}
        correct = {title: [image.row["correct"] for image in column] for title, column in judged.items()}
        if (self.directory / PARENT).is_file():
            with np.load(self.directory / PARENT) as kept:
                of_prompt = dict(zip(kept["prompts"].tolist(), kept["images"], strict=True))
                keys = [f"{image.index} {image.prompt}" for image in next(iter(shown.values()))]
                images[str(kept["heading"])] = np.stack(
                    [of_prompt.get(key, np.full_like(kept["images"][0], 255)) for key in keys]
                )
        title = f"{self.run}, step {step:,}" if self.run else f"step {step:,}"
        self._add_figure("contact_sheet", contact_sheet(prompts, images, correct, title), step)

    def add_step_counts(self, records: Sequence[ScoreRecord]) -> None:
        """Writes the scores against the number of steps, unless there are none."""
        if any(record.results for record in records):
            ours, theirs = self._guidance(records)
            series = {f"this run{ours}": _by_steps(records)}
            if reference := self._reference_of(records):
                series[f"{self.reference_name}{theirs}"] = _by_steps(reference)
            self._add_figure("step_counts", step_count_figure(series, self._levels()), records[-1].step)

    def add_training_curves(self, history: ScoreHistory, records: Sequence[ScoreRecord]) -> None:
        """Writes the scores against training so far, a line for each step count of ``records``; none without scores."""
        curves = {
            record.sampling.steps: [(point.step, point.results) for point in history.curve(record.sampling)]
            for record in records
            if record.sampling.is_main
        }
        if any(scores for points in curves.values() for _, scores in points):
            ours, theirs = self._guidance(records)
            remark = f"this run{ours}; {self.reference_name}{theirs}" if ours else ""
            reference = _by_steps(self._reference_of(records))
            figure = training_curves(curves, self._levels(), reference, self.reference_name, remark)
            self._add_figure("training_curves", figure, records[-1].step)

    def table(self, records: Sequence[ScoreRecord]) -> str:
        """The scores of ``records`` in columns, then those of the reference, the ceiling and chance; empty for none."""
        if not any(record.results for record in records):
            return ""
        rows: dict[str, Scores] = {_heading(record): record.results for record in records}
        for record in self._reference_of(records):
            rows[f"{self.reference_name}: {_heading(record)}"] = record.results
        return _plain_text(score_table(rows | self._levels()))

    def _levels(self) -> dict[str, Scores]:
        return {level: {self.suite: scores} for level, scores in self.levels.items()}

    def _reference_of(self, records: Sequence[ScoreRecord]) -> list[ScoreRecord]:
        """The records of the reference that share a metric with ``records``."""
        known = {name for record in records for name in record.results}
        return [record for record in self.reference if known.intersection(record.results)]

    def _guidance(self, records: Sequence[ScoreRecord]) -> tuple[str, str]:
        """Remarks on the guidance of this run and of the reference; empty where it is the same."""
        both = (records, self.reference)
        sides = [{r.sampling.guidance_scale or 1.0 for r in side if r.sampling.is_main} for side in both]
        if not sides[1] or sides[0] == sides[1]:
            return "", ""
        words = [" and ".join("no guidance" if s == 1 else f"guidance {s:g}" for s in sorted(side)) for side in sides]
        return f", {words[0]}", f", {words[1]}"

    def _add_figure(self, name: str, figure: Figure, step: int) -> None:
        from PIL import Image

        self.directory.mkdir(parents=True, exist_ok=True)
        save_figure(figure, self.directory / f"{name}.png")
        pixels = np.asarray(Image.open(self.directory / f"{name}.png").convert("RGB"))
        self.log.picture(self._group, name, pixels, step)


def _by_steps(records: Sequence[ScoreRecord]) -> dict[int, Scores]:
    """Network steps -> scores with the main guidance scale."""
    return {record.sampling.steps: record.results for record in records if record.sampling.is_main}


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
