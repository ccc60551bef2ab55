from __future__ import annotations

import numpy as np

from emf_lightning.evaluation.encoders.estimate import Estimate


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [
        e.low <= 0.3 <= e.high
        for e in (Estimate.from_samples((rng.random(200) < 0.3).astype(float)) for _ in range(100))
    ]
    assert 0.88 < np.mean(inside) < 0.99
