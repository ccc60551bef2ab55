from __future__ import annotations

import json
from pathlib import PurePath

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.evaluation.clip_hps.clip_score import HPS_STYLES, ClipScore, HpsScore, fit_to_square
from tests.evaluation.tiny_clip import save_tiny_clip

PROMPTS = ["red", "a blue square on a table in the garden", "two dogs"]
"""Of different lengths: the tiny network tells little else."""


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


def cosine(clip, pixels, prompt) -> float:
    with torch.no_grad():
        image = clip.model.encode_image(pixels[None])
        text = clip.model.encode_text(clip.tokenizer([prompt]))
    return float(torch.nn.functional.cosine_similarity(image, text))


def normalisation(metric) -> tuple[torch.Tensor, torch.Tensor]:
    config = metric._clip.model.visual.preprocess_cfg
    return tuple(torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))


def test_clip_score_is_a_hundred_times_the_mean_cosine_whatever_the_batches(weights, images):
    whole, split = (ClipScore("emf-tiny-clip", weights, "cpu") for _ in range(2))
    whole.update(images, PROMPTS)
    split.update(images[:1], PROMPTS[:1])
    split.update(images[1:], PROMPTS[1:])
    batch = [whole._clip.transform(Image.fromarray(image)) for image in images]
    values = [100 * cosine(whole._clip, p, t) for p, t in zip(batch, PROMPTS, strict=True)]

    assert whole.compute()["score"].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert whole.compute()["se"].item() == pytest.approx(np.std(values, ddof=1) / 3**0.5, rel=1e-4)
    assert split.compute()["score"].item() == pytest.approx(whole.compute()["score"].item(), rel=1e-6)
    assert [row["clip"] for row in whole.rows] == pytest.approx(values, abs=1e-3)


def test_a_twin_shares_the_network_and_has_seen_nothing(weights, images):
    metric = ClipScore("emf-tiny-clip", weights, "cpu")
    metric.update(images, PROMPTS)
    copy = metric.fresh_copy()
    copy.update(images[:1], PROMPTS[:1])

    assert copy._clip is metric._clip
    assert (int(metric.images.sum()), int(copy.images.sum())) == (3, 1)
    assert copy.compute()["score"].item() == pytest.approx(metric.rows[0]["clip"], abs=1e-3)


def test_images_of_one_prompt_are_one_cluster_of_the_standard_error_on_any_rank(weights, images):
    prompts = [PROMPTS[i] for i in (0, 1, 0, 2, 0)]
    whole = ClipScore("emf-tiny-clip", weights, "cpu")
    both, first, second = (whole.fresh_copy() for _ in range(3))
    batch = [*images, images[1], images[0]]
    whole.update(batch, prompts)
    for metric, rows in (first, slice(2)), (second, slice(2, None)):
        metric.update(batch[rows], prompts[rows])
        both.update(batch[rows], prompts[rows])
    first.merge(second)  # sums, as the ranks' are
    values = np.array([row["clip"] for row in whole.rows])
    residuals = [values[[0, 2, 4]] - values.mean(), values[[1]] - values.mean(), values[[3]] - values.mean()]
    expected = np.sqrt(3 / 2 * sum(np.sum(residual) ** 2 for residual in residuals)) / 5

    assert whole.compute()["score"].item() == pytest.approx(values.mean(), abs=1e-3)
    assert whole.compute()["se"].item() == pytest.approx(expected, abs=1e-3)
    assert first.compute()["se"].item() == pytest.approx(both.compute()["se"].item(), rel=1e-9)
    assert expected != pytest.approx(values.std(ddof=1) / 5**0.5, rel=0.01), "clusters make no difference here"


def taught(metric, batch):
    """``metric`` after its texts were turned by hand to where the images of the same number lie."""
    model = metric._clip.model
    with torch.no_grad():
        seen = model.encode_image(torch.stack(batch), normalize=True).double()
        read = model.encode_text(metric._clip.tokenizer(PROMPTS)).double()
        model.text_projection.copy_(model.text_projection.double() @ torch.linalg.pinv(read) @ seen)
    return metric


