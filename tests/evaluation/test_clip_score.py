from __future__ import annotations

import json
from pathlib import PurePath

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.evaluation.clip_score import HPS_STYLES, ClipScore, HpsScore, fitted
from tests.evaluation.tiny_clip import save_tiny_clip

PROMPTS = ["a red circle", "a blue square", "two dogs"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 24 + 8 * i, 3), np.uint8) for i in range(3)]


def benchmark(folder, texts):
    for style in HPS_STYLES:
        (folder / f"{style}.json").write_text(json.dumps(texts.get(style, [])))
    return folder


def cosine(scorer, picture, prompt) -> float:
    with torch.no_grad():
        image = scorer.model.encode_image(picture[None])
        text = scorer.model.encode_text(scorer.tokenizer([prompt]))
    return float(torch.nn.functional.cosine_similarity(image, text))


def test_clip_score_is_a_hundred_times_the_mean_cosine_whatever_the_batches(weights, images):
    whole, split = (ClipScore("emf-tiny-clip", weights, "cpu") for _ in range(2))
    whole.update(images, PROMPTS)
    split.update(images[:1], PROMPTS[:1])
    split.update(images[1:], PROMPTS[1:])
    pictures = [whole._scorer.transform(Image.fromarray(image)) for image in images]
    values = [100 * cosine(whole._scorer, p, t) for p, t in zip(pictures, PROMPTS, strict=True)]

    assert whole.compute()["score"].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert whole.compute()["se"].item() == pytest.approx(np.std(values, ddof=1) / 3**0.5, rel=1e-4)
    assert split.compute()["score"].item() == pytest.approx(whole.compute()["score"].item(), rel=1e-6)
    assert [row["clip"] for row in whole.rows] == pytest.approx(values, abs=1e-3)


def test_a_twin_shares_the_network_and_has_seen_nothing(weights, images):
    metric = ClipScore("emf-tiny-clip", weights, "cpu")
    metric.update(images, PROMPTS)
    twin = metric.twin()
    twin.update(images[:1], PROMPTS[:1])

    assert twin._scorer is metric._scorer
    assert (int(metric.count), int(twin.count)) == (3, 1)
    assert twin.compute()["score"].item() == pytest.approx(metric.rows[0]["clip"], abs=1e-3)


def test_hps_means_styles_and_places_in_the_benchmarks_layout(weights, images, tmp_path):
    folder = benchmark(tmp_path, {"anime": PROMPTS[:2], "photo": PROMPTS[2:]})
    metric = HpsScore(weights, folder, model="emf-tiny-clip", device="cpu")
    metric.update([images[0], images[0], images[1], images[2]], [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]])
    scorer = metric._scorer

    def value(image, prompt):
        picture = (fitted(image, 32, False) - scorer.mean[:, None, None]) / scorer.std[:, None, None]
        return 100 * cosine(scorer, picture, prompt)

    anime = [
        value(images[0], PROMPTS[0]),
        (value(images[0], PROMPTS[1]) + value(images[1], PROMPTS[1])) / 2,
    ]
    photo = value(images[2], PROMPTS[2])
    found = {name: number.item() for name, number in metric.compute().items()}
    assert found["anime"] == pytest.approx(np.mean(anime), rel=1e-4)
    assert found["photo"] == pytest.approx(photo, rel=1e-4)
    assert found["score"] == pytest.approx(np.mean([*anime, photo]), rel=1e-4)
    assert metric.prompt_of(PurePath("anime/00001.jpg")) == PROMPTS[1]
    assert metric.prompt_of(PurePath("photo/00007.jpg")) is None


def test_pictures_keep_their_shape_between_black_bars():
    image = np.full((20, 10, 3), 255, np.uint8)
    picture = fitted(image, 32, antialias=False)

    assert picture.shape == (3, 32, 32)
    assert picture[:, :, 8:24].min() == 1
    assert picture[:, :, :8].max() == picture[:, :, 24:].max() == 0


def test_antialiasing_changes_what_the_model_sees():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    assert (fitted(image, 32, True) - fitted(image, 32, False)).abs().max() > 0.1


def test_missing_prompts_and_other_prompts_are_named(weights, images, tmp_path):
    with pytest.raises(ValueError, match=r"HpsScore: cannot read .*anime\.json.*HPDv2"):
        HpsScore(weights, tmp_path, model="emf-tiny-clip")
    metric = HpsScore(weights, benchmark(tmp_path, {"anime": PROMPTS}), model="emf-tiny-clip", device="cpu")
    with pytest.raises(ValueError, match=r"HPS v2\.1: 'a cat' is none of its 3 prompts"):
        metric.update(images[:1], ["a cat"])
