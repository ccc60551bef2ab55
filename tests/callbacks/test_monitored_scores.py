"""Scores that a ModelCheckpoint monitors, and those of a run that goes on elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from emf_lightning.callbacks import FewStepSampling, WeightEMA
from emf_lightning.evaluation.distances.fid_kid import KernelDistance
from tests.callbacks import tiny

TAG = "eval/prompts/kid_random/1step"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


def fit(run: Path, shards: Path, *, steps: int, interval: int = 4, **resumed: str) -> tuple[ModelCheckpoint, dict]:
    """Trains with scores every ``interval`` steps and a checkpoint every 2; returns step -> score of the run's file."""
    prompts = [f"a photo of a red circle {number}" for number in range(4)]
    sampling = FewStepSampling(
        prompts=prompts, steps=[1], every_n_steps=interval, figures=False, extra_metrics=[KernelDistance()]
    )
    best = ModelCheckpoint(run / "best", "{step}", monitor=TAG, mode="min", save_top_k=-1, every_n_train_steps=2)
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=16)
    often = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = tiny.trainer(
        run, WeightEMA(decay=0.5), sampling, best, max_steps=steps, max_epochs=-1, enable_checkpointing=True, **often
    )
    trainer.fit(tiny.meanflow(), datamodule=data, **resumed)
    rows = [json.loads(line) for line in (run / "prompts/scores.jsonl").read_text().splitlines()]
    return best, {row["step"]: row["metrics"]["kid_random"]["values"]["score"] for row in rows}


def test_the_last_checkpoint_is_judged_by_its_own_score_and_a_resumed_run_knows_the_last_one(shards, tmp_path):
    best, scores = fit(tmp_path / "run", shards, steps=8)
    judged = {Path(path).stem: float(score) for path, score in best.best_k_models.items()}
    assert judged["step=4"] == pytest.approx(scores[4])
    assert judged["step=8"] == pytest.approx(scores[8])
    assert scores[4] != pytest.approx(scores[8])

    # a checkpoint and a validation come before the next evaluation, and step 8 was scored after it was saved
    saved = str(tmp_path / "run/best/step=8.ckpt")
    again, of_both = fit(tmp_path / "other", shards, steps=11, interval=12, ckpt_path=saved)
    judged = {Path(path).stem: float(score) for path, score in again.best_k_models.items()}
    assert judged["step=10"] == pytest.approx(scores[8])
    assert of_both.keys() == {0, 4, 8, 11}
    assert of_both[8] == pytest.approx(scores[8])
