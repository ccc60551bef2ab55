"""Flow generator matching (FGM, arXiv 2410.19310): the flow of a generator's samples becomes a teacher's, without data.

With x the generator's sample, e fresh noise, z = (1 - t) x + t e and c = e - x, u is the teacher's velocity at z and v
that of the online flow, whose data are such samples. The dependence of v on the generator cannot be differentiated;
but where v is exact, the losses below have the gradient of E|v - u|^2 all the same. For that the gradient must flow
through z into u and v, and through c; the parameters of both flows stay fixed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.sampling import MultistepSampler, multistep_sample
from emf_lightning.flow.times import TimeSampler
from emf_lightning.flow.velocity import AverageVelocity, Context, Velocity, no_grad_pass


class MatchingLoss(ABC):
    """Base of the losses whose gradient moves a generator's flow towards the teacher's; values may be negative."""

    @abstractmethod
    def __call__(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        """Per-sample losses ``[B]``, means over dimensions.

        Args:
            u: ``[B, C, H, W]``, the teacher's velocity.
            v: like ``u``, the online flow's.
            c: like ``u``, e - x.
        """


class ExactMatching(MatchingLoss):
    """|u - c|^2 - |v - c|^2: the teacher's flow-matching loss on the generator's samples, less the online flow's.

    Equal to the paper's L1 + L2 = |u - v|^2 + 2 <u - v, v - c>, whose gradient is that of E|v - u|^2 exactly.
    """

    def __call__(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return ((u - c).square() - (v - c).square()).flatten(1).mean(1)


class AlphaMatching(MatchingLoss):
    """(1 - a) |u - v|^2 + <u - v, v - c>: half the exact loss at a = 1/2.

    In practice FGM leaves L1 = |u - v|^2 out, which is a = 1; neither term alone has the exact gradient. SiD
    (arXiv 2404.04057), whose loss this is in velocities, takes up to 1.2.

    Args:
        alpha: a.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def __call__(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return ((1 - self.alpha) * (u - v).square() + (u - v) * (v - c)).flatten(1).mean(1)


@dataclass(frozen=True)
class TimeWeight:
    """w(t) = t^noise (1 - t)^data; (2, 0) weighs errors in x rather than in velocities, (2, 1) is SiD-DiT's."""

    noise: float = 0.0
    data: float = 0.0

    def __call__(self, t: Tensor) -> Tensor:
        """Weights of ``t`` ``[B]``."""
        return t**self.noise * (1 - t) ** self.data


@dataclass(frozen=True)
class MatchingTerms:
    """Loss and diagnostics of B samples of a generator.

    Attributes:
        loss: the weighted loss over the finite samples, a scalar with a graph; signed, so no measure of quality.
        gap: ``[B]``, mean over dimensions of (u - v)^2, detached; training moves it to 0.
        cosine: ``[B]``, of u and v over all dimensions, detached.
        finite: ``[B]``, False for samples whose loss is not finite; they are left out.
        sample_std: standard deviation over the batch, mean over dimensions, detached; 0 is a collapse.
    """

    loss: Tensor
    gap: Tensor
    cosine: Tensor
    finite: Tensor
    sample_std: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Scalars to log."""
        return {
            "velocity_gap": torch.where(self.finite, self.gap, 0).sum() / self.finite.sum(),
            "cosine": self.cosine.nanmean(),
            "sample_std": self.sample_std,
        }


class FlowGeneratorMatching:
    """Objective of a generator of one or a few steps, and of the online flow (fake score) that tracks its samples.

    Args:
        loss: of the teacher's and the online flow's velocities.
        weight: of times in the generator's loss.
        times: sampler of t for both networks; its ``flow_matching_ratio`` must be 1.
        steps: the most jumps that the generator trains for; batches take 1, 2, ... up to this in turn.
        generator_time: t*, at which the generator reads its noise, in (0, 1]: it gets t* e. At 1 a teacher that knows
            only the caption starts by generating the mean of all images.
        teacher_guidance_scale: of classifier-free guidance in the teacher's velocity; all but 1 double its passes.

    Example:
        >>> flow = lambda z, r, t: z
        >>> terms = FlowGeneratorMatching()(flow, torch.zeros(4, 2), teacher=flow, online_flow=flow)
        >>> terms.gap.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    needs_interval = False
    sampling_guidance = ClassifierFreeGuidance()

    def __init__(
        self,
        *,
        loss: MatchingLoss | None = None,
        weight: TimeWeight | None = None,
        times: TimeSampler | None = None,
        steps: int = 1,
        generator_time: float = 1.0,
        teacher_guidance_scale: float = 1.0,
    ) -> None:
        self.online_objective = FlowMatching(times=times)
        self.loss = loss or AlphaMatching()
        self.weight = weight or TimeWeight()
        self.times = self.online_objective.times
        if steps < 1:
            raise ValueError(f"FlowGeneratorMatching: steps must be at least 1, got {steps}")
        if not 0 < generator_time <= 1:
            raise ValueError(f"FlowGeneratorMatching: generator_time must lie in (0, 1], got {generator_time}")
        self.steps = steps
        self.sampler = MultistepSampler(generator_time)
        self.teacher_guidance_scale = teacher_guidance_scale

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        teacher: Callable[..., Tensor],
        online_flow: Callable[..., Tensor],
        progress: float = 0.0,
        step: int = 0,
        null_context: Context = None,
    ) -> MatchingTerms:
        """Loss and diagnostics of the generator.

        Args:
            net: the generator, called as ``net(z, r, t, context)``.
            x: ``[B, C, H, W]``; only its shape is read.
            context: conditioning of the B samples.
            teacher: a frozen flow-matching network.
            online_flow: the network that has learned the flow of the generator's samples.
            progress: of training, in [0, 1].
            step: optimiser steps taken, which say how many jumps this batch takes.
            null_context: conditioning without a caption; a guided teacher needs it.
        """
        samples = self._generate(net, x, context, step)
        t = self.times(len(x), progress, x.device).t
        u = self.teacher_velocity(teacher, context, null_context, len(x))
        return self.terms(u, AverageVelocity(online_flow, context), samples, torch.randn_like(samples), t)

    def online_flow_loss(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        online_flow: Callable[..., Tensor],
        progress: float = 0.0,
        step: int = 0,
    ) -> FlowMapTerms:
        """Flow-matching terms of the online flow on samples of the generator; see ``__call__``."""
        with no_grad_pass():
            samples = self._generate(net, x, context, step)
        return self.online_objective(online_flow, samples, context, progress=progress)

    def teacher_velocity(
        self, teacher: Callable[..., Tensor], context: Context, null_context: Context, batch: int
    ) -> Velocity:
        """The teacher's velocity, guided where ``teacher_guidance_scale`` is not 1."""
        return ClassifierFreeGuidance()(teacher, context, null_context, batch, self.teacher_guidance_scale)

    def terms(self, teacher: Velocity, online_flow: Velocity, x: Tensor, e: Tensor, t: Tensor) -> MatchingTerms:
        """Loss and diagnostics of given samples: the lower layer of ``__call__``.

        Args:
            teacher: u, whose parameters require no gradient.
            online_flow: v, likewise.
            x: ``[B, C, H, W]``, samples with the generator's graph.
            e: like ``x``, noise independent of the generator's.
            t: ``[B]``, fp32, in (0, 1).
        """
        z, c = interpolate(x, e, t), e - x
        u, v = teacher(z, t, t).float(), online_flow(z, t, t).float()
        losses = self.loss(u, v, c.float()) * self.weight(t)
        finite = losses.detach().isfinite()
        with torch.no_grad():
            gap = (u - v).square().flatten(1).mean(1)
            cosine = torch.cosine_similarity(u.flatten(1), v.flatten(1))
        total = torch.where(finite, losses, 0).sum() / finite.sum().clamp(min=1)
        return MatchingTerms(total, gap, cosine, finite, x.detach().std(0).mean())

    def _generate(self, net: Callable[..., Tensor], x: Tensor, context: Context, step: int) -> Tensor:
        e, u = torch.randn_like(x), AverageVelocity(net, context)
        return multistep_sample(u, e, 1 + step % self.steps, lambda k: torch.randn_like(e), self.sampler.start)
