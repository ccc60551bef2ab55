"""Distillation into a generator of one or a few steps by flow generator matching, without images."""

from __future__ import annotations

import torch
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching
from emf_lightning.flow.path import interpolate
from emf_lightning.modules.alternating import AlternatingModule, Alternation
from emf_lightning.modules.flow_map import VALIDATION_TIMES
from emf_lightning.modules.optimization import Optimization
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.frozen import copied


class FGM(AlternatingModule):
    """Trains a generator so that its samples' flow is the teacher's (FGM, arXiv 2410.19310); it never sees an image.

    Three networks start as ``net``: the generator, the frozen teacher, and the online flow (fake score), which learns
    the velocity of the generator's samples by flow matching. Only the captions and the latents' shape of a batch are
    read.

    Args:
        net: a flow-matching model.
        objective: losses of both networks, the times, and the number of jumps.
        optimization: of the generator.
        online_optimization: of the online flow; by default as the generator's.
        alternation: how the two take turns.
        guidance_scale: see ``FlowMapModule``.
        init_from: see ``FlowMapModule``.

    Example:
        >>> from emf_lightning.networks.sana import SanaArchitecture
        >>> size = SanaArchitecture(1, 2, 8, 2, 8, patch_size=12)
        >>> net = SanaFlowMap(size)
        >>> FGM(net, FlowGeneratorMatching(steps=4)).objective.sampler
        MultistepSampler(start=1.0)
    """

    AUXILIARY = "online_flow"
    needs_images = False

    def __init__(
        self,
        net: FlowMapNetwork,
        objective: FlowGeneratorMatching | None = None,
        *,
        optimization: Optimization = Optimization(),
        online_optimization: Optimization | None = None,
        alternation: Alternation = Alternation(),
        guidance_scale: float = 1.0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            net,
            objective or FlowGeneratorMatching(),
            optimization=optimization,
            auxiliary_optimization=online_optimization,
            alternation=alternation,
            guidance_scale=guidance_scale,
            init_from=init_from,
        )
        self.online_flow = copied(self.net)

    def compute_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The generator's loss: signed; ``train/velocity_gap`` goes to 0."""
        terms = self.objective(
            self.net,
            batch.latents,
            batch.text.conditioning,
            teacher=self.teacher,
            online_flow=self.online_flow,
            null_context=batch.null.conditioning,
            progress=self.progress_of_batch,
            step=self.trainer.global_step,
        )
        self.log_metrics({"loss": terms.loss.detach(), **terms.metrics}, terms.finite)
        loss: Tensor = terms.loss
        return loss

    def compute_auxiliary_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The flow-matching error of the online flow on new samples of the generator."""
        terms = self.objective.online_flow_loss(
            self.net,
            batch.latents,
            batch.text.conditioning,
            online_flow=self.online_flow,
            progress=self.progress_of_batch,
            step=self.trainer.global_step,
        )
        self.log("train/online_flow_mse", terms.squared_error.mean(), batch_size=len(batch))
        loss: Tensor = terms.loss / batch.latents[0].numel()
        return loss

    def _log_error(self, batch: CaptionImageBatch, batch_idx: int, stage: str) -> None:
        """Logs |u - v|^2 at fixed times on samples of the batch's captions, with noise fixed by rank and batch."""
        generator = torch.Generator().manual_seed(batch_idx + (self.global_rank << 20))
        e, fresh = (torch.randn(batch.latents.shape, generator=generator).to(batch.latents) for _ in range(2))
        x = self.objective.sampler(self.average_velocity(batch.text), e, 1)
        context, null = batch.text.conditioning, batch.null.conditioning
        teacher = self.objective.teacher_velocity(self.teacher, context, null, len(batch))
        online_flow = self.average_velocity(batch.text, self.online_flow)
        for time in VALIDATION_TIMES:
            t = torch.full((len(batch),), time, device=x.device)
            z = interpolate(x, fresh, t)
            gap = (teacher(z, t, t).float() - online_flow(z, t, t).float()).square().mean()
            self.log(f"{stage}/velocity_gap_at_{time}", gap, batch_size=len(batch), sync_dist=True)
