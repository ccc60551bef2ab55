"""Pre-training by flow matching."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.flow_matching import flow_matching
from emf_lightning.flow.path import Velocity, interpolate
from emf_lightning.flow.sampling import sample_euler
from emf_lightning.flow.times import LogitNormalTimes, Schedule, TimeSampler
from emf_lightning.flow.weighting import UniformWeighting, Weighting
from emf_lightning.modules.base import FlowMapModule
from emf_lightning.networks.base import FlowMapNetwork


class FlowMatching(FlowMapModule):
    """Trains u(z, t, t) to be the velocity (arXiv 2210.02747): the parent of a few-step model.

    Args:
        net: see ``FlowMapModule``, as ``optimizer``, ``scheduler``, ``caption_dropout``, ``guidance``, ``initial``,
            ``gather_once``.
        times: law of t; its share of r < t rows must be 0.
        weighting: from summed squared errors to losses.
    """

    def __init__(
        self,
        net: FlowMapNetwork,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        guidance: float = 1.0,
        initial: str | None = None,
        gather_once: bool = False,
    ) -> None:
        super().__init__(
            net, weighting or UniformWeighting(), optimizer, scheduler, caption_dropout, guidance, initial, gather_once
        )
        self.times = times or LogitNormalTimes(Schedule(0.0), Schedule(1.0), interval_share=Schedule(0.0))
        if self.times.interval_share(0) or self.times.interval_share(1):
            raise ValueError("FlowMatching has no r < t rows: set model.times.interval_share to 0, or train MeanFlow")
        self.save_hyperparameters(logger=False)

    def objective(self, batch: CaptionImageBatch) -> Tensor:
        """The weighted error of u(z, t, t) against e - x."""
        x = batch.latents
        text, _ = self.drop_captions(batch)
        times = self.times(len(batch), self.progress, x.device)
        e = torch.randn_like(x)
        terms = flow_matching(self.velocity(text), interpolate(x, e, times.t), e - x, times, self.weighting)
        self.last_terms = terms.detached()
        self.log("train/mse_r_equals_t", terms.squared_error.mean(), batch_size=len(batch))
        return terms.loss

    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Euler steps along the velocity."""
        return sample_euler(u, noise, steps)
