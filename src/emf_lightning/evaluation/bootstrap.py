"""Bootstrap over prompts: images of one prompt resemble each other, so that prompts are resampled, not images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
"""Bootstrap samples behind a standard error, which is then known to about 2 %, or behind an interval."""


def bootstrap_means(totals: NDArray, weights: NDArray, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means over resampled prompts, ``[RESAMPLES]``, from each prompt's sum of values and their number, ``[P]``."""
    n = len(totals)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return (counts @ totals) / (counts @ weights)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, bootstrapped over captions."""

    mean: float
    low: float
    high: float

    @classmethod
    def from_samples(cls, values: NDArray[np.floating]) -> Estimate:
        """The estimate from independent ``values`` ``[N]``."""
        n, rng = len(values), np.random.default_rng(0)
        means = [values[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
        return cls.from_bootstrap(float(values.mean()), means)

    @classmethod
    def from_bootstrap(cls, mean: float, resampled: Sequence[float] | NDArray[np.floating]) -> Estimate:
        """The estimate from a mean and its values in bootstrap samples; NaN values are left out."""
        kept = np.asarray(resampled)[~np.isnan(resampled)]
        low, high = np.quantile(kept, (0.025, 0.975)) if len(kept) and not np.isnan(mean) else (np.nan, np.nan)
        return cls(float(mean), float(low), float(high))

    def __str__(self) -> str:
        return "" if np.isnan(self.mean) else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
