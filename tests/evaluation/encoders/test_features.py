from __future__ import annotations

import numpy as np
import pytest
import torch

from emf_lightning.evaluation.encoders.features import feature_variants, pooled_features
from emf_lightning.text.base import TextEncoder, TextFeatures
from emf_lightning.text.words import WordEncoder


def test_whitened_features_have_no_preferred_direction():
    rows = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32) * [10, 3, 1, 1] + 50
    whitened = dict(feature_variants(rows, rows))["whitened"]
    assert np.linalg.norm(whitened, axis=1) == pytest.approx(1)
    spread = np.linalg.eigvalsh(np.cov(whitened.T))
    assert spread.max() < 2 * spread.min()


def test_padding_has_no_say():
    class Padded(TextEncoder):
        width, length, fingerprint = 2, 3, "padded"

        def encode(self, captions):
            context = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]).repeat(len(captions), 1, 1)
            return TextFeatures(context, torch.tensor([[True, True, False]]).expand(len(captions), -1))

    np.testing.assert_allclose(pooled_features(Padded(), ["x", "y"]), [[0.5, 0.5], [0.5, 0.5]])


def test_the_same_tokens_in_another_order_give_the_same_feature():
    words = [f"word{i}" for i in range(12)]
    orders = [" ".join(np.random.default_rng(seed).permutation(words)) for seed in range(20)]
    rows = pooled_features(WordEncoder(width=64, window=0, position=0.0), orders)
    assert len(np.unique(rows, axis=0)) == 1
