"""Image features of networks without published weights; Inception's are tested with FID and KID."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emf_lightning.evaluation.distances.image_features import RandomFeatures


def test_features_are_fixed_by_their_seed():
    images = list(np.random.default_rng(0).integers(0, 256, (3, 36, 36, 3), np.uint8))
    features = RandomFeatures()(images)
    assert features.shape == (3, RandomFeatures().width)
    assert torch.equal(RandomFeatures()(images), features)
    assert not torch.allclose(RandomFeatures(seed=1)(images), features)
    assert not list(RandomFeatures().network.parameters())


@pytest.mark.parametrize("width", [8, 16, 448])
def test_features_have_the_width_asked_for_at_any_size_of_image(width):
    images = [np.zeros((20, 30, 3), np.uint8), np.zeros((36, 36, 3), np.uint8)]
    assert RandomFeatures(width)(images).shape == (2, width)


def test_odd_and_small_widths_are_refused():
    with pytest.raises(ValueError, match="width must be even and at least 8, got 9"):
        RandomFeatures(9)


def test_features_do_not_depend_on_the_precision_of_the_training():
    image = np.random.default_rng(0).integers(0, 256, (36, 36, 3), np.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = RandomFeatures()([image])
    torch.testing.assert_close(inside, RandomFeatures()([image]), rtol=0, atol=0)
