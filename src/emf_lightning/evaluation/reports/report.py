"""Report of the scores of checkpoints: JSON, and Markdown in the layout of published tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emf_lightning.evaluation.geneval.task_scores import HEADINGS
from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.reports.published import PUBLISHED, PUBLISHED_FID
from emf_lightning.files import to_json, write_atomic

REPORT = "report.json"

FAMILIES = {"geneval_hf": "geneval"}
"""Metric -> published metric of the same tasks with another detector; their overall scores have separate columns."""
TABLE_4 = ("dpg", "hps")
OFFICIAL = "dpg_official"
"""DPG-Bench as published: mPLUG's answers, counted as its script counts them."""
STYLES = {"anime": "anime", "concept-art": "concept art", "paintings": "painting", "photo": "photo", "score": "average"}
LEVELS = {"ceiling": "ceiling: clean images of the prompt", "chance": "chance: of another prompt of its task"}
SPLIT = {"seen": "seen", "held_out": "held out"}
"""Score -> heading: compositions that the training images show, and compositions that they do not show."""


@dataclass(frozen=True)
class ReportRow:
    """One metric of one checkpoint at one step count and guidance scale.

    Attributes:
        run: name of the checkpoint.
        weights: ``averaged`` or ``trained``.
        step: optimiser steps taken.
        steps: network steps.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        nfe: network evaluations per image.
        images: number of images, over all seeds.
        seeds: seeds of the noise.
        scores: name -> value; ``score`` is the main one, ``se`` its standard error where there is one.
        seed_spread: standard deviation of ``score`` over seeds; NaN for one seed.
        seconds: time that sampling and scoring took.
        settings: the metric's settings: model, weights, protocol.
        benchmark: name of the metric whose prompts were sampled; empty where that is ``metric`` itself.
    """

    run: str
    metric: str
    title: str
    weights: str
    step: int
    steps: int
    guidance_scale: float
    nfe: int
    images: int
    seeds: tuple[int, ...]
    scores: dict[str, float]
    seed_spread: float = math.nan
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    benchmark: str = ""

    @property
    def model(self) -> str:
        """Name of the checkpoint in tables: the run, and weights and guidance scale unless they are the usual ones."""
        name = self.run if self.weights == "averaged" else f"{self.run}, not averaged"
        return name if self.guidance_scale == 1 else f"{name}, guidance {self.guidance_scale:g}"

    @property
    def cells(self) -> dict[str, str]:
        """Cells that every table begins with."""
        return {"model": self.model, "steps": str(self.steps), "NFE": str(self.nfe)}


@dataclass(frozen=True)
class Report:
    """Rows of one or several checkpoints.

    Attributes:
        rows: rows in the order of the tables.
        about: facts common to all rows, e.g. the checkpoint and the libraries' versions.
        levels: metric -> ``ceiling`` or ``chance`` -> scores, where they are known.
    """

    rows: tuple[ReportRow, ...]
    about: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Writes ``report.json`` and ``report.md`` into ``directory``, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"about": self.about, "levels": self.levels, "rows": [asdict(row) for row in self.rows]}
        write_atomic(directory / REPORT, to_json(content))
        write_atomic(directory / "report.md", self.markdown())

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a ``report.json``.

        Raises:
            ValueError: where the file holds something else.
        """
        try:
            content = json.loads(path.read_text())
            rows = tuple(_row(row) for row in content["rows"])
            levels = {
                metric: {level: _numbers(scores) for level, scores in known.items()}
                for metric, known in content.get("levels", {}).items()
            }
            about = dict(content["about"])
            if not rows:
                raise ValueError("it has no rows")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no report of `emf test` ({error}); make it anew") from error
        return cls(rows, about, levels)

    def groups(self) -> list[list[ReportRow]]:
        """The rows that belong into one table: those of one metric of one benchmark's images."""
        groups: dict[tuple[str, str], list[ReportRow]] = {}
        for row in self.rows:
            groups.setdefault((row.benchmark or row.metric, row.metric), []).append(row)
        return list(groups.values())

    def markdown(self) -> str:
        """All tables: tasks as in the paper's Table 3, other metrics, DPG-Bench and HPS as in its Tables 4 and 6."""
        parts = ["# Scores\n", *(f"- {name}: {value}" for name, value in self.about.items()), ""]
        in_table_4 = []
        for rows in self.groups():
            if rows[0].metric.partition("_")[0] in TABLE_4:
                in_table_4.append(rows)
                continue
            has_tasks = bool(set(HEADINGS) & set(rows[0].scores))
            table = tasks_table(rows, self.levels.get(rows[0].metric, {})) if has_tasks else plain_table(rows)
            parts += [f"## {rows[0].title}\n", _facts(rows), "", table, ""]
        if in_table_4:
            everything = [row for rows in in_table_4 for row in rows]
            parts += ["## DPG-Bench and HPS v2.1\n", _facts(everything), "", preference_table(everything), ""]
        for rows in in_table_4:
            if categories := _categories(rows):
                parts += [f"## {rows[0].title}: categories\n", categories_table(rows, categories), "", CATEGORIES, ""]
        return "\n".join(parts)


