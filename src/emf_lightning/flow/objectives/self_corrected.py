"""Self-corrected flow distillation (SCFlow, arXiv 2412.16906): one velocity for one step and for few.

X(z, t; u) = z - t u(z, t, t) predicts x0, the data at the end of the path. The student's X is trained to be constant
along the teacher's paths, and its single step to agree with its several steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.flow.objectives.adversarial import DiscriminatorTerms, discriminator_loss, generator_loss
from emf_lightning.flow.objectives.base import LossTerm, with_gradient_of, zero_non_finite_inputs
from emf_lightning.flow.path import expand_like, interpolate
from emf_lightning.flow.sampling import EulerSampler
from emf_lightning.flow.times import Schedule, TimeSampler, UniformTimes
from emf_lightning.flow.velocity import (
    AverageVelocity,
    Context,
    Velocity,
    call_with_context,
    no_grad_pass,
    stop_gradient,
)


def predict_x0(u: Velocity, z: Tensor, t: Tensor) -> Tensor:
    """X(z, t; u), like ``z`` ``[B, C, H, W]``, fp32."""
    return z - expand_like(t, z) * u(z, t, t).float()


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Per-sample means ``[B]`` of sqrt((a - b)^2 + c^2) - c."""
    return (((a - b).square() + c**2).sqrt() - c).flatten(1).mean(1)


@dataclass(frozen=True)
class ConsistencyTerms:
    """Consistency losses of B samples, ``[B]``, with the student's graph.

    Attributes:
        forward: X at t against X one step of the teacher's nearer to the data, or near them the data themselves.
        backward: X at t against X one step nearer to the noise.
    """

    forward: Tensor
    backward: Tensor


@dataclass(frozen=True)
class VelocityConsistency:
    """X(z_t, t) of the student against its target's on both sides, one Euler step of the teacher away.

    Steps are uniform up to ``max_step``, in t, and end at 0 and 1. Released settings: max_step .1, truncation .4 for
    CelebA-HQ and .1 for text-to-image.

    Attributes:
        max_step: longest step.
        truncation: samples whose step ends below this have the data themselves as their target.
        huber_c: c of the pseudo-Huber distance.
    """

    max_step: float = 0.1
    truncation: float = 0.1
    huber_c: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.max_step <= 1:
            raise ValueError(f"VelocityConsistency: max_step must lie in (0, 1], got {self.max_step}")
        if not 0 <= self.truncation < 1:
            raise ValueError(f"VelocityConsistency: truncation must lie in [0, 1), got {self.truncation}")
        if self.huber_c <= 0:
            raise ValueError(f"VelocityConsistency: huber_c must be positive, got {self.huber_c}")

    def __call__(
        self, student: Velocity, target: Velocity, teacher: Velocity, x: Tensor, e: Tensor, t: Tensor, backward: bool
    ) -> ConsistencyTerms:
        """Both losses; gradients flow through the student at t alone.

        Args:
            student: the velocity that learns.
            target: its moving average.
            teacher: the velocity whose paths are followed.
            x: ``[B, C, H, W]``, data.
            e: like ``x``, noise.
            t: ``[B]``, fp32, in (0, 1).
            backward: whether to compute the backward loss; without it, it is 0 and costs nothing.
        """
        z = interpolate(x, e, t)
        down, up = (torch.rand(len(t), device=t.device, dtype=t.dtype) for _ in range(2))
        down, up = down * t.clamp(max=self.max_step), up * (1 - t).clamp(max=self.max_step)
        v = stop_gradient(teacher, z, t, t)
        after = _detached_x0(target, z - expand_like(down, z) * v, t - down)
        after = torch.where(expand_like(t - down < self.truncation, x), x, after)
        before = _detached_x0(target, z + expand_like(up, z) * v, t + up) if backward else None
        x0 = predict_x0(student, z, t)
        forward = pseudo_huber(x0, after, self.huber_c)
        if before is None:
            return ConsistencyTerms(forward, torch.zeros_like(forward))
        return ConsistencyTerms(forward, pseudo_huber(x0, before, self.huber_c))


def _detached_x0(u: Velocity, z: Tensor, t: Tensor) -> Tensor:
    return z - expand_like(t, z) * stop_gradient(u, z, t, t)


def one_step(student: Velocity, e: Tensor) -> Tensor:
    """Samples of the student in one step, from noise ``e`` ``[B, C, H, W]``."""
    return predict_x0(student, e, torch.ones(len(e), device=e.device))


