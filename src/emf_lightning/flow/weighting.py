"""How much each row's squared error counts."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from emf_lightning.flow.times import Times


class Weighting(ABC):
    """A rule from squared errors to losses."""

    @abstractmethod
    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """The rows' losses ``[B]``, from ``squared_error`` ``[B]``, summed over dimensions, and the rows' (r, t)."""


class UniformWeighting(Weighting):
    """Every row counts by its squared error: MeanFlow as the EMF paper writes it."""

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """The squared error itself."""
        return squared_error


class AdaptiveWeighting(Weighting):
    """w = 1 / sg(D + c)^p of a row's own summed squared error D (arXiv 2505.13447, eq. 22).

    With p = 1 the loss is about 1 whatever is learned: read the raw mean squared errors instead.

    Args:
        power: p; 0 is no weighting, 1 the papers' default.
        offset: c > 0, in units of the sum over all dimensions.
    """

    def __init__(self, power: float = 1.0, offset: float = 1e-3) -> None:
        if offset <= 0:
            raise ValueError(f"AdaptiveWeighting: offset must be positive, got {offset}")
        self.power = power
        self.offset = offset

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """D / sg(D + c)^p; the weight carries no gradient."""
        return squared_error / (squared_error.detach() + self.offset) ** self.power


class TransitionWeighting(AdaptiveWeighting):
    """The adaptive weight times (tan t - tan r + sigma_d)^(-1/2): long intervals count less (arXiv 2509.04394).

    The tangent is that of t itself, in radians, as the release takes it for the linear path: tan 1 = 1.56, so nothing
    has to be guarded at the noise's end. Rows with r = t have a factor of 1.

    Args:
        sigma_data: sigma_d > 0, the data's standard deviation; the release's 1 makes the factor continuous at r = t.
        power: see ``AdaptiveWeighting``, as ``offset``; the release has p = 1 and c = 1e-5 of the mean over dimensions.
    """

    def __init__(self, sigma_data: float = 1.0, power: float = 1.0, offset: float = 1e-3) -> None:
        super().__init__(power, offset)
        if sigma_data <= 0:
            raise ValueError(f"TransitionWeighting: sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """The adaptive losses times the factor, which is between .62 and 1 at sigma_d = 1."""
        factor = torch.rsqrt(torch.tan(times.t) - torch.tan(times.r) + self.sigma_data)
        factor[times.n_interval :] = 1
        return factor * super().__call__(squared_error, times)
