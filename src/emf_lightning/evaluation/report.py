"""The scores of checkpoints as one report: JSON for programs, Markdown in the layout of published tables for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emf_lightning.evaluation.published import PUBLISHED, PublishedRow
from emf_lightning.evaluation.score import HEADINGS

REPORT = "report.json"

FAMILIES = {"geneval_hf": "geneval"}
"""Metrics whose published sibling has another judge: their numbers stand in columns of their own."""
TABLE_4 = ("dpg", "hps")
STYLES = {"anime": "anime", "concept-art": "concept art", "paintings": "painting", "photo": "photo", "score": "average"}


@dataclass(frozen=True)
class ReportRow:
    """One metric of one checkpoint, drawn in one way.

    Attributes:
        run: what the checkpoint is called.
        metric: name of the metric.
        title: what it is called in tables.
        weights: ``averaged`` or ``trained``.
        step: optimiser steps taken.
        steps: network steps.
        guidance: scale of classifier-free guidance; 1 is none.
        nfe: network evaluations per image.
        images: drawn, over all seeds.
        seeds: of the noise.
        scores: name -> value; ``score`` is the main one, ``se`` its standard error where there is one.
        seed_spread: standard deviation of ``score`` over seeds; NaN for one seed.
        seconds: that drawing and scoring took.
        settings: of the metric: model, weights, protocol.
    """

    run: str
    metric: str
    title: str
    weights: str
    step: int
    steps: int
    guidance: float
    nfe: int
    images: int
    seeds: tuple[int, ...]
    scores: dict[str, float]
    seed_spread: float = math.nan
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The words for the checkpoint in tables."""
        name = self.run if self.weights == "averaged" else f"{self.run}, not averaged"
        return name if self.guidance == 1 else f"{name}, guidance {self.guidance:g}"


@dataclass(frozen=True)
class Report:
    """Rows of one or several checkpoints.

    Attributes:
        rows: in the order of the tables.
        about: what holds for all of them, e.g. the checkpoint and the libraries' versions.
    """

    rows: tuple[ReportRow, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Writes ``report.json`` and ``report.md`` into ``directory``, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"about": self.about, "rows": [asdict(row) for row in self.rows]}
        (directory / REPORT).write_text(json.dumps(content, indent=1) + "\n")
        (directory / "report.md").write_text(self.markdown())

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a ``report.json``.

        Raises:
            ValueError: where the file holds something else.
        """
        try:
            content = json.loads(path.read_text())
            rows = tuple(ReportRow(**{**row, "seeds": tuple(row["seeds"])}) for row in content["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no report of `emf test` ({error}); make it anew") from error
        return cls(rows, content["about"])

    def metrics(self) -> dict[str, str]:
        """Name -> title of every metric, in the order of the rows."""
        return {row.metric: row.title for row in self.rows}

    def of(self, metric: str) -> list[ReportRow]:
        """The rows of one metric."""
        return [row for row in self.rows if row.metric == metric]

    def markdown(self) -> str:
        """All tables: tasks as in the paper's Table 3, DPG-Bench and HPS as in its Table 4, then what else there is."""
        parts = ["# Scores\n"]
        parts += [f"- {name}: {value}" for name, value in self.about.items()]
        parts.append("")
        in_table_4 = [name for name in self.metrics() if name.partition("_")[0] in TABLE_4]
        for name, title in self.metrics().items():
            rows = self.of(name)
            if name in in_table_4:
                continue
            parts += [f"## {title}\n", _facts(rows), ""]
            parts += [tasks_table(rows) if set(HEADINGS) & set(rows[0].scores) else plain_table(rows), ""]
        if in_table_4:
            rows = [row for name in in_table_4 for row in self.of(name)]
            parts += ["## DPG-Bench and HPS v2.1\n", _facts(rows), "", preference_table(rows), ""]
        return "\n".join(parts)


