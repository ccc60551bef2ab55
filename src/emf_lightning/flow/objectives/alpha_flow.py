"""The AlphaFlow objective (arXiv 2510.20771): a curriculum from flow matching to MeanFlow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import FlowMapTerms, weighted_mse
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.target_velocity import TargetVelocity
from emf_lightning.flow.times import Times, TimeSampler
from emf_lightning.flow.velocity import Velocity, slice_velocity, stop_gradient
from emf_lightning.flow.weighting import Weighting


@dataclass(frozen=True)
class AlphaSchedule:
    """alpha = 1 - sigmoid(gamma (progress - middle) / (end - start)), 1 before ``start`` and 0 after ``end``.

    Attributes:
        start: progress of training at which alpha leaves 1.
        end: progress at which it reaches 0; alpha = 1/2 half-way between.
        gamma: steepness there; at the release's 25 alpha falls from .95 to .05 within a quarter of the way.
        snap: alpha within ``snap`` of 0 or 1 is 0 or 1. The error shrinks with alpha, rounding does not: in bf16 the
            release's .005 leaves more rounding than error.
    """

    start: float = 0.0
    end: float = 1.0
    gamma: float = 25.0
    snap: float = 0.005

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"AlphaSchedule: needs 0 <= start < end <= 1, got start={self.start}, end={self.end}")
        if not 0 < self.snap < 0.5:
            raise ValueError(f"AlphaSchedule: snap must lie in (0, .5), got {self.snap}: at 0 alpha never becomes 0")

    def __call__(self, progress: float) -> float:
        """alpha at ``progress``, both in [0, 1]."""
        way = (progress - self.start) / (self.end - self.start)
        alpha = 1 / (1 + math.exp(self.gamma * (way - 0.5)))
        if alpha < self.snap or way >= 1:
            return 0.0
        return 1.0 if alpha > 1 - self.snap or way <= 0 else alpha


class AlphaFlow(MeanFlow):
    """Regression on u_tgt = sg[alpha v + (1 - alpha) u(z_s, r, s)], s = alpha r + (1 - alpha) t, z_s = z_t - (t - s) v.

    Where r = t the target is v. alpha = 1 is flow matching, alpha = 0 MeanFlow with its derivative. In between no
    derivative is taken: a step costs one forward pass without a graph more than flow matching, and any attention kernel
    will do. The target's bias at the exact u is O(alpha^2).

    For small alpha the error D of r < t samples is alpha times MeanFlow's. Its square wants a weight of 1 / alpha, in
    the paper, and alpha / (D^2 + c), in the release's adaptive form. Both are alpha w(D^2 / alpha^2) of the weighting
    w, which so sees the error on MeanFlow's scale: gradients turn continuously into MeanFlow's, and c means the same at
    every alpha, where the release's grows relative to the error. Samples with r = t, and alpha = 0, have no factor.

    Args:
        alpha: its schedule over training progress.
        times: see ``MeanFlow``.
        weighting: see ``MeanFlow``.
        velocity: see ``MeanFlow``.
        guidance: see ``MeanFlow``.
        derivative: computes du/dt at alpha = 0.
        clip_target: see ``MeanFlow``; 4 in the release.

    Example:
        >>> from emf_lightning.flow.objectives.alpha_flow import AlphaSchedule
        >>> objective = AlphaFlow(AlphaSchedule(start=0.0, end=0.8))
        >>> [round(objective.alpha(progress), 2) for progress in (0.0, 0.4, 0.8)]
        [1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        alpha: AlphaSchedule = AlphaSchedule(),
        *,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        velocity: TargetVelocity | None = None,
        guidance: TargetGuidance | None = None,
        derivative: Derivative | None = None,
        clip_target: float | None = None,
    ) -> None:
        super().__init__(
            times=times,
            weighting=weighting,
            velocity=velocity,
            guidance=guidance,
            derivative=derivative,
            clip_target=clip_target,
        )
        self.alpha = alpha

    def terms(
        self, u: Velocity, z: Tensor, v: Tensor, times: Times, weighting: Weighting, progress: float
    ) -> FlowMapTerms:
        """The error of u(z, r, t) against u_tgt; ``squared_error`` is that of u itself, not divided by alpha^2."""
        alpha, n, r, t = self.alpha(progress), times.n_interval, times.r, times.t
        if alpha == 0:
            return super().terms(u, z, v, times, weighting, progress)
        u_tgt = v[:n]
        if n and alpha < 1:
            s = alpha * r[:n] + (1 - alpha) * t[:n]
            z_s = z[:n] - expand_like(t[:n] - s, z) * v[:n]
            u_s = stop_gradient(slice_velocity(u, slice(n), len(z)), z_s, r[:n], s)
            u_tgt = alpha * v[:n] + (1 - alpha) * u_s
        target = torch.cat([self.clip(u_tgt), v[n:]])
        return weighted_mse(u(z, r, t), target, v, times, _MeanFlowScale(weighting, alpha))


class _MeanFlowScale(Weighting):
    """alpha w(D^2 / alpha^2) of the r < t samples, w(D^2) of the others."""

    def __init__(self, weighting: Weighting, alpha: float) -> None:
        self.weighting = weighting
        self.alpha = alpha

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """Per-sample losses ``[B]``."""
        alpha = torch.ones_like(squared_error)
        alpha[: times.n_interval] = self.alpha
        return alpha * self.weighting(squared_error / alpha**2, times)
