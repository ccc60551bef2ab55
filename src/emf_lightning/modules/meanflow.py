"""Adaptation by MeanFlow and its relatives."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.meanflow import MeanFlowObjective
from emf_lightning.flow.objective import FlowMapTerms, Objective
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
        net: see ``FlowMapModule``, as ``optimizer``, ``scheduler``, ``caption_dropout``, ``guidance``, ``initial``,
            ``gather_once``.
        objective: which regression; MeanFlow's own with an exact derivative, where none is named.
        times: law of (r, t).
        weighting: from summed squared errors to losses; its offset is in units of the sum over all dimensions.
        velocity: where v in target and tangent comes from: ``conditional`` is e - x, as EMF's release has it;
            ``own`` is the network's u(z, t, t), as its paper writes it (eq. 9); ``teacher`` is that of the network as
            it starts, frozen: it has averaged the conditional velocity's noise away (arXiv 2512.13006, section 4).
        target_guidance: classifier-free guidance inside the target, by the teacher where the velocity is its own;
            sampling then needs none.
    """

    def __init__(
        self,
        net: FlowMapNetwork,
        objective: Objective | None = None,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        velocity: Literal["conditional", "own", "teacher"] = "conditional",
        target_guidance: TargetGuidance | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        guidance: float = 1.0,
        initial: str | None = None,
        gather_once: bool = False,
    ) -> None:
        super().__init__(
            net, weighting or AdaptiveWeighting(), optimizer, scheduler, caption_dropout, guidance, initial, gather_once
        )
        self.interval_objective = objective or MeanFlowObjective()
        self.times = times or LogitNormalTimes()
        if velocity not in ("conditional", "own", "teacher"):
            raise ValueError(f"MeanFlow: velocity must be conditional, own or teacher, got {velocity!r}")
        self.velocity_source = velocity
        self.target_guidance = target_guidance
        self.teacher = FrozenNetwork(self.net) if velocity == "teacher" else None
        self.save_hyperparameters(logger=False)

    def objective(self, batch: CaptionImageBatch) -> Tensor:
        """The weighted error of u(z, r, t) against the objective's target."""
        x = batch.latents
        text, dropped = self.drop_captions(batch)
        times = self.times(len(batch), self.progress, x.device)
        e = torch.randn_like(x)
        z, v = interpolate(x, e, times.t), e - x
        reference = self.net if self.teacher is None else self.teacher.on(x.device)
        conditional = self.velocity(text, reference)
        with torch.no_grad():
            if self.velocity_source != "conditional":
                v = conditional(z, times.t, times.t).to(v.dtype)
            if self.target_guidance is not None:
                null = self.velocity(batch.null.expand(len(batch)), reference)
                v = self.target_guidance(v, z, times.t, conditional=conditional, unconditional=null, dropped=dropped)
        torch.clear_autocast_cache()  # what was cast without a graph must not serve the pass that needs one
        terms = self.interval_objective(self.velocity(text), z, v, times, self.weighting, self.progress)
        self._log_terms(terms, times.n_interval)
        return terms.loss

    def _log_terms(self, terms: FlowMapTerms, n: int) -> None:
        rows, bad = len(terms.finite), int((~terms.finite).sum())
        if bad > NAN_ROWS_LIMIT * rows:
            raise ValueError(
                f"{bad} of {rows} rows of the MeanFlow error are not finite at step {self.trainer.global_step}: "
                "lower the learning rate or net.time_scale, or train in fp32; resume from the last checkpoint"
            )
        self.log("train/nan_rows", float(bad), batch_size=rows, reduce_fx="sum")
        for name, part in (("r_equals_t", slice(n, None)), ("r_below_t", slice(n))):
            error = terms.squared_error[part][terms.finite[part]]
            if len(error):
                self.log(f"train/mse_{name}", error.mean(), batch_size=rows)
        if len(terms.derivative_norm):
            self.log("train/derivative_norm", terms.derivative_norm.nanmedian(), batch_size=rows)

    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Jumps with the average velocity."""
        return sample_flow_map(u, noise, steps)
