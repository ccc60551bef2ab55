"""Distillation into a velocity for one step and for few: consistency, alignment of steps, and a discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.adversarial import Judge, drawers_loss, judges_loss
from emf_lightning.flow.objectives.self_corrected import ConsistencyObjective, one_step, step_alignment
from emf_lightning.flow.path import Velocity, interpolate
from emf_lightning.flow.sampling import sample_euler
from emf_lightning.flow.times import Schedule, TimeSampler, UniformTimes
from emf_lightning.modules.alternating import CriticModule
from emf_lightning.modules.frozen import MovingTarget
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import Discriminator, DiscriminatorCallable
from emf_lightning.text.base import TextFeatures

TARGET = "target"
"""Where a checkpoint keeps the consistency target's weights."""


@dataclass(frozen=True)
class Term:
    """A term of the loss: its weight, and the optimiser steps ``after`` which it begins to count."""

    weight: float = 0.1
    after: int = 0

    def __call__(self, step: int) -> float:
        """The weight at an optimiser step."""
        return self.weight if step >= self.after else 0.0


class SCFlow(CriticModule):
    """Trains u(z, t, t) to point at the same data along a teacher's paths (SCFlow, arXiv 2412.16906).

    The loss is consistency towards the data, plus three terms: consistency towards the noise, the alignment of one step
    with several, and a discriminator's opinion of what one step draws. The teacher is ``net`` as it starts.

    Args:
        net: a flow-matching model; see ``FlowMapModule`` for ``guidance`` and ``initial``, ``CriticModule`` for the
            optimisers, schedulers, ``critic_updates``, ``gradient_clip_val``, ``micro_batches``, ``teacher_guidance``.
        discriminator: called with ``net``, makes the critic; it is not trained while its term has no weight.
        objective: both consistencies.
        times: law of t; its share of r < t rows must be 0.
        backward: weight of consistency towards the noise.
        alignment: weight of the agreement of one step with several.
        adversarial: weight of the discriminator's opinion.
        r1: gamma of the discriminator's penalty; 0 is none.
        judged_times: law of the t up to which what the discriminator sees is noised; None shows it the data as they
            are.
        target_decay: of the moving average that consistency has as its target.
    """

    critic: Discriminator

    def __init__(
        self,
        net: FlowMapNetwork,
        discriminator: DiscriminatorCallable,
        objective: ConsistencyObjective | None = None,
        times: TimeSampler | None = None,
        backward: Term = Term(),
        alignment: Term = Term(),
        adversarial: Term = Term(),
        r1: float = 1.0,
        judged_times: TimeSampler | None = None,
        target_decay: float = 0.9,
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
        self.critic = discriminator(self.net)
        self.consistency = objective or ConsistencyObjective()
        self.times = times or UniformTimes(interval_share=Schedule(0.0))
        self.judged_times = judged_times
        for name, law in (("times", self.times), ("judged_times", judged_times)):
            if law is not None and (law.interval_share(0) or law.interval_share(1)):
                raise ValueError(f"SCFlow has no r < t rows: set model.init_args.{name}.init_args.interval_share to 0")
        if r1 < 0:
            raise ValueError(f"SCFlow: r1 must not be negative, got {r1}")
        self.backward_term = backward
        self.alignment = alignment
        self.adversarial = adversarial
        self.r1 = r1
        self.target = MovingTarget(self.net, target_decay)
        self.save_hyperparameters(logger=False)

    @property
    def critic_turns(self) -> int:
        """None before the discriminator's opinion counts."""
        return self.critic_updates if self.adversarial(self.trainer.global_step) else 0

    def objective(self, batch: CaptionImageBatch) -> Tensor:
        """The weighted sum of consistency and the terms whose time has come."""
        step, x, rows = self.trainer.global_step, batch.latents, len(batch)
        backward, alignment, adversarial = (
            term(step) for term in (self.backward_term, self.alignment, self.adversarial)
        )
        student, target = self.velocity(batch.text), self.velocity(batch.text, self.target.on(x.device))
        t = self.times(rows, self.progress, x.device).t
        e, teacher = torch.randn_like(x), self.teacher_velocity(batch)
        terms = self.consistency(student, target, teacher, x, e, t, backward > 0)
        parts = {"consistency": (1.0, terms.forward), "backward": (backward, terms.backward)}
        if alignment or adversarial:
            noise = torch.randn_like(x)
            drawn = one_step(student, noise)
            if alignment:
                t = self.times(rows, self.progress, x.device).t
                parts["alignment"] = alignment, step_alignment(student, drawn, noise, t)
            if adversarial:
                logits = self._judge(batch.text, rows)(drawn).float()
                parts["adversarial"] = adversarial, drawers_loss(logits)
        losses = torch.stack([weight * rows for weight, rows in parts.values() if weight]).sum(0)
        finite = self.last_finite = losses.detach().isfinite()
        for name, (weight, values) in parts.items():
            if weight:
                mean = torch.where(finite, values.detach(), 0).sum() / finite.sum()
                self.log(f"train/{name}", mean, batch_size=rows)
        loss = torch.where(finite, losses, 0).sum() / finite.sum().clamp(min=1)
        self.log("train/loss", loss.detach(), batch_size=rows)
        self.log("train/nan_rows", (~finite).sum().float(), batch_size=rows, reduce_fx="sum")
        return loss

    def critic_objective(self, batch: CaptionImageBatch) -> Tensor:
        """The discriminator's loss on the batch's latents and on what one step draws for its captions."""
        with torch.no_grad():
            drawn = one_step(self.velocity(batch.text), torch.randn_like(batch.latents))
        torch.clear_autocast_cache()  # weights cast without a graph must not serve the pass that needs one
        # the penalty is a derivative of a derivative, and sums squares: not in bf16
        with torch.autocast(self.device.type, enabled=False):
            terms = judges_loss(self._judge(batch.text, len(batch)), batch.latents, drawn, self.r1)
        self.log("train/discriminator_loss", terms.loss.detach(), batch_size=len(batch))
        self.log("train/discriminator_accuracy", terms.accuracy, batch_size=len(batch))
        if self.r1:
            self.log("train/r1", terms.penalty, batch_size=len(batch))
        return terms.loss

    def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)
        self.target.follow(self.net)

    def _judge(self, text: TextFeatures, rows: int) -> Judge:
        """The discriminator's logits of latents with these captions, noised where it is to see them so."""
        device = text.context.device
        t = torch.zeros(rows, device=device)
        if self.judged_times is not None:
            t = self.judged_times(rows, self.progress, device).t

        def judge(x: Tensor) -> Tensor:
            z = x if self.judged_times is None else interpolate(x, torch.randn_like(x), t)
            logits: Tensor = self.critic(z, t, text.context, text.mask)
            return logits

        return judge

    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Euler steps along the velocity."""
        return sample_euler(u, noise, steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[TARGET] = self.target.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if TARGET in checkpoint:
            self.target.load(checkpoint[TARGET])
