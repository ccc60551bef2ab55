"""The SplitMeanFlow objective (arXiv 2507.16884): average velocities of two parts give that of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, weighted_mse
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import Velocity, slice_velocity, stop_gradient
from emf_lightning.flow.weighting import Weighting


class SplitMeanFlow(Objective):
    """Regression on u_tgt = sg[(1 - lam) u1 + lam u2], u2 = u(z_t, s, t), u1 = u(z_s, r, s), z_s = z_t - (t - s) u2.

    s = (1 - lam) t + lam r, and lam is uniform on (0, 1). That is the additivity of the integral,
    (t - r) u(z_t, r, t) = (s - r) u(z_s, r, s) + (t - s) u(z_t, s, t). It takes no derivative, so any attention kernel
    will do, but two forward passes without a graph.

    The identity alone has u = 0 among its solutions: v enters only where r = t, as the target. At least half of the
    samples should have r = t, as in the paper.

    The arguments ``times``, ``weighting``, ``velocity``, ``guidance`` and ``clip_target`` are
    those of ``MeanFlow``; see ``Objective``.

    Example:
        >>> SplitMeanFlow()(lambda z, r, t: z, torch.randn(8, 4)).derivative_norm.numel()
        0
    """

    def split(self, r: Tensor) -> Tensor:
        """lam ``[N]``, uniform on (0, 1), for N samples."""
        return torch.rand_like(r)

    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t) against u_tgt; see ``Objective.terms``."""
        n = times.n_interval
        u_tgt = v[:n]
        if n:
            u_n, z_t, r, t = slice_velocity(u, slice(n), len(z)), z[:n], times.r[:n], times.t[:n]
            lam = self.split(r)
            s = (1 - lam) * t + lam * r
            u2 = stop_gradient(u_n, z_t, s, t)
            u1 = stop_gradient(u_n, z_t - expand_like(t - s, z) * u2, r, s)
            u_tgt = self.clip(expand_like(1 - lam, z) * u1 + expand_like(lam, z) * u2)
        return weighted_mse(u(z, times.r, times.t), torch.cat([u_tgt, v[n:]]), v, times, weighting)
