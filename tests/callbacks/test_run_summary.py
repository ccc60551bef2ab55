from __future__ import annotations

import json
import time

import pytest
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks import FewStepSampling, RunSummary, TrainingLog
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from tests.callbacks import tiny

SUITE = ShapesSuite(per_task=4, scenes_per_task=4)


@pytest.fixture
def data(tmp_path):
    return tiny.data(tiny.shards(tmp_path / "shards"))


class Clock(Callback):
    """A clock that stands still but for a quarter of a second in each step."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def on_train_batch_start(self, *_):
        self.now += 0.25


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def summary_of(run, data, *callbacks, **settings) -> dict:
    callbacks = (*callbacks, RunSummary(SUITE, [1, 2], prompts_per_task=2, batch_size=16, **settings))
    tiny.trainer(run, *callbacks).fit(tiny.meanflow(), datamodule=data)
    return json.loads((run / "summary.json").read_text())


def test_cost_and_distances_are_written(tmp_path, data, clock):
    summary = summary_of(tmp_path / "run", data, clock, TrainingLog(), images_per_prompt=4)
    assert (summary["model"], summary["steps"]) == ("MeanFlow", 4)
    assert (summary["step_seconds"], summary["seconds"]) == (0.25, 1)
    assert 0.1 < summary["memory_gb"] < 100
    found = summary["distribution"]
    assert [(label, values["nfe"]) for label, values in found.items()] == [("real", 0), ("1step", 1), ("2step", 2)]
    assert found["real"]["diversity"] == pytest.approx(1, abs=0.3)
    assert found["1step"]["kid"] > found["real"]["kid"] + 10 * found["real"]["kid_error"], "a network without training"


def test_time_spent_on_scores_is_not_training(tmp_path, data, clock):
    class Slow(ShapesSuite):
        def evaluate(self, image, prompt):
            clock.now += 50
            return super().evaluate(image, prompt)

        def ceiling(self):
            return None

        chance = ceiling

    scores = FewStepSampling(
        Slow(per_task=1, scenes_per_task=1),
        steps=[1],
        every_n_steps=2,
        images_per_task=1,
        final_images_per_task=1,
        figures=False,
    )
    summary = summary_of(tmp_path / "run", data, clock, TrainingLog(), scores, images_per_prompt=0)
    assert scores.seconds >= 3 * 6 * 50, "six tasks at 0, 2 and 4 steps"
    assert summary["seconds"] == 1
    assert "distribution" not in summary


def test_a_resumed_run_counts_what_it_had_behind_it(tmp_path, data, clock):
    run, first = tmp_path / "run", RunSummary(SUITE, [1], images_per_prompt=0)
    first.load_state_dict({"seconds": 1000.0})
    trainer = tiny.trainer(run, clock, TrainingLog(), first)
    trainer.fit(tiny.meanflow(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    longer = tiny.trainer(run, clock, TrainingLog(), RunSummary(SUITE, [1], images_per_prompt=0), max_steps=6)
    longer.fit(tiny.meanflow(), datamodule=data, ckpt_path=tmp_path / "at4.ckpt")
    whole = json.loads((run / "summary.json").read_text())
    assert whole["steps"] == 6
    assert (first.state_dict()["seconds"], whole["seconds"]) == (1001, 1001.5)


def test_impossible_settings_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="images_per_prompt must be 2 or more, or 0"):
        RunSummary(SUITE, images_per_prompt=1)
    with pytest.raises(ValueError, match="prompts_per_task must be at least 1"):
        RunSummary(SUITE, prompts_per_task=0)
    with pytest.raises(ValueError, match="needs TrainingLog"):
        summary_of(tmp_path / "run", data)


def test_the_suite_is_that_of_few_step_sampling_and_prompts_alone_have_no_distances(tmp_path, data):
    for name, arguments in (("suite", {"suite": SUITE}), ("prompts", {"prompts": ["a"]})):
        sampling = FewStepSampling(steps=[1], images_per_task=1, final_images_per_task=1, figures=False, **arguments)
        summary = RunSummary(None, [1], prompts_per_task=1, images_per_prompt=2)
        tiny.trainer(tmp_path / name, sampling, TrainingLog(), summary).fit(tiny.meanflow(), datamodule=data)
        found = json.loads((tmp_path / name / "summary.json").read_text())
        assert found["steps"] == 4
        assert ("distribution" in found) == (name == "suite")
