"""A run that is killed near its end, and a comparison whose training is left, are finished by the same call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from benchmarks import fault_runner
from emf_lightning.cli import main
from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.score_history import ScoreHistory
from tests.cli.world import BASE
from tests.test_compare import EXPERIMENT


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Lets the trainings of a comparison, processes of their own, find the callbacks of this file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))


DIES, LINGERS = (f"tests.faults.test_unfinished_runs.{name}" for name in ("Dies", "Lingers"))
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


class Lingers(Callback):
    """Takes long over the second step, at the first call in this working directory."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        mark = Path("in-step")
        if trainer.global_step == 1 and not mark.exists():
            mark.touch()
            time.sleep(20)


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


@pytest.mark.slow
def test_a_comparison_waits_for_the_training_that_a_killed_one_left(tmp_path, monkeypatch, root):
    monkeypatch.setattr(fault_runner, "HUNG_AFTER", 900)
    write_shards(SMALL, tmp_path / "shards", 32, samples_per_shard=16)
    (tmp_path / "experiments").symlink_to(root / "experiments")
    lingers = f", callbacks+: [{{class_path: {LINGERS}}}]"
    settings = {"model": "FlowMapModule", "settings": "caption_dropout: 0.0", "trainer": lingers}
    (tmp_path / "one.yaml").write_text(EXPERIMENT.format(root=root, shards=tmp_path / "shards", **settings))
    arguments = ["compare", "--out", "out", "--experiments", "[one.yaml]", "--steps", "3", "--images_per_prompt", "0"]
    with (tmp_path / "first.txt").open("w") as said:
        command = [sys.executable, "-m", "emf_lightning", *arguments]
        first = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, start_new_session=True)
    while not (tmp_path / "in-step").exists():
        assert first.poll() is None, (tmp_path / "first.txt").read_text()
        time.sleep(0.1)
    first.kill()  # not its training
    again = call(tmp_path, *arguments)
    assert again.status == 0, again.output
    assert "waiting up to" in again.output
    assert "state of step 2" in (tmp_path / "first.txt").read_text() and "Restor" in again.output
    assert (tmp_path / "out/one/steps3-seed0/summary.json").is_file()


@pytest.mark.slow
def test_a_killed_comparison_keeps_what_is_done_and_finishes_the_rest(tmp_path, monkeypatch, root):
    monkeypatch.setattr(fault_runner, "HUNG_AFTER", 900)
    shards, files, hooks = tmp_path / "shards", [], ("on_train_batch_end", "on_train_end")
    write_shards(SMALL, shards, 32, samples_per_shard=16)
    (tmp_path / "experiments").symlink_to(root / "experiments")
    for hook in hooks:
        dies = f", callbacks+: [{{class_path: {DIES}, init_args: {{hook: {hook}}}}}]"
        settings = {"model": "FlowMapModule", "settings": "caption_dropout: 0.0", "trainer": dies}
        files.append(tmp_path / f"{hook}.yaml")
        files[-1].write_text(EXPERIMENT.format(root=root, shards=shards, **settings))
    names = ",".join(map(str, files))
    arguments = ["compare", "--out", "out", "--experiments", f"[{names}]", "--steps", "2", "--images_per_prompt", "0"]
    first, second = (tmp_path / "out" / hook / "steps2-seed0" for hook in hooks)

    assert call(tmp_path, *arguments).status == -signal.SIGKILL  # in the first training, before a checkpoint
    assert not (first / "summary.json").exists() and not second.exists()
    assert call(tmp_path, *arguments).status == -signal.SIGKILL  # after the second one's last step
    done = (first / "summary.json").stat().st_mtime_ns
    assert (second / "checkpoints/last.ckpt").is_file() and not (second / "summary.json").exists()
    ending = call(tmp_path, *arguments)
    assert ending.status == 0, ending.output
    assert f"training: {second.relative_to(tmp_path)}" in ending.output
    assert (first / "summary.json").stat().st_mtime_ns == done
    table = (tmp_path / "out/comparison.md").read_text()
    assert all(f"| {hook} |" in table for hook in hooks)
