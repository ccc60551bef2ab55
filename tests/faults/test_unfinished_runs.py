"""A run that is killed near its end is finished by the same call."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from benchmarks import fault_runner
from emf_lightning.callbacks.scores.score_history import ScoreHistory
from emf_lightning.cli import main
from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL
from tests.cli.world import BASE

DIES = "tests.faults.test_unfinished_runs.Dies"
SUITE = "{class_path: ShapesSuite, init_args: {per_task: 2, scenes_per_task: 2}}"
AT_THE_END = f"""init_args: {{save_last: true}}
    - class_path: {DIES}
      init_args: {{hook: on_train_end}}
    - TrainingLog
    - class_path: FewStepSampling
      init_args: {{steps: [1, 2], images_per_task: 2, final_images_per_task: 2, suite: {SUITE}}}
    - SaveNetwork
    - class_path: RunSummary
      init_args: {{images_per_prompt: 0, suite: {SUITE}}}"""


class Dies(Callback):
    """Kills all processes of the group in one hook, at the first call in this working directory."""

    def __init__(self, hook: str) -> None:
        def die(trainer: Any, *_: Any) -> None:
            mark = Path(f"died-{hook}")
            if not mark.exists():
                mark.touch()
                os.killpg(0, signal.SIGKILL)

        setattr(self, hook, die)


def call(place: Path, *arguments: str) -> fault_runner.Ending:
    return fault_runner.run(partial(main, list(arguments)), place)


def test_a_run_killed_before_its_final_scores_makes_them_when_it_is_resumed(tmp_path):
    (tmp_path / "run.yaml").write_text(BASE.replace("init_args: {save_last: true}", AT_THE_END))
    write_shards(SMALL, tmp_path / "shards", 16, samples_per_shard=8)
    run = tmp_path / "runs/tiny/version_0"
    assert call(tmp_path, "fit", "--config", "run.yaml").status == -signal.SIGKILL
    assert (run / "checkpoints/last.ckpt").is_file() and not (run / "network").exists()
    assert "final" not in {record.stage for record in ScoreHistory.read(run / "shapes/scores.jsonl", "x").records}

    resumed = call(tmp_path, "fit", "--config", "run.yaml", "--ckpt_path", "last")
    assert resumed.status == 0, resumed.output
    records = ScoreHistory.read(run / "shapes/scores.jsonl", "x").records
    assert [r.sampling.steps for r in records if r.stage == "final" and r.step == 2] == [1, 2]
    for name in ("summary.json", "network/config.json", "network/digests.json", "shapes/training_curves.png"):
        assert (run / name).stat().st_size, name
    report = call(tmp_path, "report", str(run))
    assert report.status == 0 and (tmp_path / "report/report.md").is_file(), report.output
