"""Adaptation by MeanFlow and its relatives."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.derivative.derivative import Derivative, Fused
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import Objective
from emf_lightning.flow.objectives.meanflow import MeanFlowObjective
from emf_lightning.flow.path import Velocity, interpolate
from emf_lightning.flow.sampling import sample_flow_map
from emf_lightning.flow.times import LogitNormalTimes, TimeSampler
from emf_lightning.flow.weighting import AdaptiveWeighting, Weighting
from emf_lightning.modules.base import FlowMapModule
from emf_lightning.modules.frozen import FrozenNetwork
from emf_lightning.networks.base import FlowMapNetwork


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
        nan_patience: consecutive batches with more than half of their rows not finite after which training stops. Rows
            that are not finite are left out of the loss, so a single such batch does no harm.
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
        nan_patience: int = 10,
        gather_once: bool = False,
    ) -> None:
        super().__init__(
            net, weighting or AdaptiveWeighting(), optimizer, scheduler, caption_dropout, guidance, initial, gather_once
        )
        self.interval_objective = objective or MeanFlowObjective()
        if net.gradient_checkpointing and isinstance(self.derivative, Fused):
            raise ValueError(
                "MeanFlow: the Fused derivative does not go together with gradient checkpointing (torch counts the "
                "recomputed tensors differently): take ForwardMode, or set net.gradient_checkpointing to false"
            )
        self.times = times or LogitNormalTimes()
        if velocity not in ("conditional", "own", "teacher"):
            raise ValueError(f"MeanFlow: velocity must be conditional, own or teacher, got {velocity!r}")
        self.velocity_source = velocity
        self.target_guidance = target_guidance
        if nan_patience < 1:
            raise ValueError(f"MeanFlow: nan_patience must be at least 1, got {nan_patience}")
        self.nan_patience = nan_patience
        self.teacher = FrozenNetwork(self.net) if velocity == "teacher" else None
        self.save_hyperparameters(logger=False)

    @property
    def derivative(self) -> Derivative | None:
        """That of the objective."""
        return self.interval_objective.derivative

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
        self.log_terms(terms)
        return terms.loss

    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Jumps with the average velocity."""
        return sample_flow_map(u, noise, steps)
