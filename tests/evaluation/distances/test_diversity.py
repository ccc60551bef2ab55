from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.evaluation.distances.diversity import PromptDiversity, VendiScore
from emf_lightning.evaluation.distances.image_features import ImageFeatures, RandomFeatures
from emf_lightning.evaluation.distances.precision_recall import Precision, Recall

FEATURES = RandomFeatures(width=16)
BOTH = pytest.mark.parametrize("kind", [Recall, Precision])


class OneHot(ImageFeatures):
    """The image's first pixel names the one feature that is not 0."""

    name, width, resize = "one_hot", 12, "none"
    network = torch.nn.Identity()

    def __call__(self, images):
        return 3 * torch.eye(12)[[int(image[0, 0, 0]) for image in images]]


def marked(*marks: int) -> list[np.ndarray]:
    return [np.full((4, 4, 3), mark, np.uint8) for mark in marks]


def images_of(seed: int, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8))


def score(metric, images, prompts=None, batch: int = 5) -> float:
    prompts = prompts or [""] * len(images)
    for first in range(0, len(images), batch):
        metric.update(images[first : first + batch], prompts[first : first + batch])
    return float(metric.compute()["score"])


def folder_of(path, images):
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:03d}.png")
    return path


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_n_orthogonal_images_have_a_vendi_score_of_n_and_the_largest_diversity(n):
    assert score(VendiScore(OneHot()), marked(*range(n))) == pytest.approx(n)
    if n > 1:
        assert score(PromptDiversity(OneHot()), marked(*range(n))) == pytest.approx(100)


@pytest.mark.parametrize("copies", [2, 3, 20])
def test_copies_add_no_diversity(copies):
    assert score(VendiScore(OneHot()), marked(*[4] * copies)) == pytest.approx(1)
    assert score(PromptDiversity(OneHot()), marked(*[4] * copies)) == pytest.approx(0, abs=1e-9)
    # more images than features: the dual form
    assert score(VendiScore(OneHot()), marked(*[0, 1, 2] * copies)) == pytest.approx(3)


def test_only_images_of_one_prompt_are_compared_and_each_prompt_counts_once():
    images, prompts = marked(0, 0, 0, 1, 2, 3, 4), ["a", "a", "a", "b", "b", "c", "d"]
    assert score(PromptDiversity(OneHot()), images, prompts, batch=2) == pytest.approx(50)
    assert score(VendiScore(OneHot(), per_prompt=True), images, prompts, batch=2) == pytest.approx(1.5)
    assert score(VendiScore(OneHot()), images, prompts) == pytest.approx(
        np.exp(-3 / 7 * np.log(3 / 7) + np.log(7) * 4 / 7)
    )


def test_neither_batches_nor_order_nor_parts_matter():
    images, prompts = images_of(0, 12), list("aabbccabcabc")
    for kind in (PromptDiversity, VendiScore):
        whole = kind(FEATURES)
        expected = score(kind(FEATURES), images, prompts)
        assert score(kind(FEATURES), images[::-1], prompts[::-1], batch=7) == pytest.approx(expected)
        for half in (slice(0, 5), slice(5, 12)):
            part = whole.fresh_copy()
            part.update(images[half], prompts[half])
            whole.merge(part)
        assert float(whole.compute()["score"]) == pytest.approx(expected)


