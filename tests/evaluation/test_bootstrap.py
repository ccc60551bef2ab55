from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.evaluation.bootstrap import RESAMPLES, Estimate, bootstrap_means


def test_the_deviation_is_the_standard_error_of_a_mean_over_prompts():
    values = np.random.default_rng(0).normal(size=200)
    means = bootstrap_means(3 * values, np.full(200, 3), np.random.default_rng(1))
    assert means.shape == (RESAMPLES,)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std(ddof=1) == pytest.approx(values.std() / 200**0.5, rel=0.1)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [
        e.low <= 0.3 <= e.high
        for e in (Estimate.from_samples((rng.random(200) < 0.3).astype(float)) for _ in range(100))
    ]
    assert 0.88 < np.mean(inside) < 0.99
