"""Recursive consistency (RCGM, "Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation").

The formulas are those of TwinFlow (arXiv 2512.05150), which builds upon it, and of its release.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, weighted_mse
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.target_velocity import TargetVelocity
from emf_lightning.flow.times import AnyStepTimes, Times, TimeSampler
from emf_lightning.flow.velocity import CoarseOutput, Velocity, no_grad_pass, slice_velocity
from emf_lightning.flow.weighting import AnyStepWeighting, Weighting


class RCGM(Objective):
    """Regression on u_tgt = sg[u - clip(G)] with G = ((t - r) u(z_t, r, t) - S) / h - v, and v where r = t.

    A step of length h along v, z_s = z_t - h v with s = t - h, then N equal jumps of the network itself from s to r,
    whose sum is S: for the exact u the two paths have the same length, (t - r) u = h v + S, up to O(h). Intervals
    shorter than h take G = u - v. With N = 1 and h -> 0, G is MeanFlow's error u + (t - r) du/dt - v; with N > 1 it
    compares one jump with several as well, and grows as 1 / h where these differ, so it is clipped.

    It takes no derivative, so any attention kernel will do, but N + 1 passes without a graph, outside autocast: G
    multiplies rounding by (t - r) / h. The release takes an exponential moving average of the network for these passes
    and for guidance; here they are the network's own.

    Args:
        order: N, the jumps.
        step: h, in (0, 1).
        residual_bound: G is clipped to +- this, elementwise.
        times: sampler of (r, t); by default ``AnyStepTimes``.
        weighting: from summed squared errors to losses; by default ``AnyStepWeighting``.
        velocity: source of v; by default e - x.
        guidance: classifier-free guidance inside v; the release's is ``TargetGuidance(scale=1, kappa=rho)``.

    Raises:
        ValueError: for values out of range, and on the first batch where u comes out of bf16 or fp16 arithmetic.

    Example:
        >>> RCGM(order=1)(lambda z, r, t: z, torch.randn(6, 4)).times.n_interval
        4
    """

    def __init__(
        self,
        *,
        order: int = 2,
        step: float = 0.01,
        residual_bound: float = 1.0,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        velocity: TargetVelocity | None = None,
        guidance: TargetGuidance | None = None,
    ) -> None:
        super().__init__(
            times=times or AnyStepTimes(),
            weighting=weighting or AnyStepWeighting(),
            velocity=velocity,
            guidance=guidance,
        )
        name = type(self).__name__
        if order < 1:
            raise ValueError(f"{name}: order must be at least 1, got {order}")
        if not 0 < step < 1:
            raise ValueError(f"{name}: step must lie in (0, 1), got {step}")
        if residual_bound <= 0:
            raise ValueError(f"{name}: residual_bound must be positive, got {residual_bound}")
        self.order, self.step, self.residual_bound = order, step, residual_bound
        self._coarse = CoarseOutput()

    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t) against u_tgt; see ``Objective.terms``."""
        n = times.n_interval
        u_tgt = v[:n]
        if n:
            u_n = slice_velocity(u, slice(n), len(z))
            with no_grad_pass(), torch.autocast(z.device.type, enabled=False):
                u_tgt = self._target(u_n, z[:n], times.r[:n], times.t[:n], v[:n])
        return weighted_mse(u(z, times.r, times.t), torch.cat([u_tgt, v[n:]]), v, times, weighting)

    def _target(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        own = u(z, r, t)
        if (dtype := self._coarse(own)) is not None:
            raise ValueError(
                f"{type(self).__name__} in {dtype}: rounding is multiplied by up to 1 / step = {1 / self.step:g} "
                "in the target; keep fp32 weights, and use no autocast inside the network"
            )
        s = torch.maximum(t - self.step, r)
        z = z - expand_like(t - s, z) * v
        jumps = torch.zeros_like(z)
        for start, end in pairwise(torch.lerp(s, r, k / self.order) for k in range(self.order + 1)):
            jump = expand_like(start - end, z) * u(z, end, start)
            z, jumps = z - jump, jumps + jump
        # an interval shorter than h is all step: its jumps have no length, and its own length cancels
        whole = expand_like(((t - r) / self.step).clamp(min=1), z)
        residual = whole * own - jumps / self.step - v
        return own - residual.clamp(-self.residual_bound, self.residual_bound)
