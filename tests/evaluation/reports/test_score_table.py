from __future__ import annotations

from emf_lightning.data.geneval_prompts import TASKS
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.reports.score_table import score_table
from tests.evaluation.reports.test_figures import distance, scores


def test_the_table_has_a_row_a_score_and_a_column_a_task():
    table = score_table({"1 step": scores(0.3), "4 steps": scores(1.0)})
    head, _, first, last = table.splitlines()
    assert head.count("|") == first.count("|") == len(TASKS) + 5
    assert "attribution" in head
    assert last.startswith("| 4 steps | 1.000 |")
    assert "**1.000** ± 0.000" in last
    assert last.endswith(f"| 1.000 ± {scores(1.0)['shapes'].values['held_out_se']:.3f} |")


def test_each_metric_has_a_column_with_its_direction_and_none_says_overall():
    clip = {"clip": MetricScores("CLIP score", "CLIP score", {"score": 24.318, "se": float("nan")})}
    table = score_table({"1 step": distance(1234.5) | clip, "2 steps": distance(7)})
    assert table.splitlines() == [
        "|  | KID x 1000, lower is better | CLIP score |",
        "|---|---|---|",
        "| 1 step | **1,234** ± 3.00 | **24.32** |",
        "| 2 steps | **7.00** ± 3.00 |  |",
    ]
