"""The gap between the network's velocity and its teacher's, and the variance of one-step samples, during training."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.flow.objectives.base import Objective
from emf_lightning.flow.path import interpolate
from emf_lightning.modules.flow_map import VALIDATION_TIMES, FlowMapModule
from emf_lightning.modules.scflow import SCFlow
from emf_lightning.text.base import TextFeatures


class DistillationMonitor(Callback):
    """Logs the gap of u(z, t, t) to the teacher's velocity, and the variance of one-step samples.

    The gap is |u(z, t, t) - v| / |v| over the first samples of a training batch, at each of ``VALIDATION_TIMES``, and
    the mean of these; v is the velocity of the frozen teacher at the same points, guided where the objective guides it.
    Objectives without a teacher, and generators, which learn no velocity at r = t, have no gap.

    The variance is that of one-step samples of the batch's captions over that of its latents, a mean over dimensions:
    1 for exact samples, below 1 for blurred or collapsed ones.

    Both are of the averaged weights, where there are some. Training is the same with and without this callback.

    Args:
        every_n_steps: optimiser steps between two measurements.
        samples: of a batch, on each rank.

    Raises:
        ValueError: for numbers that are too small.
    """

    def __init__(self, every_n_steps: int = 50, samples: int = 32) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("samples", samples, 2)):
            if value < least:
                raise ValueError(f"DistillationMonitor: {name} must be at least {least}, got {value}")
        self.every_n_steps = every_n_steps
        self.samples = samples
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if not stepped or self._step % self.every_n_steps or not isinstance(pl_module, FlowMapModule):
            return
        x, text = batch.latents[: self.samples], batch.text[: self.samples]
        with sampling_context(trainer, pl_module):
            values = self._gaps(pl_module, x, text, batch.null)
            samples = pl_module.sample_latents(text, batch.null, torch.randn_like(x), 1)
            # NaN for captions without images, whose latents are all the same
            values["one_step_variance"] = samples.float().var(0).mean() / x.float().var(0).mean()
        means = trainer.strategy.reduce(torch.stack([*values.values()]), reduce_op="mean")
        assert isinstance(means, Tensor)
        named = zip(values, means.tolist(), strict=True)
        points = {f"train/{name}": value for name, value in named if math.isfinite(value)}
        for logger in trainer.loggers if points else ():  # not by `log`, whose last value later steps repeat
            logger.log_metrics(points, self._step)

    def _gaps(self, module: FlowMapModule, x: Tensor, text: TextFeatures, null: TextFeatures) -> dict[str, Tensor]:
        u, gaps = module.average_velocity(text), dict[str, Tensor]()
        for time in VALIDATION_TIMES:
            e, t = torch.randn_like(x), torch.full((len(x),), time, device=x.device)
            z = interpolate(x, e, t)
            v = _teachers_velocity(module, e - x, z, t, text, null)
            if v is None:
                return {}
            gaps[f"teacher_gap_at_{time}"] = (u(z, t, t).float() - v).norm() / v.norm()
        return {"teacher_gap": torch.stack([*gaps.values()]).mean(), **gaps}


def _teachers_velocity(
    module: FlowMapModule, v: Tensor, z: Tensor, t: Tensor, text: TextFeatures, null: TextFeatures
) -> Tensor | None:
    """The frozen teacher's velocity as the objective's target has it, fp32; None where there is no teacher."""
    objective = getattr(module.objective, "regression", module.objective)
    if isinstance(objective, Objective) and objective.velocity.needs_teacher:
        net, contexts = module.net, (text.conditioning, null.conditioning)
        return objective.target_velocity(net, v, z, t, *contexts).float()
    if isinstance(module, SCFlow):
        scale = module.objective.teacher_guidance_scale
        u = ClassifierFreeGuidance()(module.teacher, text.conditioning, null.conditioning, len(z), scale)
        return u(z, t, t).float()
    return None