def step_alignment(student: Velocity, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """Per-sample errors ``[B]`` of X on the straight line from ``e`` to its one-step sample, against that sample.

    Args:
        student: the velocity that learns, through its values on the line alone.
        x: ``[B, C, H, W]``, ``one_step`` of ``e``.
        e: like ``x``, the same noise.
        t: ``[B]``, fp32, in (0, 1).
    """
    x = x.detach()
    return (predict_x0(student, interpolate(x, e, t), t) - x).square().flatten(1).mean(1)


@dataclass(frozen=True)
class SelfCorrectedTerms:
    """Loss and diagnostics of one batch.

    Attributes:
        loss: the weighted sum of all terms over the finite samples, a scalar with a graph.
        finite: ``[B]``, False for samples whose loss is not finite; they are left out.
        metrics: mean of each term, unweighted and detached.
    """

    loss: Tensor
    finite: Tensor
    metrics: dict[str, Tensor]


class SelfCorrectedFlow:
    """Objective of a velocity that points at the same data along a teacher's paths, and of its discriminator.

    The loss is consistency towards the data, plus three terms: consistency towards the noise, the alignment of one step
    with several, and the adversarial loss of one-step samples.

    Args:
        consistency: both consistencies.
        times: sampler of t; its ``flow_matching_ratio`` must be 1.
        backward: weight of consistency towards the noise.
        alignment: weight of the agreement of one step with several.
        adversarial: weight of the adversarial loss.
        r1: gamma of the discriminator's penalty; 0 is none.
        discriminator_times: sampler of the t up to which the discriminator's inputs are noised; None adds no noise.
        teacher_guidance_scale: of classifier-free guidance in the teacher's velocity; all but 1 double its passes.

    Example:
        >>> flow = lambda z, r, t: z
        >>> terms = SelfCorrectedFlow()(
        ...     flow, torch.randn(4, 2), teacher=flow, target=flow, discriminator=lambda z, t: z.sum(1)
        ... )
        >>> sorted(terms.metrics)
        ['adversarial', 'alignment', 'backward', 'consistency']
    """

    needs_interval = False
    sampler = EulerSampler()
    sampling_guidance = ClassifierFreeGuidance()

    def __init__(
        self,
        *,
        consistency: VelocityConsistency | None = None,
        times: TimeSampler | None = None,
        backward: LossTerm = LossTerm(),
        alignment: LossTerm = LossTerm(),
        adversarial: LossTerm = LossTerm(),
        r1: float = 1.0,
        discriminator_times: TimeSampler | None = None,
        teacher_guidance_scale: float = 1.0,
    ) -> None:
        self.consistency = consistency or VelocityConsistency()
        self.times = times or UniformTimes(flow_matching_ratio=Schedule(1.0))
        self.discriminator_times = discriminator_times
        for name, sampler in (("times", self.times), ("discriminator_times", discriminator_times)):
            if sampler is not None and sampler.has_intervals:
                raise ValueError(f"SelfCorrectedFlow has no r < t samples: set flow_matching_ratio of {name} to 1")
        if r1 < 0:
            raise ValueError(f"SelfCorrectedFlow: r1 must not be negative, got {r1}")
        self.backward, self.alignment, self.adversarial = backward, alignment, adversarial
        self.r1 = r1
        self.teacher_guidance_scale = teacher_guidance_scale

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        teacher: Callable[..., Tensor],
        target: Callable[..., Tensor],
        discriminator: Callable[..., Tensor],
        progress: float = 0.0,
        step: int = 0,
        null_context: Context = None,
    ) -> SelfCorrectedTerms:
        """Loss and diagnostics of the student.

        Args:
            net: the student, called as ``net(z, r, t, context)``.
            x: ``[B, C, H, W]``, data.
            context: conditioning of the B samples.
            teacher: a frozen flow-matching network.
            target: the student's moving average.
            discriminator: called as ``discriminator(z, t, context)`` -> logits ``[B]``.
            progress: of training, in [0, 1].
            step: optimiser steps taken, which say which terms count.
            null_context: conditioning without a caption; a guided teacher needs it.
        """
        backward, alignment, adversarial = (term(step) for term in (self.backward, self.alignment, self.adversarial))
        x, context, finite = zero_non_finite_inputs(x, context)
        velocity = AverageVelocity(net, context)

        def student(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return with_gradient_of(velocity(z, r, t), lambda: finite)

        t = self.times(len(x), progress, x.device).t
        e = torch.randn_like(x)
        u = ClassifierFreeGuidance()(teacher, context, null_context, len(x), self.teacher_guidance_scale)
        terms = self.consistency(student, AverageVelocity(target, context), u, x, e, t, backward > 0)
        parts = {"consistency": (1.0, terms.forward), "backward": (backward, terms.backward)}
        if alignment or adversarial:
            noise = torch.randn_like(x)
            samples = one_step(student, noise)
            if alignment:
                t = self.times(len(x), progress, x.device).t
                parts["alignment"] = alignment, step_alignment(student, samples, noise, t)
            if adversarial:
                logits = self._noised(discriminator, context, len(x), progress, x.device)(samples).float()
                parts["adversarial"] = adversarial, generator_loss(logits)
        losses = torch.stack([weight * values for weight, values in parts.values() if weight]).sum(0)
        finite = finite & losses.detach().isfinite()
        metrics = {
            name: torch.where(finite, values.detach(), 0).sum() / finite.sum()
            for name, (weight, values) in parts.items()
            if weight
        }
        return SelfCorrectedTerms(torch.where(finite, losses, 0).sum() / finite.sum().clamp(min=1), finite, metrics)

    def discriminator_loss(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        discriminator: Callable[..., Tensor],
        progress: float = 0.0,
    ) -> DiscriminatorTerms:
        """Loss of the discriminator on data and on one-step samples of the student; see ``__call__``."""
        with no_grad_pass():
            fake = one_step(AverageVelocity(net, context), torch.randn_like(x))
        # R1 is a derivative of a derivative, and sums squares: not in bf16
        with torch.autocast(x.device.type, enabled=False):
            noised = self._noised(discriminator, context, len(x), progress, x.device)
            return discriminator_loss(noised, x, fake, self.r1)

    def _noised(
        self, discriminator: Callable[..., Tensor], context: Context, batch: int, progress: float, device: Any
    ) -> Callable[[Tensor], Tensor]:
        """The discriminator's logits of samples with this conditioning, noised where it is to see noise."""
        t = torch.zeros(batch, device=device)
        if self.discriminator_times is not None:
            t = self.discriminator_times(batch, progress, device).t

        def logits(x: Tensor) -> Tensor:
            z = x if self.discriminator_times is None else interpolate(x, torch.randn_like(x), t)
            return call_with_context(discriminator, (z, t), context)

        return logits
