"""Metrics that average values of prompts."""

from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.evaluation.image_metric import PromptMeans, image_rows


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


class Words(PromptMeans):
    name, title = "words", "Words"

    def values(self, images, prompts):
        return [float(len(prompt)) for prompt in prompts]


def test_an_images_row_holds_what_all_metrics_say_of_it():
    texts, images = ["one", "three"], [np.full((1, 1, 3), level, np.uint8) for level in (1, 2)]
    grey, words, silent = Grey(texts), Words(texts), Grey(texts)
    grey.update(images, texts)
    words.update(images, texts)
    words.rows[1]["prompt"] = "another"
    assert image_rows([grey, silent, words], 2) == [
        {"prompt": "one", "grey": 1.0, "words": 3.0},
        {"prompt": "three", "grey": 2.0, "words": 5.0},
    ]
    assert image_rows([silent], 2) == [{}, {}]
    with pytest.raises(ValueError, match="words: update left 2 rows for 3 images"):
        image_rows([silent, words], 3)
