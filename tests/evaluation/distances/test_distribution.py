from __future__ import annotations

import numpy as np
import pytest
import torch

from emf_lightning.evaluation.distances.distribution import RandomFeatures, distribution
from emf_lightning.evaluation.shapes.suite import ShapesSuite

PROMPTS, EACH = 20, 4


@pytest.fixture(scope="module")
def pictures():
    """Real pictures of the same prompts, three times."""
    suite = ShapesSuite(per_task=10)
    prompts = suite.prompts()[-PROMPTS:]
    return [
        np.stack([suite.picture(prompt, EACH * k + i) for prompt in prompts for i in range(EACH)]) for k in range(3)
    ]


def compare(drawn, real):
    return distribution(drawn, real, EACH, RandomFeatures())


def test_real_pictures_are_near_real_pictures_and_as_diverse(pictures):
    found = compare(pictures[1], pictures[0])
    assert abs(found.kid) < 3 * found.kid_error + 0.1
    assert found.diversity == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("spoil", ["noise", "other colours", "blank"])
def test_what_is_wrong_is_farther_than_what_is_real(pictures, spoil):
    real, other = pictures[:2]
    spoilt = {
        "noise": np.clip(other + np.random.default_rng(0).normal(0, 40, other.shape), 0, 255).astype(np.uint8),
        "other colours": other[..., [1, 2, 0]] // 2,
        "blank": np.full_like(other, 128),
    }[spoil]
    found, floor = compare(spoilt, real), compare(other, real)
    assert found.kid > floor.kid + 5 * floor.kid_error
    assert found.fid > 2 * floor.fid


def test_one_picture_a_prompt_again_and_again_has_no_diversity(pictures):
    collapsed = pictures[1].reshape(PROMPTS, EACH, *pictures[1].shape[1:])[:, :1].repeat(EACH, axis=1)
    found = compare(collapsed.reshape(pictures[1].shape), pictures[0])
    assert found.diversity < 1e-3


def test_features_are_fixed_by_their_seed():
    images = torch.randint(0, 256, (3, 3, 36, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = RandomFeatures()(images)
    assert features.shape == (3, RandomFeatures().num_features)
    assert torch.equal(RandomFeatures()(images), features)
    assert not torch.allclose(RandomFeatures(seed=1)(images), features)
    assert not list(RandomFeatures().parameters())


def test_a_scene_belongs_to_its_prompt_and_number():
    suite = ShapesSuite(per_task=5)
    prompt = suite.prompts()[-1]
    assert np.array_equal(suite.picture(prompt, 3), ShapesSuite(per_task=5).picture(prompt, 3))
    assert not np.array_equal(suite.picture(prompt, 3), suite.picture(prompt, 4))
    assert suite.judge(suite.picture(prompt, 3), prompt).correct
