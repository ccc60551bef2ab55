"""The flow-matching objective (arXiv 2210.02747)."""

from __future__ import annotations

from torch import Tensor

from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, weighted_mse
from emf_lightning.flow.sampling import EulerSampler
from emf_lightning.flow.times import LogitNormalTimes, Schedule, Times, TimeSampler
from emf_lightning.flow.velocity import Velocity
from emf_lightning.flow.weighting import UniformWeighting, Weighting


class FlowMatching(Objective):
    """Regression of u(z, t, t) on v: trains the parent of a few-step model.

    Args:
        times: sampler of t; its ``flow_matching_ratio`` must be 1.
        weighting: from summed squared errors to losses.

    Raises:
        ValueError: for times with r < t.

    Example:
        >>> terms = FlowMatching()(lambda z, r, t: 0 * z, torch.zeros(8, 1, 2, 2))
        >>> terms.squared_error.shape
        torch.Size([8])
    """

    needs_interval = False
    sampler = EulerSampler()

    def __init__(self, *, times: TimeSampler | None = None, weighting: Weighting | None = None) -> None:
        times = times or LogitNormalTimes(Schedule(0.0), Schedule(1.0), flow_matching_ratio=Schedule(1.0))
        super().__init__(times=times, weighting=weighting or UniformWeighting())
        if times.has_intervals:
            raise ValueError(
                "FlowMatching has no r < t samples: set flow_matching_ratio of its times to 1, or train MeanFlow"
            )

    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float = 0.0
    ) -> FlowMapTerms:
        """The error of u(z, t, t) against v; see ``Objective.terms``."""
        return weighted_mse(u(z, times.t, times.t), v, v, times, weighting)
