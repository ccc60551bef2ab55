"""Score histories, also those of earlier versions."""

from __future__ import annotations

import json
from dataclasses import replace

from emf_lightning.evaluation.score_history import ScoreHistory


def test_the_shipped_history_of_an_earlier_version_is_read_and_written_anew(root, tmp_path):
    file = root / "experiments/shapes/parent/scores.jsonl"
    old = [json.loads(line) for line in file.read_text().splitlines()]
    history = ScoreHistory.read(file, "parent")
    history.write(tmp_path / "scores.jsonl")

    assert [(r.sampling.steps, r.sampling.guidance_scale) for r in history.latest()] == [
        (row["steps"], row["guidance"]) for row in sorted(old, key=lambda row: row["steps"])
    ]
    assert [json.loads(line)["overall"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()] == [
        row["overall"] for row in old
    ]
    assert ScoreHistory.read(tmp_path / "scores.jsonl", "copy").records == history.records


def test_further_metrics_of_an_earlier_version_are_kept(root):
    row = json.loads((root / "experiments/shapes/parent/scores.jsonl").read_text().splitlines()[0])
    (record,) = ScoreHistory.from_rows([row | {"label": "1step_cfg2", "also": {"clip": 0.5}}]).records
    assert {name: found.score for name, found in record.metrics.items()} == {"clip": 0.5}
    assert not record.sampling.is_main


def test_the_latest_scores_are_those_of_the_highest_step(root):
    (end, *_) = ScoreHistory.read(root / "experiments/shapes/parent/scores.jsonl", "parent").records
    earlier, again = (replace(end, stage="validate", step=step) for step in (end.step // 2, end.step))
    assert ScoreHistory([end, earlier]).latest() == [end]
    assert ScoreHistory([end, again, earlier]).latest() == [again]
