"""A table of any metrics' scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from emf_lightning.evaluation.geneval.task_scores import HEADINGS
from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.reports.figures import Scores


def score_table(rows: Mapping[str, Scores]) -> str:
    """A Markdown table: a row for each name, columns for each metric, its parts first, the main one ± its error."""
    metrics = {name: found for scores in rows.values() for name, found in scores.items()}
    head, cells = [""], {name: [name] for name in rows}
    for metric, first in metrics.items():
        of_rows = {name: scores.get(metric, first.of({})) for name, scores in rows.items()}
        parts = list(dict.fromkeys(part for found in of_rows.values() for part in found.parts))
        # of a suite's verdicts: images that hold nothing else, and compositions that training does not show
        further = {"strict": "strict", "held_out": "held out"} if "strict" in first.values else {}
        head += [
            *(HEADINGS.get(part, part) for part in parts),
            "overall" if parts else first.heading,
            *further.values(),
        ]
        for name, found in of_rows.items():
            cells[name] += [*map(found.text, parts), _main(found), *(_further(found, part) for part in further)]
    return markdown_table(head, list(cells.values()))


def _further(found: MetricScores, name: str) -> str:
    error = found.text(f"{name}_se")
    return f"{found.text(name)} ± {error}" if error else found.text(name)


def _main(found: MetricScores) -> str:
    if not (score := found.text()):
        return ""
    error = found.of({"score": found.error}).text()
    return f"**{score}**" + (f" ± {error}" if not math.isnan(found.error) else "")