def test_the_right_prompts_score_higher_than_permuted_ones(weights, tmp_path):
    images = [np.full((32, 32, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    clip = ClipScore("emf-tiny-clip", weights, "cpu")
    hps = HpsScore(weights, benchmark(tmp_path, {"anime": PROMPTS}), model="emf-tiny-clip", device="cpu")
    mean, std = normalisation(hps)
    taught(clip, [clip._clip.transform(Image.fromarray(image)) for image in images])
    taught(hps, [(fit_to_square(image, 32, False) - mean) / std for image in images])
    for metric in (clip, hps):
        right, permuted = metric.fresh_copy(), metric.fresh_copy()
        right.update(images, PROMPTS)
        permuted.update(images, PROMPTS[1:] + PROMPTS[:1])
        assert right.compute()["score"].item() == pytest.approx(100, abs=0.1)
        assert permuted.compute()["score"] < 95


def test_hps_means_styles_and_places_in_the_benchmarks_layout(weights, images, tmp_path):
    folder = benchmark(tmp_path, {"anime": PROMPTS[:2], "photo": PROMPTS[2:]})
    metric = HpsScore(weights, folder, model="emf-tiny-clip", device="cpu")
    metric.update([images[0], images[0], images[1], images[2]], [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]])
    mean, std = normalisation(metric)

    def value(image, prompt):
        return 100 * cosine(metric._clip, (fit_to_square(image, 32, False) - mean) / std, prompt)

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


def test_a_text_that_stands_in_several_places_counts_in_each(weights, images, tmp_path):
    texts = {"anime": [PROMPTS[0], PROMPTS[1], PROMPTS[0]], "photo": [PROMPTS[0]]}
    metric = HpsScore(weights, benchmark(tmp_path, texts), model="emf-tiny-clip", device="cpu")
    metric.update(images[:2], PROMPTS[:2])
    first, second = (row["hps"] for row in metric.rows)
    found = {name: number.item() for name, number in metric.compute().items()}

    assert list(metric.prompts()) == PROMPTS[:2]
    assert found["anime"] == pytest.approx(100 * (2 * first + second) / 3)
    assert found["photo"] == pytest.approx(100 * first)
    assert found["score"] == pytest.approx(100 * (3 * first + second) / 4)
    assert metric.settings()["prompts"] == 4


def test_hps_is_the_same_whatever_the_batches(weights, images, tmp_path):
    folder = benchmark(tmp_path, {"anime": PROMPTS[:2], "photo": PROMPTS[2:]})
    whole = HpsScore(weights, folder, model="emf-tiny-clip", device="cpu")
    single = whole.fresh_copy()
    whole.update(images, PROMPTS)
    for image, prompt in zip(images, PROMPTS, strict=True):
        single.update([image], [prompt])
    found = {name: number.item() for name, number in single.compute().items()}

    assert found == pytest.approx({name: number.item() for name, number in whole.compute().items()}, rel=1e-5)


def test_settings_tell_other_prompts_apart(weights, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one = HpsScore(weights, benchmark(tmp_path / "one", {"anime": PROMPTS[:2]}), model="emf-tiny-clip", device="cpu")
    other = HpsScore(
        weights, benchmark(tmp_path / "other", {"anime": PROMPTS[1:]}), model="emf-tiny-clip", device="cpu"
    )

    assert {name for name, value in one.settings().items() if other.settings()[name] != value} == {"benchmark"}


def test_images_keep_their_shape_between_black_bars():
    image = np.full((20, 10, 3), 255, np.uint8)
    pixels = fit_to_square(image, 32, antialias=False)

    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :, 8:24].min() == 1
    assert pixels[:, :, :8].max() == pixels[:, :, 24:].max() == 0


def test_antialiasing_changes_what_the_model_sees():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    assert (fit_to_square(image, 32, True) - fit_to_square(image, 32, False)).abs().max() > 0.1


def test_missing_prompts_and_other_prompts_are_named(weights, images, tmp_path):
    with pytest.raises(ValueError, match=r"HpsScore: cannot read .*anime\.json.*HPDv2"):
        HpsScore(weights, tmp_path, model="emf-tiny-clip")
    metric = HpsScore(weights, benchmark(tmp_path, {"anime": PROMPTS}), model="emf-tiny-clip", device="cpu")
    with pytest.raises(ValueError, match=r"HPS v2\.1: 'a cat' is none of its 3 prompts"):
        metric.update(images[:1], ["a cat"])