def tasks_table(rows: Sequence[ReportRow], levels: Mapping[str, Mapping[str, float]]) -> str:
    """GenEval's tasks and their mean by model and steps, as Table 3, with published rows of the same tasks.

    Published shares are in the same columns; the published mean of another detector has its own column. The rows of
    ``levels``, ceiling and chance, follow ours.
    """
    family = FAMILIES.get(rows[0].metric, rows[0].metric)
    published = [row for row in PUBLISHED if family in row.scores]
    tasks = [task for task in HEADINGS if task in rows[0].scores]
    split = [name for name in SPLIT if any(name in row.scores for row in rows)]
    ours = "overall" if family == rows[0].metric else "overall (this detector)"
    columns = ["model", "steps", "NFE", *(HEADINGS[task] for task in tasks), ours, "± se", "± seeds"]
    columns += [SPLIT[name] for name in split]
    lines = []
    for row in rows:
        lines.append(row.cells | {"± seeds": _number(row.seed_spread)} | _shares(row.scores, tasks, split, ours))
    for name, scores in levels.items():
        lines.append({"model": LEVELS[name]} | _shares(scores, tasks, split, ours))
    theirs, form = ours, "{:.2f}"
    if published and family != rows[0].metric:
        theirs, form = "overall (published, its own detector)", "({:.2f})"
        columns.append(theirs)
    for known in published:
        scores = known.scores[family]
        cells = {HEADINGS[task]: form.format(scores[task]) for task in tasks if task in scores}
        lines.append(known.cells | cells | {theirs: f"{scores['score']:.2f}"})
    return _table(columns, lines)


def _shares(scores: Mapping[str, float], tasks: Sequence[str], split: Sequence[str], overall: str) -> dict[str, str]:
    cells = {HEADINGS[task]: _number(scores.get(task)) for task in tasks}
    cells |= {
        SPLIT[name]: " ± ".join(filter(None, map(_number, map(scores.get, (name, f"{name}_se"))))) for name in split
    }
    return cells | {overall: f"**{scores['score']:.3f}**", "± se": _number(scores.get("se"))}


def preference_table(rows: Sequence[ReportRow]) -> str:
    """DPG-Bench and HPS by model and steps, as Table 4; another VQA model or count of DPG has its own column."""
    titles = {row.metric: row.title for row in rows if row.metric.startswith("dpg")}
    official = titles.get(OFFICIAL, "DPG-Bench (published, mPLUG)")
    has_hps = any(row.metric == "hps" for row in rows)
    columns = ["model", "steps", "NFE", *titles.values()]
    columns += [official] if titles and OFFICIAL not in titles else []
    columns += [f"HPS {name}" for name in STYLES.values()] if has_hps else []
    lines: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault((row.model, row.steps), {})
        cells |= row.cells
        error = f" ± {row.scores['se']:.2f}" if "se" in row.scores else ""
        error += "" if math.isnan(row.seed_spread) else f" (seeds ± {row.seed_spread:.2f})"
        if row.metric == "hps":
            cells |= {f"HPS {STYLES[n]}": f"{v:.2f}" for n, v in row.scores.items() if n in STYLES}
            cells[f"HPS {STYLES['score']}"] += error
        else:
            cells[row.title] = f"{row.scores['score']:.2f}{error}"
    published = []
    for known in PUBLISHED:
        cells = {official: f"{known.scores['dpg']['score']:.2f}"} if titles and "dpg" in known.scores else {}
        if has_hps:
            cells |= {f"HPS {STYLES[name]}": f"{value:.2f}" for name, value in known.scores.get("hps", {}).items()}
        if cells:
            published.append(known.cells | cells)
    return _table(columns, [*lines.values(), *published])


