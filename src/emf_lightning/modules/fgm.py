"""Distillation into a generator of one or a few steps by flow generator matching, without images."""

from __future__ import annotations

import copy

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.flow_generator_matching import (
    AlphaMatching,
    MatchingLoss,
    TimeWeight,
    generator_matching,
)
from emf_lightning.flow.objectives.flow_matching import flow_matching
from emf_lightning.flow.path import Velocity, interpolate
from emf_lightning.flow.sampling import renoised, sample_renoised
from emf_lightning.flow.times import LogitNormalTimes, Schedule, TimeSampler
from emf_lightning.modules.alternating import CriticModule
from emf_lightning.modules.base import VALIDATION_TIMES
from emf_lightning.networks.base import FlowMapNetwork


class FGM(CriticModule):
    """Trains a generator so that its samples' flow is the teacher's (FGM, arXiv 2410.19310); it never sees an image.

    Three networks start as ``net``: the generator, the frozen teacher, and the critic, which learns the velocity of the
    generator's samples by flow matching. Of a batch only the captions and the latents' shape are used.

    Args:
        net: a flow-matching model; see ``FlowMapModule`` for ``guidance`` and ``initial``, ``CriticModule`` for the
            optimisers, schedulers, ``critic_updates``, ``gradient_clip_val``, ``micro_batches``, ``teacher_guidance``.
        loss: of the generator's and the teacher's velocities.
        weight: of times in the generator's loss.
        times: law of t for generator and critic; its share of r < t rows must be 0.
        steps: the most jumps that the generator is trained for; batches take 1, 2, ... up to this in turn.
        generator_time: t*, at which the generator reads its noise, in (0, 1]: it gets t* e. At 1 a teacher that knows
            nothing but the caption starts by drawing the mean of all pictures.
    """

    critic: FlowMapNetwork

    def __init__(
        self,
        net: FlowMapNetwork,
        loss: MatchingLoss | None = None,
        weight: TimeWeight | None = None,
        times: TimeSampler | None = None,
        steps: int = 1,
        generator_time: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        critic_optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        critic_updates: int = 1,
        gradient_clip_val: float | None = 1.0,
        micro_batches: int = 1,
        teacher_guidance: float = 1.0,
        guidance: float = 1.0,
        initial: str | None = None,
    ) -> None:
        super().__init__(
            net,
            optimizer,
            critic_optimizer,
            scheduler,
            critic_scheduler,
            critic_updates,
            gradient_clip_val,
            micro_batches,
            teacher_guidance,
            guidance,
            initial,
        )
        self.loss = loss or AlphaMatching()
        self.weight = weight or TimeWeight()
        self.times = times or LogitNormalTimes(Schedule(0.0), Schedule(1.0), interval_share=Schedule(0.0))
        if self.times.interval_share(0) or self.times.interval_share(1):
            raise ValueError("FGM compares velocities: set model.init_args.times.init_args.interval_share to 0")
        if steps < 1:
            raise ValueError(f"FGM: steps must be at least 1, got {steps}")
        if not 0 < generator_time <= 1:
            raise ValueError(f"FGM: generator_time must lie in (0, 1], got {generator_time}")
        self.steps = steps
        self.generator_time = generator_time
        self.critic = copy.deepcopy(self.net)
        self.save_hyperparameters(logger=False)

    def objective(self, batch: CaptionImageBatch) -> Tensor:
        """The generator's loss: signed; what is logged as ``train/velocity_gap`` goes to 0."""
        x = self._generate(batch)
        t = self.times(len(batch), self.progress, x.device).t
        critic = self.velocity(batch.text, self.critic)
        terms = generator_matching(
            self.teacher_velocity(batch), critic, x, torch.randn_like(x), t, self.loss, self.weight
        )
        self.last_finite = terms.finite
        rows, finite = len(batch), terms.finite
        self.log("train/loss", terms.loss.detach(), batch_size=rows)
        self.log("train/velocity_gap", torch.where(finite, terms.gap, 0).sum() / finite.sum(), batch_size=rows)
        self.log("train/cosine", terms.cosine.nanmean(), batch_size=rows)
        self.log("train/sample_std", x.detach().std(0).mean(), batch_size=rows)
        self.log("train/nan_rows", (~finite).sum().float(), batch_size=rows, reduce_fx="sum")
        return terms.loss

    def critic_objective(self, batch: CaptionImageBatch) -> Tensor:
        """The flow-matching error of the critic on what the generator draws now."""
        with torch.no_grad():
            x = self._generate(batch)
        torch.clear_autocast_cache()
        times = self.times(len(batch), self.progress, x.device)
        e = torch.randn_like(x)
        critic = self.velocity(batch.text, self.critic)
        terms = flow_matching(critic, interpolate(x, e, times.t), e - x, times, self.weighting)
        self.log("train/critic_mse", terms.squared_error.mean(), batch_size=len(batch))
        return terms.loss / x[0].numel()

    def _generate(self, batch: CaptionImageBatch) -> Tensor:
        steps = 1 + self.trainer.global_step % self.steps
        e = torch.randn_like(batch.latents)
        return renoised(self.velocity(batch.text), e, steps, lambda k: torch.randn_like(e), self.generator_time)

    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Jumps to the data, with fresh noise in between."""
        return sample_renoised(u, noise, steps, self.generator_time)

    def _log_error(self, batch: CaptionImageBatch, batch_idx: int, stage: str) -> None:
        """Logs |u - v|^2 at fixed times on samples of the batch's captions, with noise fixed by the batch's index."""
        generator = torch.Generator().manual_seed(batch_idx)
        e, fresh = (torch.randn(batch.latents.shape, generator=generator).to(batch.latents) for _ in range(2))
        x = self.draw(self.velocity(batch.text), e, 1)
        teacher, critic = self.teacher_velocity(batch), self.velocity(batch.text, self.critic)
        for time in VALIDATION_TIMES:
            t = torch.full((len(batch),), time, device=x.device)
            z = interpolate(x, fresh, t)
            gap = (teacher(z, t, t).float() - critic(z, t, t).float()).square().mean()
            self.log(f"{stage}/velocity_gap_at_{time}", gap, batch_size=len(batch), sync_dist=True)
