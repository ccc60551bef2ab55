"""Metrics that average values of prompts."""

from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.evaluation.image_metric import PromptMeans


class Grey(PromptMeans):
    name, title = "grey", "Grey"

    def values(self, images, prompts):
        return [float(image.mean()) for image in images]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_standard_error_is_that_of_prompts_in_the_scores_units(scale):
    texts = [f"p{n}" for n in range(200)]
    levels = np.random.default_rng(0).integers(0, 256, 200)
    metric = Grey(texts, scale=scale)
    for text, level in zip(texts, levels, strict=True):
        metric.update([np.full((1, 1, 3), level, np.uint8)] * 3, [text] * 3)  # images of a prompt all alike
    found = metric.compute()
    assert float(found["score"]) == pytest.approx(scale * levels.mean())
    assert float(found["se"]) == pytest.approx(scale * levels.std() / 200**0.5, rel=0.1)
    alone = Grey(texts, scale=scale)
    alone.update([np.zeros((1, 1, 3), np.uint8)] * 3, texts[:1] * 3)
    assert alone.compute()["se"].isnan()
