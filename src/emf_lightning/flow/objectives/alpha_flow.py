"""The AlphaFlow objective (arXiv 2510.20771): a curriculum from flow matching to MeanFlow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.derivative.derivative import Derivative
from emf_lightning.flow.objectives.base import FlowMapTerms, Objective, bounded, regress
from emf_lightning.flow.objectives.meanflow import MeanFlowObjective
from emf_lightning.flow.path import Velocity, of_rows, over, without_graph
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import Weighting


@dataclass(frozen=True)
class AlphaSchedule:
    """alpha = 1 - sigmoid(gamma (progress - middle) / (end - start)), 1 before ``start`` and 0 after ``end``.

    Attributes:
        start: progress of training where alpha leaves 1.
        end: where it reaches 0; the middle, alpha = 1/2, is half-way between.
        gamma: how steep it is there; at the release's 25 alpha is between .95 and .05 for a quarter of the way.
        snap: alpha within ``snap`` of 0 or 1 is 0 or 1. The error shrinks as alpha does, and the arithmetic's rounding
            does not: in bf16 the release's .005 leaves more rounding than error.
    """

    start: float = 0.0
    end: float = 1.0
    gamma: float = 25.0
    snap: float = 0.005

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"AlphaSchedule: needs 0 <= start < end <= 1, got start={self.start}, end={self.end}")
        if not 0 < self.snap < 0.5:
            raise ValueError(f"AlphaSchedule: snap must lie in (0, .5), got {self.snap}: at 0 nothing becomes MeanFlow")

    def __call__(self, progress: float) -> float:
        """alpha at ``progress``, both in [0, 1]."""
        way = (progress - self.start) / (self.end - self.start)
        alpha = 1 / (1 + math.exp(self.gamma * (way - 0.5)))
        if alpha < self.snap or way >= 1:
            return 0.0
        return 1.0 if alpha > 1 - self.snap or way <= 0 else alpha


class AlphaFlowObjective(Objective):
    """u_tgt = sg[alpha v + (1 - alpha) u(z_s, r, s)] for s = alpha r + (1 - alpha) t and z_s = z_t - (t - s) v.

    Where r = t it is v. alpha = 1 is flow matching, alpha = 0 MeanFlow with its derivative. In between no derivative is
    taken: a step costs one forward pass without a graph more than flow matching, and any attention kernel will do.
    The target's bias at the exact u is O(alpha^2).

    For small alpha the error D of r < t rows is alpha times MeanFlow's. Its square wants a weight of 1 / alpha, in the
    paper, and alpha / (D^2 + c), in the release's adaptive form. Both are alpha w(D^2 / alpha^2) of the weighting w,
    which so sees the error on MeanFlow's scale: gradients go over into MeanFlow's, and c means the same at every alpha,
    where the release's grows relative to the error. Rows with r = t, and alpha = 0, have no factor.

    Args:
        alpha: its schedule over training progress.
        derivative: how du/dt is taken at alpha = 0; see ``MeanFlowObjective``.
        bound: the target of the r < t rows is cut to +-bound, elementwise; 4 in the release.
    """

    def __init__(
        self,
        alpha: AlphaSchedule = AlphaSchedule(),
        derivative: Derivative | None = None,
        bound: float | None = None,
    ) -> None:
        self.alpha = alpha
        self.meanflow = MeanFlowObjective(derivative, bound)
        self.derivative = self.meanflow.derivative

    def __call__(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t) against u_tgt; ``squared_error`` is that of u itself, not divided by alpha^2."""
        alpha, n, r, t = self.alpha(progress), times.n_interval, times.r, times.t
        if alpha == 0:
            return self.meanflow(u, z, v, times, weighting, progress)
        u_tgt = v[:n]
        if n and alpha < 1:
            s = alpha * r[:n] + (1 - alpha) * t[:n]
            z_s = z[:n] - over(t[:n] - s, z) * v[:n]
            u_tgt = alpha * v[:n] + (1 - alpha) * without_graph(of_rows(u, slice(n)), z_s, r[:n], s)
        target = torch.cat([bounded(u_tgt, self.meanflow.bound), v[n:]])
        return regress(u(z, r, t), target, v, times, _OnMeanFlowsScale(weighting, alpha))


class _OnMeanFlowsScale(Weighting):
    """alpha w(D^2 / alpha^2) of the r < t rows, w(D^2) of the others."""

    def __init__(self, weighting: Weighting, alpha: float) -> None:
        self.weighting = weighting
        self.alpha = alpha

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """The rows' losses."""
        alpha = torch.ones_like(squared_error)
        alpha[: times.n_interval] = self.alpha
        return alpha * self.weighting(squared_error / alpha**2, times)
