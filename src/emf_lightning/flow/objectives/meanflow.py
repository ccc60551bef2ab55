"""The MeanFlow objective (arXiv 2505.13447, eq. 9-10; for text-to-image arXiv 2604.18168, eq. 1-2)."""

from __future__ import annotations

import torch
from torch import Tensor

from emf_lightning.flow.derivative.derivative import Derivative, ForwardMode
from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, bounded, regress
from emf_lightning.flow.path import Velocity, over
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


class MeanFlowObjective(Objective):
    """u_tgt = sg[v - (t - r) du/dt], which is v where r = t.

    The derivative is taken for the r < t rows only (the others' factor t - r is zero), before the one forward pass
    that carries gradients. With ``FiniteDifference`` it is the objective of TiM (arXiv 2509.04394).

    Args:
        derivative: how du/dt is taken.
        bound: the target of the r < t rows is cut to +-bound, elementwise. The exact u averages velocities, so it
            never leaves their range; du/dt of an untrained u does, and then feeds on itself.
    """

    def __init__(self, derivative: Derivative | None = None, bound: float | None = None) -> None:
        if bound is not None and bound <= 0:
            raise ValueError(f"MeanFlowObjective: bound must be positive, got {bound}")
        self.derivative: Derivative = derivative or ForwardMode()
        self.bound = bound

    def __call__(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t) against u_tgt."""
        n, r, t = times.n_interval, times.r, times.t
        u_theta, dudt = self.derivative(u, z, r, t, v, n)
        u_tgt = v[:n] - over(t[:n] - r[:n], z) * dudt.to(v.dtype)
        target = torch.cat([bounded(u_tgt, self.bound), v[n:]])
        return regress(u_theta, target, v, times, weighting, dudt)
