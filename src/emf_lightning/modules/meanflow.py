"""Adaptation by MeanFlow."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.guidance import TargetGuidance, TeacherVelocity
from emf_lightning.flow.meanflow import meanflow
from emf_lightning.flow.path import Velocity, interpolate
from emf_lightning.flow.sampling import sample_flow_map
from emf_lightning.flow.times import LogitNormalTimes, TimeSampler
from emf_lightning.flow.weighting import AdaptiveWeighting, Weighting
from emf_lightning.modules.base import FlowMapModule
from emf_lightning.modules.frozen import FrozenNetwork
from emf_lightning.networks.base import FlowMapNetwork

NAN_ROWS_LIMIT = 0.5
"""Share of non-finite rows in one batch from which training stops: nothing is learned from the rest."""


class MeanFlow(FlowMapModule):
    """Trains u(z, r, t) to be the average velocity (arXiv 2505.13447; for text-to-image arXiv 2604.18168).

    Args:
        net: see ``FlowMapModule``, as ``optimizer``, ``scheduler``, ``caption_dropout``, ``guidance``, ``initial``.
        times: law of (r, t).
        weighting: from summed squared errors to losses; its offset is in units of the sum over all dimensions.
        target_guidance: classifier-free guidance inside the target; sampling then needs none.
        target_bound: the target of r < t rows is cut to +- this: a little above the largest velocity, or None.
        teacher: take v from the network as it starts, frozen, in place of e - x; it has guidance of its own.
    """

    def __init__(
        self,
        net: FlowMapNetwork,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        target_guidance: TargetGuidance | None = None,
        teacher: TeacherVelocity | None = None,
        target_bound: float | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        guidance: float = 1.0,
        initial: str | None = None,
    ) -> None:
        super().__init__(
            net, weighting or AdaptiveWeighting(), optimizer, scheduler, caption_dropout, guidance, initial
        )
        self.times = times or LogitNormalTimes()
        if teacher is not None and target_guidance is not None:
            raise ValueError(
                "MeanFlow: give model.teacher or model.target_guidance; the teacher's velocity is guided itself"
            )
        self.target_guidance = target_guidance
        if target_bound is not None and target_bound <= 0:
            raise ValueError(f"MeanFlow: target_bound must be positive, got {target_bound}")
        self.target_bound = target_bound
        self.teacher = teacher
        self.parent = None if teacher is None else FrozenNetwork(self.net)
        self.save_hyperparameters(logger=False)

    def objective(self, batch: CaptionImageBatch) -> Tensor:
        """The weighted error of u(z, r, t) against v - (t - r) du/dt."""
        x = batch.latents
        text, dropped = self.drop_captions(batch)
        times = self.times(len(batch), self.progress, x.device)
        e = torch.randn_like(x)
        z, v = interpolate(x, e, times.t), e - x
        u = self.velocity(text)
        null = batch.null.expand(len(batch))
        if self.target_guidance is not None:
            v = self.target_guidance(v, z, times.t, conditional=u, unconditional=self.velocity(null), dropped=dropped)
        elif self.teacher is not None and self.parent is not None:
            parent = self.parent.on(x.device)
            v = self.teacher(
                z, times.t, conditional=self.velocity(text, parent), unconditional=self.velocity(null, parent)
            )
        terms = meanflow(u, z, v, times, self.weighting, bound=self.target_bound)
        self._log_terms(terms.squared_error, terms.derivative_norm, terms.finite, times.n_interval)
        return terms.loss

    def _log_terms(self, squared_error: Tensor, derivative_norm: Tensor, finite: Tensor, n: int) -> None:
        bad = int((~finite).sum())
        if bad > NAN_ROWS_LIMIT * len(finite):
            raise ValueError(
                f"{bad} of {len(finite)} rows of the MeanFlow error are not finite at step {self.trainer.global_step}: "
                "lower the learning rate or net.time_scale, or train in fp32; resume from the last checkpoint"
            )
        rows = len(finite)
        self.log("train/nan_rows", float(bad), batch_size=rows, reduce_fx="sum")
        for name, error in (("r_equals_t", squared_error[n:]), ("r_below_t", squared_error[:n])):
            error = error[error.isfinite()]
            if len(error):
                self.log(f"train/mse_{name}", error.mean(), batch_size=rows)
        if n:
            self.log("train/derivative_norm", derivative_norm.nanmedian(), batch_size=rows)

    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Jumps with the average velocity."""
        return sample_flow_map(u, noise, steps)
