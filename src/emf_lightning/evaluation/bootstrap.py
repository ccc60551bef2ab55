"""Bootstrap over prompts: images of one prompt resemble each other, so that prompts are resampled, not images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
"""Bootstrap samples behind a standard error, which is then known to about 2 %."""


def bootstrap_means(totals: NDArray, weights: NDArray, rng: np.random.Generator) -> NDArray[np.float64]:
    """Weighted means of resampled prompts, ``[RESAMPLES]``.

    Args:
        totals: ``[P]``, sum of each prompt's values.
        weights: ``[P]``, number of values in each sum.
        rng: resamples the prompts.
    """
    n = len(totals)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return (counts @ totals) / (counts @ weights)
