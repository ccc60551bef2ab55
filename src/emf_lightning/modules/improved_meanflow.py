"""Adaptation by Improved MeanFlow, with guidance as a condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.derivative.derivative import Derivative
from emf_lightning.flow.objectives.improved_meanflow import (
    Guidance,
    GuidanceLaw,
    ImprovedMeanFlowObjective,
    guided_velocity,
)
from emf_lightning.flow.path import Velocity, interpolate, over
from emf_lightning.flow.sampling import sample_flow_map
from emf_lightning.flow.times import LogitNormalTimes, Schedule, TimeSampler
from emf_lightning.flow.weighting import AdaptiveWeighting, Weighting
from emf_lightning.modules.base import CaptionedVelocity, FlowMapModule
from emf_lightning.modules.frozen import FrozenNetwork
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.text.base import TextFeatures


@dataclass(frozen=True)
class CaptionedHeads(CaptionedVelocity):
    """(u, v) of a network, beside each other, bound to the rows' captions and conditions."""

    def __call__(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """``[B, 2 C, H, W]``: u(z, r, t) before v(z, r, t)."""
        return self.heads(z, r, t)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """v(z, t, t), like ``z`` and in its precision."""
        return self.heads(z, t, t)[:, z.shape[1] :].to(z.dtype)


class ImprovedMeanFlow(FlowMapModule):
    """Trains u(z, r, t | omega, interval) to be the average guided velocity, and v beside it (arXiv 2512.02012).

    Guidance is a condition of the network, drawn while training and set at sampling, so one model draws with any scale
    at one evaluation a step. Departures from the paper's release: u is told t as well as t - r, conditions are added to
    the time embedding rather than tokens, and rows without a caption take their tangent without it, too.

    Args:
        net: a network built with ``improved``; see ``FlowMapModule`` for it, ``optimizer``, ``scheduler``,
            ``caption_dropout`` and ``initial``.
        objective: its derivative and bound.
        times: law of (r, t).
        weighting: from summed squared errors to losses, of u and of v.
        law: of guidance while training.
        velocity: where the target comes from: ``conditional`` is e - x, guided by the network's own v, which is the
            tangent too; ``teacher`` is the guided velocity of the network as it starts, frozen, in both.
        guidance: omega at sampling, at least 1.
        guidance_interval: the (start, end) of t in which it acts.
    """

    def __init__(
        self,
        net: FlowMapNetwork,
        objective: ImprovedMeanFlowObjective | None = None,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        law: GuidanceLaw | None = None,
        velocity: Literal["conditional", "teacher"] = "conditional",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        guidance: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        initial: str | None = None,
        gather_once: bool = False,
    ) -> None:
        weighting = weighting or AdaptiveWeighting(offset=0.01)
        super().__init__(net, weighting, optimizer, scheduler, caption_dropout, guidance, initial, gather_once)
        if not net.takes_guidance:
            raise ValueError(
                "ImprovedMeanFlow: the network takes no guidance and gives no v; set net.guidance_conditioning to true"
            )
        if velocity not in ("conditional", "teacher"):
            raise ValueError(f"ImprovedMeanFlow: velocity must be conditional or teacher, got {velocity!r}")
        self.interval_objective = objective or ImprovedMeanFlowObjective()
        self.times = times or LogitNormalTimes(interval_share=Schedule(0.5))
        self.law = law or GuidanceLaw()
        self.guidance_interval = guidance_interval
        self.teacher = FrozenNetwork(self.net) if velocity == "teacher" else None
        self.save_hyperparameters(logger=False)

    @property
    def derivative(self) -> Derivative | None:
        """That of the objective."""
        return self.interval_objective.derivative

    def objective(self, batch: CaptionImageBatch) -> Tensor:
        """The weighted errors of u and v."""
        x = batch.latents
        text, dropped = self.drop_captions(batch)
        times = self.times(len(batch), self.progress, x.device)
        guidance = self.law(times)
        e = torch.randn_like(x)
        z = interpolate(x, e, times.t)
        v_g, v_c = self._velocities(e - x, z, times.t, guidance.at(times.t), text, batch.null, dropped)
        heads = CaptionedHeads(self.net, text, guidance.conditions)
        terms = self.interval_objective(heads, z, v_g, v_c, times, self.weighting)
        self.log_terms(terms)
        return terms.loss

    @torch.no_grad()
    def _velocities(
        self, v: Tensor, z: Tensor, t: Tensor, w: Tensor, text: TextFeatures, null: TextFeatures, dropped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The target v_g and the tangent, both like ``v``; rows with ``dropped`` are not guided."""
        null = null.expand(len(text))
        if self.teacher is None:
            v_c = CaptionedHeads(self.net, text, Guidance.everywhere(w).conditions).velocity(z, t)
            v_u = CaptionedHeads(self.net, null).velocity(z, t)
            v_g = torch.where(over(dropped, v), v, guided_velocity(v, v_c, v_u, w))
        else:
            teacher = self.teacher.on(v.device)
            v_u = CaptionedVelocity(teacher, null)(z, t, t).to(v.dtype)
            v_g = v_c = v_u + over(w, v) * (CaptionedVelocity(teacher, text)(z, t, t).to(v.dtype) - v_u)
        torch.clear_autocast_cache()  # what was cast without a graph must not serve the pass that needs one
        return v_g, v_c

    def draw(self, u: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Jumps with the average velocity."""
        return sample_flow_map(u, noise, steps)

    @torch.no_grad()
    def sample(
        self, text: TextFeatures, null: TextFeatures, noise: Tensor, steps: int, guidance: float | None = None
    ) -> Tensor:
        """Latents ``[B, C, H, W]`` of B captions, with guidance as a condition; see ``FlowMapModule.sample``."""
        omega = torch.full((len(text),), self.guidance if guidance is None else guidance, device=noise.device)
        if (omega < 1).any():
            raise ValueError(f"guidance is omega here, which is at least 1; got {omega[0]:g}")
        start, end = (torch.full_like(omega, time) for time in self.guidance_interval)
        told = Guidance(omega, start, end)
        return self.draw(CaptionedVelocity(self.net, text, told.conditions), noise, steps)

    def nfe(self, steps: int, guidance: float | None = None) -> int:
        """Network evaluations per image: one a step with any guidance."""
        return steps