def tasks_table(rows: Sequence[ReportRow]) -> str:
    """GenEval's tasks and their mean by model and steps, as Table 3; published rows where they are of the same tasks.

    Published shares stand in the same columns, but their mean in one of its own where another judge gave it.
    """
    family = FAMILIES.get(rows[0].metric, rows[0].metric)
    published = [row for row in PUBLISHED if family in row.scores]
    tasks = [task for task in HEADINGS if task in rows[0].scores]
    ours = "overall" if family == rows[0].metric else "overall (this detector)"
    columns = ["model", "steps", "NFE", *(HEADINGS[task] for task in tasks), ours, "± se", "± seeds"]
    lines = []
    for row in rows:
        cells = {"model": row.model, "steps": str(row.steps), "NFE": str(row.nfe)}
        cells |= {HEADINGS[task]: f"{row.scores[task]:.3f}" for task in tasks if task in row.scores}
        cells |= {ours: f"**{row.scores['score']:.3f}**", "± se": _number(row.scores.get("se"))}
        lines.append(cells | {"± seeds": _number(row.seed_spread)})
    if published:
        theirs = "overall" if ours == "overall" else "overall (published, its own detector)"
        if theirs not in columns:
            columns.append(theirs)
        for known in published:
            scores = known.scores[family]
            cells = {"model": known.model, "steps": str(known.steps), theirs: f"{scores['score']:.2f}"}
            if theirs == ours:
                cells |= {HEADINGS[task]: f"{scores[task]:.2f}" for task in tasks}
            else:
                cells |= {HEADINGS[task]: f"({scores[task]:.2f})" for task in tasks}
            lines.append(cells)
    return _table(columns, lines)


def preference_table(rows: Sequence[ReportRow]) -> str:
    """DPG-Bench and HPS by model and steps, as Table 4; another judge's DPG in a column of its own."""
    titles = {row.metric: row.title for row in rows if row.metric.startswith("dpg")}
    has_hps = any(row.metric == "hps" for row in rows)
    columns = ["model", "steps", "NFE", *titles.values()]
    if "dpg" not in titles and titles:
        columns.append("DPG-Bench (published, mPLUG)")
    columns += [f"HPS {name}" for name in STYLES.values()] if has_hps else []
    lines: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault((row.model, row.steps), {"model": row.model, "steps": str(row.steps)})
        cells["NFE"] = str(row.nfe)
        error = f" ± {row.scores['se']:.2f}" if "se" in row.scores else ""
        if row.metric == "hps":
            cells |= {f"HPS {STYLES[n]}": f"{v:.2f}" for n, v in row.scores.items() if n in STYLES}
            cells[f"HPS {STYLES['score']}"] += error
        else:
            cells[row.title] = f"{row.scores['score']:.2f}{error}"
    for known in PUBLISHED:
        cells = _published_preferences(known, titles, has_hps)
        if cells:
            lines[f"{known.model} ", known.steps] = {"model": known.model, "steps": str(known.steps), **cells}
    return _table(columns, list(lines.values()))


def _published_preferences(row: PublishedRow, titles: Mapping[str, str], has_hps: bool) -> dict[str, str]:
    cells = {}
    if titles and "dpg" in row.scores:
        column = titles.get("dpg", "DPG-Bench (published, mPLUG)")
        cells[column] = f"{row.scores['dpg']['score']:.2f}"
    if has_hps and "hps" in row.scores:
        cells |= {f"HPS {STYLES[name]}": f"{value:.2f}" for name, value in row.scores["hps"].items()}
    return cells


def plain_table(rows: Sequence[ReportRow]) -> str:
    """Every number of a metric by model and steps."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    lines = [
        {"model": row.model, "steps": str(row.steps), "NFE": str(row.nfe)}
        | {name: f"{value:.4g}" for name, value in row.scores.items()}
        for row in rows
    ]
    return _table(["model", "steps", "NFE", *names], lines)


def _facts(rows: Sequence[ReportRow]) -> str:
    """What a reader needs to compare: images, seeds, settings."""
    images = " / ".join(dict.fromkeys(f"{row.images:,}" for row in rows))
    seeds = " / ".join(dict.fromkeys(", ".join(map(str, row.seeds)) or "as in training" for row in rows))
    settings = {f"{name} {value}": None for row in rows for name, value in row.settings.items() if value is not None}
    return f"{images} images each, noise seeds {seeds}" + "".join(f", {line}" for line in settings) + "."


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _table(columns: Sequence[str], lines: Iterable[Mapping[str, str]]) -> str:
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows += ["| " + " | ".join(line.get(column, "") for column in columns) + " |" for line in lines]
    return "\n".join(rows)
