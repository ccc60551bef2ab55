"""Regression joined with distribution matching, as rCM (arXiv 2510.08431) and TwinFlow (arXiv 2512.05150) join them.

Regression on the average velocity covers every image of a prompt, but blurs what one step cannot decide; distribution
matching and a discriminator sharpen the student's own samples, and alone lose variety. Their losses differ in scale by
the number of dimensions and by time: each gradient at the samples is scaled to a multiple of the regression's gradient
at the network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.guidance import ConditionedGuidance, SamplingGuidance
from emf_lightning.flow.objectives.adversarial import DiscriminatorTerms, discriminator_loss, generator_loss
from emf_lightning.flow.objectives.base import (
    FlowMapTerms,
    LossTerm,
    Objective,
    scaled_to,
    with_pull,
    zero_non_finite,
    zero_non_finite_inputs,
)
from emf_lightning.flow.objectives.distribution_matching import DistributionMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.sampling import FlowMapSampler, Sampler, flow_map_rollout
from emf_lightning.flow.target_velocity import TargetVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule, TimeSampler
from emf_lightning.flow.velocity import AverageVelocity, Context, call_with_context, no_grad_pass


@dataclass(frozen=True)
class JointTerms:
    """Loss and diagnostics of one batch.

    Attributes:
        loss: a scalar with a graph, whose value is the regression's.
        regression: terms of the regression.
        finite: ``[B]``, False for samples whose regression error or sample is not finite; their part is left out.
        metrics: scalars to log: each term's gradient norm before scaling, and the matching's diagnostics.
    """

    loss: Tensor
    regression: FlowMapTerms
    finite: Tensor
    metrics: dict[str, Tensor]


class JointObjective:
    """Objective of an average velocity by regression, and of its own samples by distribution matching and a critic.

    The samples are rollouts of the network: jumps over a uniform grid, as ``FlowMapSampler`` makes them.

    Args:
        regression: objective of the average velocity; by default ``MeanFlow``.
        matching: losses of the samples against the teacher; by default DMD's.
        matching_weight: norm of the matching's gradient at the samples over that of the regression's at the network's
            output, and the step from which it counts.
        adversarial_weight: the same for the gradient of the discriminator's logits.
        rollout_steps: jumps of the rollouts; batches take them in turn.
        gradient_jumps: of a rollout's last jumps, how many have a graph.
        discriminator_times: sampler of the t up to which the discriminator's inputs are noised, real and generated
            ones alike; its ``flow_matching_ratio`` must be 1. By default nearly clean latents.
        r1: gamma of the discriminator's penalty; 0 is none.
        real_steps: Euler steps by which the teacher draws the discriminator's real images; None takes the data.

    Raises:
        ValueError: for a regression of no average velocity, and for values out of range.

    Example:
        >>> net = torch.nn.Linear(4, 4)
        >>> student, flow = lambda z, r, t: net(z), lambda z, r, t: z
        >>> terms = JointObjective()(student, torch.randn(8, 4), teacher=flow, online_flow=lambda z, r, t: 2 * z)
        >>> sorted(terms.metrics)
        ['cosine', 'matching_gradient', 'regression_gradient', 'sample_std', 'velocity_gap']
    """

    takes_sampling_context = True

    def __init__(
        self,
        *,
        regression: Objective | None = None,
        matching: DistributionMatching | None = None,
        matching_weight: LossTerm = LossTerm(2.0),
        adversarial_weight: LossTerm = LossTerm(0.0),
        rollout_steps: Sequence[int] = (1,),
        gradient_jumps: int = 1,
        discriminator_times: TimeSampler | None = None,
        r1: float = 0.0,
        real_steps: int | None = None,
    ) -> None:
        self.regression = regression or MeanFlow()
        if not isinstance(self.regression.sampler, FlowMapSampler):
            raise ValueError(
                f"JointObjective: its samples are jumps of an average velocity, which {type(self.regression).__name__} "
                "does not learn; give MeanFlow or another regression of it"
            )
        self.matching = matching or DistributionMatching()
        self.discriminator_times = discriminator_times or LogitNormalTimes(
            mu=Schedule(-2.0), sigma=Schedule(1.0), flow_matching_ratio=Schedule(1.0)
        )
        if self.discriminator_times.has_intervals:
            raise ValueError("JointObjective has no r < t samples there: set discriminator_times' ratio to 1")
        for name, term in (("matching_weight", matching_weight), ("adversarial_weight", adversarial_weight)):
            if term.weight < 0:
                raise ValueError(f"JointObjective: {name} must not be negative, got {term.weight}")
        if not rollout_steps or min(rollout_steps) < 1 or gradient_jumps < 1:
            raise ValueError(
                "JointObjective: rollout_steps and gradient_jumps must be at least 1, "
                f"got {list(rollout_steps)} and {gradient_jumps}"
            )
        if r1 < 0 or (real_steps is not None and real_steps < 1):
            raise ValueError(f"JointObjective: needs r1 >= 0 and real_steps >= 1, got {r1} and {real_steps}")
        self.matching_weight, self.adversarial_weight = matching_weight, adversarial_weight
        self.rollout_steps, self.gradient_jumps = tuple(rollout_steps), gradient_jumps
        self.r1, self.real_steps = r1, real_steps

    # -- what callbacks and the module read off an objective is the regression's ------------------------------------

    @property
    def needs_interval(self) -> bool:
        return self.regression.needs_interval

    @property
    def needs_guidance_conditioning(self) -> bool:
        return self.regression.needs_guidance_conditioning

    @property
    def needs_negative_times(self) -> bool:
        return self.regression.needs_negative_times

    @property
    def takes_derivative(self) -> bool:
        return self.regression.takes_derivative

    @property
    def derivative(self) -> Derivative | None:
        return self.regression.derivative

    @property
    def velocity(self) -> TargetVelocity:
        return self.regression.velocity

    @property
    def sampler(self) -> Sampler:
        return self.regression.sampler

    @property
    def sampling_guidance(self) -> SamplingGuidance:
        return self.regression.sampling_guidance

    # -- losses -------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        teacher: Callable[..., Tensor],
        online_flow: Callable[..., Tensor],
        discriminator: Callable[..., Tensor] | None = None,
        progress: float = 0.0,
        step: int = 0,
        null_context: Context = None,
        sampling_context: Context = None,
    ) -> JointTerms:
        """Loss and diagnostics of the network.

        Args:
            net: called as ``net(z, r, t, context)``.
            x: ``[B, C, H, W]``, data.
            context: conditioning of the B samples.
            teacher: a frozen flow-matching network.
            online_flow: the network that has learned the flow of the samples.
            discriminator: called as ``discriminator(z, t, context)`` -> logits ``[B]``.
            progress: of training, in [0, 1].
            step: optimiser steps taken, which say which terms count and how many jumps this batch's rollouts have.
            null_context: conditioning without a caption; guidance needs it.
            sampling_context: conditioning of the samples; by default ``context``.
        """
        own = {"sampling_context": sampling_context} if self.regression.takes_sampling_context else {}
        terms = self.regression(net, x, context, progress=progress, null_context=null_context, **own)
        if not terms.loss.requires_grad:  # as in validation
            return JointTerms(terms.loss, terms, terms.finite, {})
        assert terms.u is not None
        reference = _norm(torch.autograd.grad(terms.loss, terms.u, retain_graph=True)[0])
        metrics = {"regression_gradient": reference}
        matching, adversarial = self.matching_weight(step), self.adversarial_weight(step)
        if not matching and not adversarial:
            return JointTerms(terms.loss, terms, terms.finite, metrics)
        context = context if sampling_context is None else sampling_context
        x, context, usable = zero_non_finite_inputs(x, context)
        samples = self._rollout(net, x, context, step)
        leaf = samples.detach().requires_grad_()  # each term's graph ends here
        pull = torch.zeros_like(leaf)
        if matching:
            matched = self.matching.matching_loss(
                leaf,
                context,
                teacher=teacher,
                online_flow=online_flow,
                progress=progress,
                null_context=null_context,
            )
            gradient, _ = zero_non_finite(torch.autograd.grad(matched.loss, leaf)[0])
            metrics |= matched.metrics | {"matching_gradient": _norm(gradient)}
            pull += scaled_to(gradient, matching * reference)
        if adversarial:
            if discriminator is None:
                raise ValueError("JointObjective: adversarial_weight counts, so it needs a discriminator")
            logits = self._logits(discriminator, context, leaf, progress)(leaf).float()
            gradient, _ = zero_non_finite(torch.autograd.grad(generator_loss(logits).mean(), leaf)[0])
            metrics |= {"adversarial_gradient": _norm(gradient), "fake_logits": logits.detach().mean()}
            pull += scaled_to(gradient, adversarial * reference)
        finite = usable & samples.detach().isfinite().flatten(1).all(1)
        loss = with_pull(terms.loss, samples, pull, finite)
        counts = finite.clone()
        counts[: len(terms.finite)] &= terms.finite  # TwinFlow's terms are of the batch's first samples alone
        return JointTerms(loss, terms, counts, metrics)

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
        """Flow-matching terms of the online flow on rollouts of the network; see ``__call__``."""
        with no_grad_pass():
            samples = self._rollout(net, x, context, step)
        return self.matching.online_flow_terms(samples, context, online_flow=online_flow, progress=progress)

    def discriminator_loss(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        context: Context = None,
        *,
        teacher: Callable[..., Tensor],
        discriminator: Callable[..., Tensor],
        progress: float = 0.0,
        step: int = 0,
        null_context: Context = None,
    ) -> DiscriminatorTerms:
        """Loss of the discriminator on real latents and on rollouts of the network; see ``__call__``."""
        with no_grad_pass():
            fake = self._rollout(net, x, context, step)
            if self.real_steps is not None:
                u = self.matching.teacher_velocity(teacher, context, null_context, len(x))
                x = flow_map_rollout(lambda z, r, t: u(z, t, t), torch.randn_like(x), self.real_steps, 0)
        # R1 is a derivative of a derivative, and sums squares: not in bf16
        with torch.autocast(x.device.type, enabled=False):
            return discriminator_loss(self._logits(discriminator, context, x, progress), x, fake, self.r1)

    def _rollout(self, net: Callable[..., Tensor], x: Tensor, context: Context, step: int) -> Tensor:
        steps, u = self.rollout_steps[step % len(self.rollout_steps)], AverageVelocity(net, context)
        if isinstance(self.sampling_guidance, ConditionedGuidance):  # the samples of the scale that the teacher has
            scale = self.matching.teacher_guidance_scale
            u = self.sampling_guidance.conditioned(net, context, len(x), scale, x.device)
        return flow_map_rollout(u, torch.randn_like(x), steps, self.gradient_jumps)

    def _logits(
        self, discriminator: Callable[..., Tensor], context: Context, like: Tensor, progress: float
    ) -> Callable[[Tensor], Tensor]:
        """The discriminator's logits of latents noised to one draw of times and noise, the same at each call."""
        t, e = self.discriminator_times(len(like), progress, like.device).t, torch.randn_like(like)
        return lambda x: call_with_context(discriminator, (interpolate(x, e, t), t), context)


def _norm(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum().sqrt()
