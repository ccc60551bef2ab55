"""Diversity of images at each step count, in training and in reports."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from emf_lightning.callbacks import FewStepSampling, StepSweep
from emf_lightning.evaluation.distances.diversity import PromptDiversity, VendiScore
from emf_lightning.evaluation.distances.fid_kid import FrechetDistance, KernelDistance
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.distances.precision_recall import Precision, Recall
from emf_lightning.evaluation.reports.report import Report
from emf_lightning.modules.flow_map import FlowMapModule
from tests.callbacks import tiny

PROMPTS, EACH = ["one", "two", "three", "four", "five", "six"], 4
FEATURES = RandomFeatures()


class Replay(FlowMapModule):
    """Returns given images: in one step the first ones again and again, in two steps noise, in four steps all."""

    def __init__(self, images: np.ndarray) -> None:
        super().__init__(tiny.network())
        noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
        self.images = {1: np.tile(images[: len(PROMPTS)], (EACH, 1, 1, 1)), 2: noise, 4: images}

    def sample_latents(self, text, null, noise, steps, guidance_scale=None):
        return torch.from_numpy(self.images[steps][: len(noise)]).permute(0, 3, 1, 2) / 127.5 - 1


def metrics():
    return [PromptDiversity(), VendiScore(), VendiScore(per_prompt=True), Recall(), Precision()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    shards = tiny.shards(tmp_path_factory.mktemp("shards"))
    return tiny.data(shards, validation_shards=str(shards), validation_samples=len(PROMPTS) * EACH)


@pytest.fixture(scope="module")
def real(data) -> np.ndarray:
    return np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in data.validation_batches()])


def in_numpy(images: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The same numbers from the definitions; image i is of prompt i modulo their number."""
    x, y = (FEATURES(list(which)).double().numpy() for which in (images, real))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)

    def vendi(rows) -> float:
        eigenvalues = np.linalg.eigvalsh(rows @ rows.T / len(rows))
        return float(np.exp(-sum(value * np.log(value) for value in eigenvalues if value > 1e-12)))

    def share(tested, centres) -> float:
        radius = [sorted(np.linalg.norm(centre - centres, axis=1))[3] for centre in centres]
        return float(np.mean([(np.linalg.norm(row - centres, axis=1) <= np.add(radius, 3e-5)).any() for row in tested]))

    groups = [unit[k :: len(PROMPTS)] for k in range(len(PROMPTS))]
    pairs = [[1 - a[i] @ a[j] for i in range(EACH) for j in range(i)] for a in groups]
    return {
        "diversity_random": 100 * np.mean(np.mean(pairs, axis=1)),
        "vendi_random": vendi(unit),
        "vendi_per_prompt_random": np.mean([vendi(group) for group in groups]),
        "recall_random": share(y, x),
        "precision_random": share(x, y),
    }


def test_curves_at_each_step_count_are_those_of_known_images(data, real, tmp_path):
    model, count = Replay(real), len(PROMPTS) * EACH
    drawn = {"images_per_task": count, "final_images_per_task": count, "every_n_steps": 100, "figures": False}
    callback = FewStepSampling(prompts=PROMPTS, extra_metrics=metrics(), steps=[1, 2, 4], **drawn)
    trainer = tiny.trainer(tmp_path / "run", callback, max_steps=1, limit_val_batches=0)
    trainer.fit(model, datamodule=data)

    lines = (tmp_path / "run/prompts/scores.jsonl").read_text().splitlines()
    records = {row["steps"]: row for row in map(json.loads, lines) if row["stage"] == "final"}
    found = {n: {name: metric["values"]["score"] for name, metric in r["metrics"].items()} for n, r in records.items()}
    for steps, scores in found.items():
        assert scores == pytest.approx(in_numpy(model.images[steps], real), abs=1e-4)
    assert found[1]["diversity_random"] == pytest.approx(0, abs=1e-4)
    assert found[1]["vendi_per_prompt_random"] == pytest.approx(1, abs=1e-4)
    assert (found[4]["recall_random"], found[4]["precision_random"]) == (1, 1)
    assert (found[2]["recall_random"], found[2]["precision_random"]) == (0, 0)
    for steps, title in ((1, "1 step"), (2, "2 steps"), (4, "4 steps")):
        curves = tiny.events(tmp_path / "run" / title)
        for name, value in found[steps].items():
            points = curves.Scalars(f"eval/prompts/parts/{name}")
            assert [point.step for point in points] == [0, 1]
            assert points[-1].value == pytest.approx(value, rel=1e-5)


def test_reports_have_a_row_of_each_step_count(data, real, tmp_path):
    model = Replay(real)
    sweep = StepSweep(prompts=PROMPTS, extra_metrics=metrics(), steps=[1, 4], images_per_prompt=EACH)
    tiny.trainer(tmp_path / "run", sweep).test(model, datamodule=data, verbose=False)

    report = Report.read(tmp_path / "run/report.json")
    for steps in (1, 4):
        rows = {row.metric: row.scores["score"] for row in report.rows if row.steps == steps}
        assert rows == pytest.approx(in_numpy(model.images[steps], real), abs=1e-4)
    assert "Diversity x 100 (random features), images of own prompts" in report.markdown()


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (FewStepSampling(prompts=PROMPTS, extra_metrics=[PromptDiversity()]), "no two of the 6 images"),
        (FewStepSampling(extra_metrics=[PromptDiversity()]), "no two of the 20 images"),
        (FewStepSampling(prompts=["one", "two"], extra_metrics=[Recall()]), "the run has 2 images"),
        (FewStepSampling(prompts=PROMPTS, images_per_task=12, extra_metrics=[PromptDiversity()]), "of the 6 images"),
    ],
)
def test_images_without_a_score_are_refused_before_training(data, tmp_path, callback, said):
    with pytest.raises(ValueError, match=said):
        tiny.trainer(tmp_path / "run", callback).fit(tiny.meanflow(), datamodule=data)
    assert not list((tmp_path / "run").rglob("scores.jsonl"))


def test_a_sweep_of_single_images_is_refused_before_the_first(data, tmp_path):
    sweep = StepSweep(prompts=PROMPTS, extra_metrics=[PromptDiversity()], images_per_prompt=1)
    with pytest.raises(ValueError, match="no two of the 6 images are of one prompt"):
        tiny.trainer(tmp_path / "run", sweep).test(tiny.meanflow(), datamodule=data, verbose=False)


def test_a_trial_of_one_batch_does_not_ask_for_more_images(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it has no run directory
    distances = [FrechetDistance(FEATURES), KernelDistance(FEATURES)]
    callback = FewStepSampling(prompts=PROMPTS, extra_metrics=[*metrics(), *distances], figures=False)
    tiny.trainer(tmp_path / "run", callback, fast_dev_run=1, limit_val_batches=0).fit(tiny.meanflow(), datamodule=data)


def test_two_ranks_find_what_one_finds(data, tmp_path):
    scores = []
    for name, arguments in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        sweep = StepSweep(prompts=PROMPTS[:3], extra_metrics=metrics(), steps=[1], images_per_prompt=3)  # 9 images
        trainer = tiny.trainer(tmp_path / name, sweep, **arguments)
        trainer.test(tiny.meanflow(), datamodule=data, verbose=False)
        rows = Report.read(tmp_path / name / "report.json").rows
        scores.append({row.metric: row.scores["score"] for row in rows})
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[0]["diversity_random"] > 0.01
