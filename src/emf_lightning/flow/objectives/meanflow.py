"""The MeanFlow objective (arXiv 2505.13447, eq. 9-10; for text-to-image arXiv 2604.18168, eq. 1-2)."""

from __future__ import annotations

import torch
from torch import Tensor

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, weighted_mse
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.target_velocity import TargetVelocity
from emf_lightning.flow.times import LogitNormalTimes, Times, TimeSampler
from emf_lightning.flow.velocity import Velocity
from emf_lightning.flow.weighting import Weighting


class MeanFlow(Objective):
    """Regression of u(z, r, t) on u_tgt = sg[v - (t - r) du/dt], which is v where r = t.

    The derivative is taken for the r < t samples only (t - r is zero for the others), before the one forward pass that
    has gradients. With ``FiniteDifference`` it is the objective of TiM (arXiv 2509.04394).

    Args:
        times: sampler of (r, t); by default the paper's.
        weighting: from summed squared errors to losses; by default adaptive with p = 1.
        velocity: source of v in target and tangent; by default e - x.
        guidance: classifier-free guidance inside the target; sampling then needs none.
        derivative: computes du/dt; by default exactly.
        clip_target: bound of the r < t samples' target, elementwise; None does not clip.

    Example:
        >>> net = lambda z, r, t, c: z * c[:, None]
        >>> terms = MeanFlow()(net, torch.randn(8, 4), torch.ones(8), progress=0.5)
        >>> terms.loss.shape, terms.times.n_interval
        (torch.Size([]), 2)
    """

    takes_derivative = True

    def __init__(
        self,
        *,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        velocity: TargetVelocity | None = None,
        guidance: TargetGuidance | None = None,
        derivative: Derivative | None = None,
        clip_target: float | None = None,
    ) -> None:
        super().__init__(
            times=times or LogitNormalTimes(sort_first=True),
            weighting=weighting,
            velocity=velocity,
            guidance=guidance,
            clip_target=clip_target,
        )
        self.derivative: Derivative = derivative or ForwardMode()

    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t) against u_tgt; see ``Objective.terms``."""
        n, r, t = times.n_interval, times.r, times.t
        u_theta, dudt = self.derivative(u, z, r, t, v, n)
        u_tgt = v[:n] - expand_like(t[:n] - r[:n], z) * dudt.to(v.dtype)
        target = torch.cat([self.clip(u_tgt), v[n:]])
        return weighted_mse(u_theta, target, v, times, weighting, dudt)
