"""How much each row's squared error counts."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
