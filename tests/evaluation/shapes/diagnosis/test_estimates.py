from __future__ import annotations

import math

import numpy as np
import pytest

from emf_lightning.evaluation.shapes.diagnosis.estimates import Mean, deviations, distances


def test_the_error_of_independent_images_is_the_binomial_one() -> None:
    values = np.arange(200) < 40
    mean = Mean.of(values, [str(i) for i in range(200)])
    assert (mean.value, mean.images) == (0.2, 200)
    assert mean.error == pytest.approx(math.sqrt(0.2 * 0.8 / 200), rel=0.1)


def test_images_of_one_prompt_are_not_independent() -> None:
    values, prompts = np.repeat(np.arange(100) < 20, 2), np.repeat([str(i) for i in range(100)], 2)
    assert Mean.of(values, prompts.tolist()).error == pytest.approx(math.sqrt(0.2 * 0.8 / 100), rel=0.1)


def test_no_images_and_one_prompt_have_no_error() -> None:
    assert str(Mean.of([], [])) == "" and math.isnan(Mean.of([], []).value)
    one = Mean.of([1, 0], ["a", "a"])
    assert one.value == 0.5 and math.isnan(one.error) and str(one) == "0.500"
    assert math.isnan(Mean.of([1.0], ["a"], [0.0]).value)


def test_a_ratio_is_that_of_the_sums() -> None:
    ratio = Mean.of([1.0, 3.0, 2.0], ["a", "b", "c"], [4.0, 4.0, 4.0])
    assert ratio.value == 0.5
    assert Mean.of([2.0, 6.0], ["a", "b"], [1.0, 3.0]) == Mean(2.0, 0.0, 2)


def test_deviations_are_those_of_normal_pixels_with_known_variances() -> None:
    rng = np.random.default_rng(0)
    between = np.repeat(rng.normal(0, 20, (300, 1, 1, 1)), 2, 0)  # one level for each prompt, the same at all pixels
    images = np.clip(np.rint(128 + between + rng.normal(0, 10, (600, 6, 6, 3))), 0, 255).astype(np.uint8)
    prompts = [str(i // 2) for i in range(600)]
    everything, within = deviations(images, prompts)
    assert everything.sum() / 600 * 255**2 == pytest.approx(20**2 + 10**2, rel=0.1)
    assert within.sum() / (600 - 300) * 255**2 == pytest.approx(10**2, rel=0.03)


def test_the_distance_is_the_root_mean_square() -> None:
    a, b = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    b[1, :2] = 51
    assert distances(a, b).tolist() == pytest.approx([0, math.sqrt(0.5 * 0.2**2)])
