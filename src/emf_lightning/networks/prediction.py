"""Parametrizations of a backbone's output."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Prediction(ABC):
    """A rule from a backbone's output to the average velocity u."""

    @abstractmethod
    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """u, from ``output`` and the state ``z``, both ``[B, C, H, W]``, at ``t`` ``[B]``."""


class PredictVelocity(Prediction):
    """u-prediction: the output is u itself, as in SANA, BLIP3o-NEXT and EMF."""

    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return output


class PredictData(Prediction):
    """x-prediction: u = (z - output) / t, where the output is the data predicted from the interval's mean velocity.

    The parametrization of pixel MeanFlow (arXiv 2601.22158): with large patches the data lie on a thin manifold of
    the patch's dimensions and the velocity does not.

    Args:
        min_time: lower bound of t in the division, which bounds u near the data.
    """

    def __init__(self, min_time: float = 0.05) -> None:
        if not 0 < min_time < 1:
            raise ValueError(f"PredictData: min_time must lie in (0, 1), got {min_time}")
        self.min_time = min_time

    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """(z - output) / max(t, min_time), in fp32."""
        return (z - output.float()) / t.clamp(min=self.min_time).view(-1, 1, 1, 1)


class PredictReversedVelocity(Prediction):
    """Prediction of x - e, the velocity where t = 0 is noise: InstaFlow (arXiv 2309.06380)."""

    def __call__(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return -output