CATEGORIES = """\
Published categories were counted by mPLUG over the last of four images alone, ignoring parent questions
(`official: true`); in brackets where ours were counted otherwise."""


def categories_table(rows: Sequence[ReportRow], categories: Sequence[str]) -> str:
    """DPG-Bench's question categories by model and steps, as Table 6."""
    form = "{:.2f}" if all(row.metric == OFFICIAL for row in rows) else "({:.2f})"
    lines = [row.cells | {name: f"{row.scores[name]:.2f}" for name in categories if name in row.scores} for row in rows]
    for known in PUBLISHED:
        scores = known.scores.get("dpg", {})
        if cells := {name: form.format(scores[name]) for name in categories if name in scores}:
            lines.append(known.cells | cells)
    return _table(["model", "steps", "NFE", *categories], lines)


def _categories(rows: Sequence[ReportRow]) -> list[str]:
    """The question categories of DPG-Bench's ``rows``; subcategories are in ``report.json`` only."""
    if not rows[0].metric.startswith("dpg"):
        return []
    names = dict.fromkeys(name for row in rows for name in row.scores)
    return [name for name in names if name not in ("score", "se") and " - " not in name]


def plain_table(rows: Sequence[ReportRow]) -> str:
    """Every number of a metric by model and steps, with published FIDs of the same resolution and number of images."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    spread = [] if all(math.isnan(row.seed_spread) for row in rows) else ["± seeds"]
    lines = []
    for row in rows:
        cells = {name: f"{value:.0f}" if name == "images" else f"{value:.4g}" for name, value in row.scores.items()}
        lines.append(row.cells | cells | {"± seeds": f"{row.seed_spread:.2g}"})
    if rows[0].metric == "fid":
        protocol = rows[0].settings.get("resolution"), rows[0].settings.get("count")
        for known in PUBLISHED_FID.get(protocol, ()):
            cells = {"model": f"{known.model} (published)", "score": f"{known.scores['fid']['score']:.4g}"}
            lines.append(known.cells | cells)
    return _table(["model", "steps", "NFE", *names, *spread], lines)


def _facts(rows: Sequence[ReportRow]) -> str:
    """Numbers of images, noise seeds and settings in one sentence."""
    images = " / ".join(dict.fromkeys(f"{row.images:,}" for row in rows))
    seeds = " / ".join(dict.fromkeys(", ".join(map(str, row.seeds)) or "as in training" for row in rows))
    settings = {f"{name} {value}": None for row in rows for name, value in row.settings.items() if value is not None}
    return f"{images} images each, noise seeds {seeds}" + "".join(f", {line}" for line in settings) + "."


def _row(content: dict[str, Any]) -> ReportRow:
    """The row that was written as ``content``; earlier versions wrote ``guidance`` for ``guidance_scale``."""
    renamed = {"guidance_scale" if name == "guidance" else name: value for name, value in content.items()}
    changed = {"seeds": tuple(content["seeds"]), "scores": _numbers(content["scores"])}
    filled: dict[str, Any] = {name: math.nan if value is None else value for name, value in renamed.items()}
    return ReportRow(**filled | changed)


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """``scores`` as numbers, with NaN in place of null."""
    return {name: math.nan if value is None else float(value) for name, value in scores.items()}


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _table(columns: Sequence[str], lines: Iterable[Mapping[str, str]]) -> str:
    """A Markdown table of cells by column."""
    return markdown_table(columns, ([line.get(column, "") for column in columns] for line in lines))