def test_a_manifold_holds_its_own_images_and_none_far_away(tmp_path):
    near, far = images_of(1, 10), [image // 16 for image in images_of(2, 10)]
    reference = folder_of(tmp_path / "real", near)
    for kind in (Recall, Precision):
        assert score(kind(FEATURES, reference), near) == 1
        assert score(kind(FEATURES, reference), far) == 0


def test_a_model_that_lost_modes_is_precise_and_has_little_recall(tmp_path):
    modes = [
        np.clip(np.full((16, 16, 3), 60 * k + 20) + image // 32, 0, 255).astype(np.uint8)
        for k in range(4)
        for image in images_of(k, 6)
    ]
    reference = folder_of(tmp_path / "real", modes)
    assert score(Precision(FEATURES, reference), modes[:6]) == 1
    assert score(Recall(FEATURES, reference), modes[:6]) == 0.25


@pytest.mark.parametrize("neighbours", [1, 2, 3])
def test_precision_and_recall_are_those_of_numpy(tmp_path, neighbours):
    real, generated = images_of(3, 30), images_of(4, 20)
    reference = folder_of(tmp_path / "real", real)
    x, y = (FEATURES(images).double().numpy() for images in (real, generated))

    def share(tested, centres) -> float:
        radius = [sorted(np.linalg.norm(centre - centres, axis=1))[neighbours] for centre in centres]
        hits = [any(np.linalg.norm(row - c) <= r for c, r in zip(centres, radius, strict=True)) for row in tested]
        return float(np.mean(hits))

    assert 0 < share(x, y) < 1
    assert score(Recall(FEATURES, reference, neighbours=neighbours), generated) == pytest.approx(share(x, y), abs=1e-4)
    precision = Precision(FEATURES, reference, neighbours=neighbours)
    assert score(precision, generated) == pytest.approx(share(y, x), abs=1e-4)
    again = precision.fresh_copy()
    assert score(again, generated) == pytest.approx(share(y, x), abs=1e-4)


@BOTH
def test_collapsed_images_are_a_point_in_which_only_their_like_is(tmp_path, kind):
    reference = folder_of(tmp_path / "real", images_of(5, 1) * 6)
    assert score(kind(FEATURES, reference), images_of(5, 1) * 6) == 1
    assert score(kind(FEATURES, reference), images_of(6, 1) * 6) == 0


@BOTH
def test_too_few_images_are_refused_before_the_first(tmp_path, kind):
    few, enough = folder_of(tmp_path / "few", images_of(7, 3)), folder_of(tmp_path / "enough", images_of(7, 8))
    with pytest.raises(ValueError, match=f"{kind.__name__}: the reference has 3 images, which have no 3 neighbours"):
        kind(FEATURES, few).check_requests([""] * 10)
    with pytest.raises(ValueError, match=f"{kind.__name__}: the run has 2 images"):
        kind(FEATURES, enough).check_requests([""] * 2)
    kind(FEATURES, few, neighbours=2).check_requests([""] * 3)
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        kind(FEATURES, enough, neighbours=0)
    (tmp_path / "statistics.npz").touch()
    with pytest.raises(ValueError, match="must be a folder of images"):
        kind(FEATURES, tmp_path / "statistics.npz")


@pytest.mark.parametrize("prompts", [[], ["a"], ["a", "b", "c"]])
def test_images_of_which_no_two_have_one_prompt_are_refused_before_the_first(prompts):
    for metric in (PromptDiversity(FEATURES), VendiScore(FEATURES, per_prompt=True)):
        with pytest.raises(
            ValueError, match=rf"no two of the {len(prompts)} images are of one prompt.*images_per_prompt"
        ):
            metric.check_requests(prompts)
        metric.check_requests(["a", "b", "a"])
    VendiScore(FEATURES).check_requests(prompts)


def test_features_are_part_of_the_name():
    assert [metric.name for metric in (PromptDiversity(), VendiScore(), VendiScore(OneHot(), per_prompt=True))] == [
        "diversity_random",
        "vendi_random",
        "vendi_per_prompt_one_hot",
    ]


def test_the_standard_error_of_diversity_is_that_of_prompts():
    metric = PromptDiversity(OneHot())
    prompts = [p for p in "abcd" for _ in range(2)]
    metric.update(marked(0, 0, 1, 1, 2, 3, 4, 5), prompts)  # two prompts of 0 and two of 100
    found = metric.compute()
    assert float(found["score"]) == pytest.approx(50)
    assert float(found["se"]) == pytest.approx(np.std([0, 0, 100, 100], ddof=1) / 2)
