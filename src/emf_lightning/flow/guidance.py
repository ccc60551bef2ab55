"""Classifier-free guidance: at sampling, inside the training target, and as a condition of the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.path import expand_like
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity, Context, Velocity, expand_context, map_context


def guided(
    conditional: Velocity, unconditional: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """u with guidance at sampling: u_null + scale (u_text - u_null); every call costs two network evaluations.

    Samples with t outside the closed ``interval`` have scale 1.
    """

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        null = unconditional(z, r, t)
        guidance = conditional(z, r, t) - null
        if interval == (0.0, 1.0):
            return null + scale * guidance
        active = (t >= interval[0]) & (t <= interval[1])
        return null + expand_like(torch.where(active, scale, 1.0), null).to(null.dtype) * guidance

    return u


class SamplingGuidance(ABC):
    """Base of the ways in which a guidance scale acts at sampling: dataclasses, as samplers are."""

    @abstractmethod
    def __call__(
        self, net: Callable[..., Tensor], context: Context, null_context: Context, batch: int, scale: float
    ) -> Velocity:
        """The guided velocity of ``batch`` samples.

        Args:
            net: see ``AverageVelocity``.
            context: conditioning of the samples.
            null_context: conditioning without a caption, of one sample or of all.
            batch: B.
            scale: 1 is no guidance.
        """

    @abstractmethod
    def evaluations(self, scale: float) -> int:
        """Network evaluations per sampling step."""


@dataclass(frozen=True)
class ClassifierFreeGuidance(SamplingGuidance):
    """Guidance from two evaluations a step, with and without the caption (arXiv 2207.12598)."""

    def __call__(
        self, net: Callable[..., Tensor], context: Context, null_context: Context, batch: int, scale: float
    ) -> Velocity:
        conditional = AverageVelocity(net, context)
        if scale == 1:
            return conditional
        if null_context is None:
            raise ValueError(f"guidance_scale {scale:g} needs null_context, the conditioning without a caption")
        return guided(conditional, AverageVelocity(net, expand_context(null_context, batch)), scale)

    def evaluations(self, scale: float) -> int:
        return 1 if scale == 1 else 2


@dataclass(frozen=True)
class ConditionedGuidance(SamplingGuidance):
    """Guidance that the network was trained to apply itself, from a condition: one evaluation a step.

    Attributes:
        interval: the (start, end) of t in which guidance acts.
    """

    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(
        self, net: Callable[..., Tensor], context: Context, null_context: Context, batch: int, scale: float
    ) -> Velocity:
        held: list[Tensor] = []
        if isinstance(net, torch.nn.Module):
            held += net.parameters()
        map_context(context, held.append)
        device = held[0].device if held else None
        return self.conditioned(net, context, batch, scale, device)

    def conditioned(
        self, net: Callable[..., Tensor], context: Context, batch: int, scale: float, device: torch.device | None
    ) -> AverageVelocity:
        """The guided velocity, whose conditions are on ``device``."""
        if scale < 1:
            raise ValueError(f"guidance_scale is a condition of this network and at least 1, got {scale:g}")
        omega = torch.full((batch,), scale, device=device)
        start, end = (torch.full_like(omega, time) for time in self.interval)
        return AverageVelocity(net, context, {"conditions": GuidanceCondition(omega, start, end).conditions})

    def evaluations(self, scale: float) -> int:
        return 1


@dataclass(frozen=True)
class TargetGuidance:
    """Guidance inside MeanFlow's target, so that sampling needs none (arXiv 2505.13447, eq. 19-21).

    vtil = scale v + kappa u(z, t, t | text) + (1 - scale - kappa) u(z, t, t | null) where t lies in the interval, v
    elsewhere; the effective scale is scale / (1 - kappa). u is the network's own, or the teacher's where v is: v is
    u(z, t, t | text) itself there, so that kappa has to be 0.

    Attributes:
        scale: the paper's omega; 1 with kappa 0 is no guidance.
        kappa: weight of u(z, t, t | text), in [0, 1).
        interval: the (start, end) of t in which guidance acts.

    Example:
        >>> TargetGuidance(scale=1.5, kappa=0.25).effective_scale
        2.0
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

    @property
    def changes_velocity(self) -> bool:
        """Whether vtil differs from v; otherwise u needs no evaluation."""
        return self.scale != 1 or self.kappa != 0

    @torch.no_grad()
    def __call__(
        self,
        v: Tensor,
        z: Tensor,
        t: Tensor,
        *,
        conditional: Velocity,
        unconditional: Velocity,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """vtil, like ``v`` and without a graph; samples with ``dropped`` ``[B]`` (on the null caption) keep v."""
        null = unconditional(z, t, t)
        text = conditional(z, t, t) if self.kappa else torch.zeros_like(null)
        vtil = self.scale * v + self.kappa * text + (1 - self.scale - self.kappa) * null
        active = (t >= self.interval[0]) & (t <= self.interval[1])
        if dropped is not None:
            active = active & ~dropped
        return torch.where(expand_like(active, v), vtil.to(v.dtype), v)


@dataclass(frozen=True)
class GuidanceCondition:
    """Guidance of B samples as a condition of the network (arXiv 2512.02012).

    Attributes:
        omega: ``[B]``, guidance scale, at least 1, which is none.
        start: ``[B]``, the t from which it acts, in [0, 1].
        end: ``[B]``, the t up to which it acts, in [0, 1].
    """

    omega: Tensor
    start: Tensor
    end: Tensor

    @staticmethod
    def everywhere(omega: Tensor) -> GuidanceCondition:
        """Scale ``omega`` ``[B]`` at all times."""
        return GuidanceCondition(omega, torch.zeros_like(omega), torch.ones_like(omega))

    @property
    def conditions(self) -> Tensor:
        """``[B, 3]``, fp32, in [0, 1]: 1 - 1 / omega, start, end."""
        return torch.stack([1 - 1 / self.omega, self.start, self.end], dim=1)

    def at(self, t: Tensor) -> Tensor:
        """w ``[B]``: omega where ``t`` ``[B]`` lies in the interval, 1 elsewhere."""
        return torch.where((self.start <= t) & (t <= self.end), self.omega, 1.0)


@dataclass(frozen=True)
class GuidanceSampler:
    """Sampler of the guidance of a training batch: omega with density proportional to 1 / omega, and an interval.

    Samples with r = t get the whole interval, so that their velocity target holds for any interval.

    Attributes:
        largest: omega lies in [1, largest].
        latest_start: the interval starts uniformly in [0, latest_start].
        earliest_end: it ends uniformly in [earliest_end, 1].
    """

    largest: float = 8.0
    latest_start: float = 0.5
    earliest_end: float = 0.5

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"GuidanceSampler: largest must be at least 1, got {self.largest}")
        if not 0 <= self.latest_start <= self.earliest_end <= 1:
            raise ValueError(
                "GuidanceSampler: needs 0 <= latest_start <= earliest_end <= 1, "
                f"got latest_start={self.latest_start}, earliest_end={self.earliest_end}"
            )

    def __call__(self, times: Times) -> GuidanceCondition:
        """Guidance of the samples of ``times``."""
        omega, start, end = torch.rand(3, len(times.t), device=times.t.device)
        start, end = self.latest_start * start, 1 - (1 - self.earliest_end) * end
        start[times.n_interval :], end[times.n_interval :] = 0, 1
        return GuidanceCondition(self.largest**omega, start, end)
