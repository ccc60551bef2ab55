"""A mean with its bootstrapped 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
"""Bootstrap samples behind an interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, bootstrapped over captions."""

    mean: float
    low: float
    high: float

    @classmethod
    def from_samples(cls, values: NDArray[np.floating], seed: int = 0) -> Estimate:
        """The estimate from independent ``values`` ``[N]``."""
        n, rng = len(values), np.random.default_rng(seed)
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
