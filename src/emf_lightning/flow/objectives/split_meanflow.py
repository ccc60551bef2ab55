"""The SplitMeanFlow objective (arXiv 2507.16884): average velocities of two parts make that of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, bounded, regress
from emf_lightning.flow.path import Velocity, of_rows, over, without_graph
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


class SplitMeanFlowObjective(Objective):
    """u_tgt = sg[(1 - lam) u1 + lam u2] with u2 = u(z_t, s, t) and u1 = u(z_s, r, s), z_s = z_t - (t - s) u2.

    s = (1 - lam) t + lam r, and lam is uniform on (0, 1). That is the additivity of the integral,
    (t - r) u(z_t, r, t) = (s - r) u(z_s, r, s) + (t - s) u(z_t, s, t). It takes no derivative, so any attention kernel
    will do, but two forward passes without a graph.

    The identity alone has u = 0 among its solutions: v enters only where r = t, as the target. At least half of the
    rows should be such, as in the paper.

    Args:
        bound: the target of the r < t rows is cut to +-bound, elementwise.
    """

    def __init__(self, bound: float | None = None) -> None:
        if bound is not None and bound <= 0:
            raise ValueError(f"SplitMeanFlowObjective: bound must be positive, got {bound}")
        self.bound = bound

    def split(self, r: Tensor) -> Tensor:
        """lam ``[N]``, uniform on (0, 1), for N rows."""
        return torch.rand_like(r)

    def __call__(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t) against u_tgt."""
        n = times.n_interval
        u_tgt = v[:n]
        if n:
            u_n, z_t, r, t = of_rows(u, slice(n)), z[:n], times.r[:n], times.t[:n]
            lam = self.split(r)
            s = (1 - lam) * t + lam * r
            u2 = without_graph(u_n, z_t, s, t)
            u1 = without_graph(u_n, z_t - over(t - s, z) * u2, r, s)
            u_tgt = bounded(over(1 - lam, z) * u1 + over(lam, z) * u2, self.bound)
        return regress(u(z, times.r, times.t), torch.cat([u_tgt, v[n:]]), v, times, weighting)
