"""Distribution matching: a generator's samples are moved to a teacher's distribution, through their velocities.

With x the generator's sample, e fresh noise, z = (1 - t) x + t e and c = e - x, u is the teacher's velocity at z and v
that of the online flow (fake score), whose data are such samples. Two families of gradients are here. That of flow
generator matching (FGM, arXiv 2410.19310) is the gradient of E|v - u|^2: the dependence of v on the generator cannot be
differentiated, but where v is exact, the losses below have that gradient all the same, if the gradient flows through z
into u and v, and through c. That of distribution matching distillation (DMD, arXiv 2311.18828) is the gradient of a
Kullback-Leibler divergence: v - u itself, at x. The parameters of both flows stay fixed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.guidance import guided
from emf_lightning.flow.objectives.base import FlowMapTerms, with_gradient_of
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.times import TimeSampler
from emf_lightning.flow.velocity import AverageVelocity, Context, Velocity, expand_context, no_grad_pass


class MatchingLoss(ABC):
    """Base of the losses whose gradient moves a generator's flow towards the teacher's; values may be negative.

    Attributes:
        differentiates_flows: whether the gradient flows through z into u and v.
    """

    differentiates_flows = True

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


class DMD(MatchingLoss):
    """|sg(g) + x - sg(x)|^2 / 2 with g = (u - v) / mean|c - u|: its gradient with respect to the sample x is g.

    DMD's gradient (arXiv 2311.18828, eq. 7-8) is (x_v - x_u) / mean|x - x_u|, with x_u = z - t u the teacher's
    denoised sample and x_v the online flow's. In velocities x_v - x_u = t (u - v) and x - x_u = -t (c - u): t cancels.

    Args:
        project: whether to take away the part of g along x_v - x, which estimates the online flow's own error
            (PDMD, arXiv 2609.35768): g - <g, c - v> / |c - v|^2 (c - v).

    Example:
        >>> x, e, u, v = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
        >>> torch.autograd.grad(DMD()(u, v, e - x).sum(), x)[0]  # (u - v) / 1, over two dimensions
        tensor([[-0.5000, -0.5000]])
    """

    differentiates_flows = False

    def __init__(self, project: bool = False) -> None:
        self.project = project

    def __call__(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        with torch.no_grad():
            u, v, fixed = u.flatten(1), v.flatten(1), c.detach().flatten(1)
            g = (u - v) / (fixed - u).abs().mean(1, keepdim=True)
            if self.project:
                error = fixed - v
                g = g - (g * error).sum(1, keepdim=True) / error.square().sum(1, keepdim=True) * error
        return (g - (c.flatten(1) - fixed)).square().mean(1) / 2  # c = e - x


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
        sample_std: standard deviation over the batch, mean over dimensions, detached; 0 is a collapse. None for B = 1.
    """

    loss: Tensor
    gap: Tensor
    cosine: Tensor
    finite: Tensor
    sample_std: Tensor | None

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Scalars to log."""
        gap = torch.where(self.finite, self.gap, 0).sum() / self.finite.sum()
        found = {"velocity_gap": gap, "cosine": self.cosine.nanmean()}
        return found if self.sample_std is None else found | {"sample_std": self.sample_std}


class DistributionMatching:
    """Losses of a generator's samples against a teacher, and of the online flow (fake score) that tracks the samples.

    Args:
        loss: of the teacher's and the online flow's velocities: ``DMD``, or FGM's ``AlphaMatching``, ``ExactMatching``.
        weight: of times in the generator's loss.
        times: sampler of t for both networks; its ``flow_matching_ratio`` must be 1.
        teacher_guidance_scale: of classifier-free guidance in the teacher's velocity; all but 1 double its passes.
        teacher_guidance_interval: the (start, end) of t in which that guidance acts.

    Example:
        >>> flow = lambda z, r, t: z
        >>> matching = DistributionMatching(loss=DMD())
        >>> matching.terms(flow, flow, torch.zeros(4, 2), torch.ones(4, 2), torch.full((4,), 0.5)).gap.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        *,
        loss: MatchingLoss | None = None,
        weight: TimeWeight | None = None,
        times: TimeSampler | None = None,
        teacher_guidance_scale: float = 1.0,
        teacher_guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        start, end = teacher_guidance_interval
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"{type(self).__name__}: teacher_guidance_interval must be 0 <= start < end <= 1, got ({start}, {end})"
            )
        self.online_objective = FlowMatching(times=times)
        self.loss = loss or DMD()
        self.weight = weight or TimeWeight()
        self.times = self.online_objective.times
        self.teacher_guidance_scale = teacher_guidance_scale
        self.teacher_guidance_interval = (start, end)

    def matching_loss(
        self,
        x: Tensor,
        context: Context = None,
        *,
        teacher: Callable[..., Tensor],
        online_flow: Callable[..., Tensor],
        progress: float = 0.0,
        null_context: Context = None,
    ) -> MatchingTerms:
        """Loss and diagnostics of samples at random times and noise.

        Args:
            x: ``[B, C, H, W]``, samples; the loss has a gradient with respect to them.
            context: conditioning of the B samples.
            teacher: a frozen flow-matching network.
            online_flow: the network that has learned the flow of the generator's samples.
            progress: of training, in [0, 1].
            null_context: conditioning without a caption; a guided teacher needs it.
        """
        t = self.times(len(x), progress, x.device).t
        u = self.teacher_velocity(teacher, context, null_context, len(x))
        return self.terms(u, AverageVelocity(online_flow, context), x, torch.randn_like(x), t)

    def online_flow_terms(
        self,
        x: Tensor,
        context: Context = None,
        *,
        online_flow: Callable[..., Tensor],
        progress: float = 0.0,
    ) -> FlowMapTerms:
        """Flow-matching terms of the online flow on samples ``x`` without a graph; see ``matching_loss``."""
        return self.online_objective(online_flow, x, context, progress=progress)

    def teacher_velocity(
        self, teacher: Callable[..., Tensor], context: Context, null_context: Context, batch: int
    ) -> Velocity:
        """The teacher's velocity, guided where ``teacher_guidance_scale`` is not 1."""
        conditional, scale = AverageVelocity(teacher, context), self.teacher_guidance_scale
        if scale == 1:
            return conditional
        if null_context is None:
            raise ValueError(f"teacher_guidance_scale {scale:g} needs null_context, the conditioning without a caption")
        null = AverageVelocity(teacher, expand_context(null_context, batch))
        return guided(conditional, null, scale, self.teacher_guidance_interval)

    def terms(self, teacher: Velocity, online_flow: Velocity, x: Tensor, e: Tensor, t: Tensor) -> MatchingTerms:
        """Loss and diagnostics of given samples: the lower layer of ``matching_loss``.

        Args:
            teacher: u, whose parameters require no gradient.
            online_flow: v, likewise.
            x: ``[B, C, H, W]``, samples with a graph.
            e: like ``x``, noise independent of the generator's.
            t: ``[B]``, fp32, in (0, 1).
        """
        x = with_gradient_of(x, lambda: finite)
        z, c = interpolate(x, e, t), e - x
        with nullcontext() if self.loss.differentiates_flows else no_grad_pass():
            u, v = teacher(z, t, t).float(), online_flow(z, t, t).float()
        losses = self.loss(u, v, c.float()) * self.weight(t)
        finite = losses.detach().isfinite()
        with torch.no_grad():
            gap = (u - v).square().flatten(1).mean(1)
            cosine = torch.cosine_similarity(u.flatten(1), v.flatten(1))
        total = torch.where(finite, losses, 0).sum() / finite.sum().clamp(min=1)
        spread = x.detach().std(0).mean() if len(x) > 1 else None
        return MatchingTerms(total, gap, cosine, finite, spread)
