from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.evaluation.distances.distribution import distribution
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.shapes.suite import ShapesSuite

PROMPTS, EACH = 20, 4


@pytest.fixture(scope="module")
def images():
    """Real images of the same prompts, three times."""
    suite = ShapesSuite(per_task=10)
    prompts = suite.prompts()[-PROMPTS:]
    return [
        np.stack([suite.reference_image(prompt, EACH * k + i) for prompt in prompts for i in range(EACH)])
        for k in range(3)
    ]


def compare(generated, real):
    return distribution(generated, real, EACH, RandomFeatures())


def test_real_images_are_near_real_images_and_as_diverse(images):
    found = compare(images[1], images[0])
    assert abs(found.kid) < 3 * found.kid_error + 0.1
    assert found.diversity == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("spoil", ["noise", "other colours", "blank"])
def test_what_is_wrong_is_farther_than_what_is_real(images, spoil):
    real, other = images[:2]
    spoilt = {
        "noise": np.clip(other + np.random.default_rng(0).normal(0, 40, other.shape), 0, 255).astype(np.uint8),
        "other colours": other[..., [1, 2, 0]] // 2,
        "blank": np.full_like(other, 128),
    }[spoil]
    found, floor = compare(spoilt, real), compare(other, real)
    assert found.kid > floor.kid + 5 * floor.kid_error
    assert found.fid > 2 * floor.fid


def test_one_image_a_prompt_again_and_again_has_no_diversity(images):
    collapsed = images[1].reshape(PROMPTS, EACH, *images[1].shape[1:])[:, :1].repeat(EACH, axis=1)
    found = compare(collapsed.reshape(images[1].shape), images[0])
    assert found.diversity < 1e-3


def test_a_scene_belongs_to_its_prompt_and_number():
    suite = ShapesSuite(per_task=5)
    prompt = suite.prompts()[-1]
    assert np.array_equal(suite.reference_image(prompt, 3), ShapesSuite(per_task=5).reference_image(prompt, 3))
    assert not np.array_equal(suite.reference_image(prompt, 3), suite.reference_image(prompt, 4))
    assert suite.evaluate(suite.reference_image(prompt, 3), prompt).correct
