"""Classifier-free guidance: at sampling, and inside the training target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.path import Velocity, over


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """u with guidance at sampling: u_null + scale (u_text - u_null); every call costs two network evaluations."""

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        null = unconditional(z, r, t)
        return null + scale * (conditional(z, r, t) - null)

    return u


@dataclass(frozen=True)
class TargetGuidance:
    """Guidance inside MeanFlow's target, so that sampling needs none (arXiv 2505.13447, eq. 19-21).

    vtil = scale v + kappa u(z, t, t | text) + (1 - scale - kappa) u(z, t, t | null) where t lies in the interval, v
    elsewhere; the effective scale is scale / (1 - kappa). u is the model's own, or the teacher's where v is.

    Attributes:
        scale: the paper's omega; 1 with kappa 0 is no guidance.
        kappa: share of u(z, t, t | text), in [0, 1).
        interval: the (start, end) of t in which guidance acts.
    """

    scale: float = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < 1:
            raise ValueError(f"TargetGuidance: kappa must lie in [0, 1), got {self.kappa}")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"TargetGuidance: interval must be 0 <= start < end <= 1, got {self.interval}")

    @property
    def effective_scale(self) -> float:
        """w' = scale / (1 - kappa), comparable with a sampling guidance scale."""
        return self.scale / (1 - self.kappa)

    @torch.no_grad()
    def __call__(
        self, v: Tensor, z: Tensor, t: Tensor, *, conditional: Velocity, unconditional: Velocity, dropped: Tensor
    ) -> Tensor:
        """vtil, like ``v`` and without a graph; rows with ``dropped`` ``[B]`` (trained on the null caption) keep v."""
        null = unconditional(z, t, t)
        text = conditional(z, t, t) if self.kappa else torch.zeros_like(null)
        vtil = self.scale * v + self.kappa * text + (1 - self.scale - self.kappa) * null
        active = (t >= self.interval[0]) & (t <= self.interval[1]) & ~dropped
        return torch.where(over(active, v), vtil.to(v.dtype), v)
