from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import Dinov2Model

from emf_lightning.callbacks import FewStepSampling, StepSweep
from emf_lightning.evaluation.distances.diversity import PromptDiversity
from emf_lightning.evaluation.distances.fd_dinov2_cmmd import Cmmd, FdDinov2
from emf_lightning.evaluation.distances.learned_features import ClipFeatures, Dinov2Features
from emf_lightning.evaluation.reports.report import Report
from tests.callbacks import tiny
from tests.callbacks.test_diversity_curves import EACH, PROMPTS, Replay
from tests.evaluation.distances.test_diversity import OneHot, marked
from tests.evaluation.tiny_clip import save_tiny_clip
from tests.evaluation.tiny_dinov2 import save_tiny_dinov2


def images_of(seed: int, count: int, height: int = 40, width: int = 40) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Dinov2Features:
    return Dinov2Features(save_tiny_dinov2(tmp_path_factory.mktemp("dinov2")), device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> ClipFeatures:
    return ClipFeatures("emf-tiny-clip", save_tiny_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    shards = tiny.shards(tmp_path_factory.mktemp("shards"))
    return tiny.data(shards, validation_shards=str(shards), validation_samples=len(PROMPTS) * EACH)


@pytest.fixture(scope="module")
def real(data) -> np.ndarray:
    return np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in data.validation_batches()])


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """The paper's definition, pair by pair."""

    def mean(a, b) -> float:
        return float(np.mean([np.exp(-((row - b) ** 2).sum(1) / 200) for row in a]))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    roots = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * roots))


def test_curves_are_the_papers_definitions_and_zero_for_the_real_images(data, real, dinov2, clip, tmp_path):
    model, count = Replay(real), len(real)
    metrics = [FdDinov2(dinov2), Cmmd(clip)]
    drawn = {"images_per_task": count, "final_images_per_task": count, "at_start": False, "figures": False}
    callback = FewStepSampling(prompts=PROMPTS, extra_metrics=metrics, steps=[1, 2, 4], **drawn)
    tiny.trainer(tmp_path / "run", callback, max_steps=1, limit_val_batches=0).fit(model, datamodule=data)

    rows = map(json.loads, (tmp_path / "run/prompts/scores.jsonl").read_text().splitlines())
    found = {row["steps"]: {n: m["values"]["score"] for n, m in row["metrics"].items()} for row in rows}
    names = "fd_dinov2_dinov2-16", "cmmd_clip-emf-tiny-clip"
    for steps, images in model.images.items():
        pairs = [[f(list(side)).double().numpy() for side in (images, real)] for f in (dinov2, clip)]
        expected = dict(zip(names, (frechet(*pairs[0]), cmmd(*pairs[1])), strict=True))
        assert found[steps] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert found[4] == pytest.approx(dict.fromkeys(names, 0), abs=1e-4)
    for name, title in zip(names, ("2 steps", "4 steps"), strict=False):
        (point,) = tiny.events(tmp_path / "run" / title).Scalars(f"eval/prompts/parts/{name}")
        assert point.value == pytest.approx(found[int(title[0])][name], rel=1e-5, abs=1e-4)


def test_reports_have_their_rows(data, real, dinov2, clip, tmp_path):
    metrics = [FdDinov2(dinov2), Cmmd(clip), PromptDiversity(dinov2)]
    sweep = StepSweep(prompts=PROMPTS, extra_metrics=metrics, steps=[4], images_per_prompt=EACH)
    tiny.trainer(tmp_path / "run", sweep).test(Replay(real), datamodule=data, verbose=False)

    text = (tmp_path / "run/report.md").read_text()
    assert "FD-DINOv2 (dinov2-16 features)" in text and "CMMD (clip-emf-tiny-clip features)" in text
    fd, mmd, _ = Report.read(tmp_path / "run/report.json").rows
    assert (fd.scores["score"], mmd.scores["score"]) == pytest.approx((0, 0), abs=1e-4)
    assert fd.settings["features"] == dinov2.digest and mmd.settings["sigma"] == 10


def test_fd_dinov2_is_torchmetrics_distance_of_the_same_features(dinov2, tmp_path):
    real, generated = images_of(0, 40), [image // 2 for image in images_of(1, 40)]
    for number, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    metric = FdDinov2(dinov2, tmp_path)
    metric.update(generated, [""] * 40)

    class Ready(nn.Module):
        num_features = 16

        def forward(self, rows):
            return rows

    theirs = FrechetInceptionDistance(feature=Ready())
    theirs.update(dinov2(real), real=True)
    theirs.update(dinov2(generated), real=False)
    assert metric.compute()["score"].item() == pytest.approx(theirs.compute().item(), rel=1e-3)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_cmmd_of_two_points_is_the_kernels_and_depends_on_no_number_of_images(tmp_path, count):
    for number, image in enumerate(marked(*[0] * 5)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    for mark, expected in ((0, 0), (1, 1000 * (2 - 2 * np.exp(-1 / 100)))):
        metric = Cmmd(OneHot(), tmp_path)
        metric.update(marked(*[mark] * count), [""] * count)
        assert metric.compute()["score"].item() == pytest.approx(expected, abs=1e-9)


def test_dinov2_sees_the_whole_image_at_224_pixels_with_imagenets_colours(dinov2, tmp_path):
    network = Dinov2Model.from_pretrained(save_tiny_dinov2(tmp_path)).eval()
    wide = images_of(4, 1, 30, 50)[0]
    square = np.asarray(Image.fromarray(wide).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    pixels = torch.from_numpy((square - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float()
    with torch.no_grad():
        expected = network(pixels.permute(2, 0, 1)[None]).last_hidden_state[:, 0]
    rows = dinov2([wide, images_of(5, 1)[0]])
    torch.testing.assert_close(rows[:1], expected, rtol=1e-4, atol=1e-4)
    assert rows.shape == (2, 16) and not torch.allclose(rows[0], rows[1], atol=0.01)


def test_clip_features_are_unit_vectors_of_the_centre_square(clip):
    wide = images_of(6, 1, 32, 64)[0]
    whole, centre = clip([wide, wide[:, 16:48]])
    torch.testing.assert_close(whole, centre, rtol=1e-4, atol=1e-5)
    assert whole.norm().item() == pytest.approx(1)
    assert clip.name == "clip-emf-tiny-clip" and clip.width == 12


def test_missing_weights_and_references_are_named_with_the_remedy(clip, tmp_path):
    with pytest.raises(ValueError, match=r"Dinov2Features: cannot load model='facebook/dinov2-large'.*hf download"):
        FdDinov2()
    with pytest.raises(ValueError, match=r"ClipFeatures: cannot load model='nothing'.*give a name of"):
        ClipFeatures("nothing", device="cpu")
    (tmp_path / "statistics.npz").touch()
    with pytest.raises(ValueError, match="CMMD needs each of them"):
        Cmmd(clip, tmp_path / "statistics.npz")
    with pytest.raises(ValueError, match="Cmmd: reference is not set"):
        Cmmd(clip).check_count(10)
    with pytest.raises(ValueError, match="Cmmd: count must be at least 1, got 0"):
        Cmmd(clip, count=0)


def test_a_dinov2_without_all_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_dinov2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "layer.1" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"Dinov2Features: model=.* lacks .* of the weights of a Dinov2Model"):
        Dinov2Features(folder)
