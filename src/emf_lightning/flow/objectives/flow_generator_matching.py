"""Flow generator matching (FGM, arXiv 2410.19310): the flow of a generator's samples becomes a teacher's, without data.

The losses are in ``distribution_matching``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.distribution_matching import (
    AlphaMatching,
    DistributionMatching,
    MatchingLoss,
    MatchingTerms,
    TimeWeight,
)
from emf_lightning.flow.sampling import MultistepSampler, multistep_sample
from emf_lightning.flow.times import TimeSampler
from emf_lightning.flow.velocity import AverageVelocity, Context, no_grad_pass


class FlowGeneratorMatching(DistributionMatching):
    """Objective of a generator of one or a few steps, and of the online flow (fake score) that tracks its samples.

    Args:
        loss: of the teacher's and the online flow's velocities.
        weight: of times in the generator's loss.
        times: sampler of t for both networks; its ``flow_matching_ratio`` must be 1.
        steps: jumps that the generator trains for. Batches take the first 1, 2, ... of them in turn, and the last one
            taken is trained: each at the time and on the states that sampling in ``steps`` steps meets.
        generator_time: t*, at which the generator reads its noise, in (0, 1]: it gets t* e. At 1 a teacher that knows
            only the caption starts by generating the mean of all images.
        teacher_guidance_scale: of classifier-free guidance in the teacher's velocity; all but 1 double its passes.
        teacher_guidance_interval: the (start, end) of t in which that guidance acts.

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
        teacher_guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(
            loss=loss or AlphaMatching(),
            weight=weight,
            times=times,
            teacher_guidance_scale=teacher_guidance_scale,
            teacher_guidance_interval=teacher_guidance_interval,
        )
        if steps < 1:
            raise ValueError(f"FlowGeneratorMatching: steps must be at least 1, got {steps}")
        if not 0 < generator_time <= 1:
            raise ValueError(f"FlowGeneratorMatching: generator_time must lie in (0, 1], got {generator_time}")
        self.steps = steps
        self.sampler = MultistepSampler(generator_time)

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
        return self.matching_loss(
            self._generate(net, x, context, step),
            context,
            teacher=teacher,
            online_flow=online_flow,
            progress=progress,
            null_context=null_context,
        )

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
        return self.online_flow_terms(samples, context, online_flow=online_flow, progress=progress)

    def _generate(self, net: Callable[..., Tensor], x: Tensor, context: Context, step: int) -> Tensor:
        e, u = torch.randn_like(x), AverageVelocity(net, context)
        jumps, start = 1 + step % self.steps, self.sampler.start
        return multistep_sample(u, e, self.steps, lambda k: torch.randn_like(e), start, jumps=jumps)
