"""The scores of a run, one record for each evaluation and sampling config, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.files import write_json_lines

DISTANCES = ("fid", "kid")
"""Beginnings of the names of metrics whose smaller number is the better one, in rows without directions."""


@dataclass(frozen=True)
class ScoreRecord:
    """The scores of one checkpoint with one sampling config: a line of ``scores.jsonl``.

    Attributes:
        suite: name of the benchmark whose prompts were sampled.
        stage: ``fit`` during training, ``final`` at its end, ``validate`` or ``test``.
        step: optimiser steps taken.
        sampling: step count and guidance scale.
        nfe: network evaluations per image.
        seconds: time that sampling and evaluation took.
        scores: verdicts of a suite, task by task; None for any other benchmark.
        metrics: name -> numbers of the other metrics of the same images: the benchmark's own, then further ones.
        images: number of images.
    """

    suite: str
    stage: str
    step: int
    sampling: SamplingConfig
    nfe: int
    seconds: float
    scores: TaskScores | None = None
    metrics: dict[str, MetricScores] = field(default_factory=dict)
    images: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """A later record of the same key replaces this one."""
        return self.suite, self.stage, self.step, self.sampling.curve

    @property
    def results(self) -> dict[str, MetricScores]:
        """Name -> numbers of every metric, the benchmark's own first; empty for prompts alone."""
        verdicts = {} if self.scores is None else {self.suite: MetricScores.of_tasks(self.scores, self.suite)}
        return verdicts | self.metrics

    @property
    def overall(self) -> float | None:
        """The benchmark's own main score; None where it has none."""
        own = self.results.get(self.suite)
        return None if own is None else own.score

    def values(self) -> dict[str, float]:
        """Every score by its name in tags: those of the benchmark, then the main number of each further metric."""
        values: dict[str, float] = {}
        for name, found in self.results.items():
            if name == self.suite:
                values |= {"overall" if key == "score" else key: value for key, value in found.values.items()}
            elif math.isfinite(found.score):
                values[name] = found.score
        return values

    def to_row(self) -> dict[str, Any]:
        """Plain values for files and checkpoints; ``overall`` and ``label`` are for other programs, never read back."""
        row = asdict(self)
        overall = {} if self.overall is None else {"overall": self.overall}
        return overall | {"label": self.sampling.tag, **row.pop("sampling"), **row}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ScoreRecord:
        """Inverts ``to_row``.

        Rows of earlier versions hold the scores alone of further metrics, as ``extra_metrics`` or ``also``, if any.
        """
        scores = None if row.get("scores") is None else TaskScores.from_row(row["scores"])
        alone = row.get("extra_metrics", row.get("also", {}))
        metrics = {
            name: MetricScores(name, name, {"score": float(v)}, not name.startswith(DISTANCES))
            for name, v in alone.items()
        }
        return cls(
            suite=row["suite"],
            stage=row["stage"],
            step=int(row["step"]),
            nfe=int(row["nfe"]),
            seconds=float(row["seconds"]),
            sampling=SamplingConfig.from_row(row),
            scores=scores,
            metrics=metrics | {name: MetricScores.from_row(found) for name, found in row.get("metrics", {}).items()},
            images=int(row.get("images", 0)) or (sum(scores.images.values()) if scores else 0),
        )


class ScoreHistory:
    """The records of a run and of the runs that it resumes, in the order in which they were made."""

    def __init__(self, records: Iterable[ScoreRecord] = ()) -> None:
        self._records: dict[tuple[Any, ...], ScoreRecord] = {}
        self.add(records)

    @property
    def records(self) -> list[ScoreRecord]:
        """All records."""
        return list(self._records.values())

    def of(self, suite: str) -> ScoreHistory:
        """The records of one benchmark."""
        return ScoreHistory(record for record in self.records if record.suite == suite)

    def add(self, records: Iterable[ScoreRecord]) -> None:
        """Appends ``records`` and removes older ones of the same keys."""
        for record in records:
            self._records.pop(record.key, None)
            self._records[record.key] = record

    def curve(self, sampling: SamplingConfig) -> list[ScoreRecord]:
        """The records of one sampling config during training, by step; of two at one step the later one."""
        of_step = {
            r.step: r for r in self.records if r.sampling.curve == sampling.curve and r.stage in ("fit", "final")
        }
        return [of_step[step] for step in sorted(of_step)]

    def latest(self) -> list[ScoreRecord]:
        """The record of each sampling config at the highest step, by guidance scale, then by steps.

        Of one step it is the last that was recorded. Earlier checkpoints may have been evaluated since.
        """
        last = {record.sampling.curve: record for record in sorted(self.records, key=lambda record: record.step)}
        return sorted(last.values(), key=lambda record: (record.sampling.guidance_scale or 0, record.sampling.steps))

    def to_rows(self) -> list[dict[str, Any]]:
        """The records in plain types, for a file or a checkpoint."""
        return [record.to_row() for record in self.records]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> ScoreHistory:
        """Inverts ``to_rows``, also for rows of earlier versions."""
        return cls(ScoreRecord.from_row(row) for row in rows)

    @classmethod
    def read(cls, path: Path, argument: str) -> ScoreHistory:
        """The history in a ``scores.jsonl``.

        Raises:
            ValueError: if the file is missing or holds something else; the message begins with ``argument``.
        """
        remedy = "give the scores.jsonl of a run"
        try:
            return cls.from_rows(json.loads(line) for line in path.read_text().splitlines())
        except OSError as error:
            raise ValueError(f"{argument}: cannot read {str(path)!r} ({error.strerror}); {remedy}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{argument}: {str(path)!r} holds no scores ({error}); {remedy}") from error

    @classmethod
    def read_if_there(cls, path: Path) -> ScoreHistory:
        """The history in the file at ``path``, empty where there is none."""
        return cls.read(path, "earlier scores") if path.is_file() else cls()

    def write(self, path: Path) -> None:
        """Replaces the file at ``path`` atomically."""
        write_json_lines(path, self.to_rows())
