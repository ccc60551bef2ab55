"""The scores of a run, one record for each evaluation and way of drawing, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from emf_lightning.evaluation.geneval.task_scores import TaskScores


@dataclass(frozen=True)
class ScoreRecord:
    """One line of ``scores.jsonl``: the scores of one checkpoint, drawn in one way.

    Attributes:
        suite: name of the suite.
        stage: ``fit`` while training, ``final`` at its end, ``validate`` or ``test``.
        step: optimiser steps taken.
        label: of the way of drawing, e.g. ``4step``.
        steps: network steps.
        guidance: scale of classifier-free guidance.
        nfe: network evaluations per image.
        seconds: that drawing and judging took.
        scores: task by task.
        also: name -> score of further metrics of the same images.
    """

    suite: str
    stage: str
    step: int
    label: str
    steps: int
    guidance: float
    nfe: int
    seconds: float
    scores: TaskScores
    also: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What a later evaluation of the same thing replaces."""
        return self.suite, self.stage, self.step, self.label


class ScoreHistory:
    """The records of a run in the order in which they were made, by this process and by those before it.

    Args:
        records: to begin with.
    """

    def __init__(self, records: Iterable[ScoreRecord] = ()) -> None:
        self._records: dict[tuple[str, str, int, str], ScoreRecord] = {}
        self.add(records)

    @property
    def records(self) -> list[ScoreRecord]:
        """All records."""
        return list(self._records.values())

    def add(self, records: Iterable[ScoreRecord]) -> None:
        """Appends ``records``, in place of older ones of the same thing."""
        for record in records:
            self._records.pop(record.key, None)
            self._records[record.key] = record

    def curve(self, label: str) -> list[ScoreRecord]:
        """The records of one way of drawing while training, by step; of two at one step the later one."""
        of_step = {r.step: r for r in self.records if r.label == label and r.stage in ("fit", "final")}
        return [of_step[step] for step in sorted(of_step)]

    def latest(self) -> list[ScoreRecord]:
        """The last record of each way of drawing, fewest steps first."""
        last = {record.label: record for record in self.records}
        return sorted(last.values(), key=lambda record: (record.guidance, record.steps))

    def state(self) -> list[dict[str, Any]]:
        """The records in plain types, for a checkpoint."""
        return [asdict(record) for record in self.records]

    @classmethod
    def of(cls, state: Iterable[dict[str, Any]]) -> ScoreHistory:
        """The history whose ``state`` this is."""
        names = [part.name for part in fields(ScoreRecord)]
        rows = ({"also": {}} | row for row in state)  # histories from before there were further metrics have none
        kept = ({name: row[name] for name in names} | {"scores": TaskScores(**row["scores"])} for row in rows)
        return cls(ScoreRecord(**row) for row in kept)

    @classmethod
    def read(cls, path: Path, argument: str) -> ScoreHistory:
        """The history in a ``scores.jsonl``.

        Raises:
            ValueError: if the file is not there or holds something else; the message begins with ``argument``.
        """
        remedy = "give the scores.jsonl of a run"
        try:
            return cls.of(json.loads(line) for line in path.read_text().splitlines())
        except OSError as error:
            raise ValueError(f"{argument}: cannot read {str(path)!r} ({error.strerror}); {remedy}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{argument}: {str(path)!r} holds no scores ({error}); {remedy}") from error

    @classmethod
    def read_if_there(cls, path: Path) -> ScoreHistory:
        """The history in the file at ``path``, empty where there is none."""
        return cls.read(path, "earlier scores") if path.is_file() else cls()

    def write(self, path: Path) -> None:
        """Replaces the file at ``path``, at once or not at all; a line begins with ``overall`` for its readers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        lines = [{"overall": record.scores.overall, **asdict(record)} for record in self.records]
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(partial, path)
