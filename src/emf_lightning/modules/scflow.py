"""Distillation into a velocity for one step and for few: consistency, alignment of steps, and a discriminator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.self_corrected import SelfCorrectedFlow
from emf_lightning.modules.alternating import AlternatingModule, Alternation
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.requirements import check_penalty
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import DiscriminatorCallable
from emf_lightning.networks.frozen import EMATarget

_TARGET = "target"
"""Key of a checkpoint under which it keeps the consistency target's weights."""


class SCFlow(AlternatingModule):
    """Trains u(z, t, t) to point at the same data along a teacher's paths (SCFlow, arXiv 2412.16906).

    The teacher is ``net`` as it starts; the consistency target is the moving average of ``net``.

    Args:
        net: a flow-matching model.
        discriminator: called with ``net``; it does not train while its term has no weight.
        objective: losses of both networks.
        target_decay: of the moving average that is the consistency target.
        optimization: of the network.
        discriminator_optimization: of the discriminator; by default as the network's.
        alternation: how the two take turns.
        guidance_scale: see ``FlowMapModule``.
        init_from: see ``FlowMapModule``.

    Example:
        >>> from emf_lightning.networks.discriminator import ConvDiscriminator
        >>> from emf_lightning.networks.sana import SanaArchitecture
        >>> size = SanaArchitecture(1, 2, 8, 2, 8, patch_size=12)
        >>> net = SanaFlowMap(size)
        >>> SCFlow(net, ConvDiscriminator).auxiliary is SCFlow(net, ConvDiscriminator).net
        False
    """

    AUXILIARY = "discriminator"

    def __init__(
        self,
        net: FlowMapNetwork,
        discriminator: DiscriminatorCallable,
        objective: SelfCorrectedFlow | None = None,
        *,
        target_decay: float = 0.9,
        optimization: Optimization = Optimization(),
        discriminator_optimization: Optimization | None = None,
        alternation: Alternation = Alternation(),
        guidance_scale: float = 1.0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            net,
            objective or SelfCorrectedFlow(),
            optimization=optimization,
            auxiliary_optimization=discriminator_optimization,
            alternation=alternation,
            guidance_scale=guidance_scale,
            init_from=init_from,
        )
        self.discriminator = discriminator(self.net)
        check_penalty(self.net, self.discriminator, self.objective.r1)
        self.target = EMATarget(self.net, target_decay)

    @property
    def auxiliary_updates(self) -> int:
        """None before the adversarial loss counts."""
        return super().auxiliary_updates if self.objective.adversarial(self.trainer.global_step) else 0

    def compute_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The weighted sum of consistency and the terms that count at this step."""
        terms = self.objective(
            self.net,
            batch.latents,
            batch.text.conditioning,
            teacher=self.teacher,
            target=self.target,
            discriminator=self.discriminator,
            null_context=batch.null.conditioning,
            progress=self.progress_of_batch,
            step=self.trainer.global_step,
        )
        self.log_metrics({"loss": terms.loss.detach(), **terms.metrics}, terms.finite)
        loss: Tensor = terms.loss
        return loss

    def compute_auxiliary_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The discriminator's loss on the batch's latents and on one-step samples for its captions."""
        terms = self.objective.discriminator_loss(
            self.net,
            batch.latents,
            batch.text.conditioning,
            discriminator=self.discriminator,
            progress=self.progress_of_batch,
        )
        self.log("train/discriminator_loss", terms.loss.detach(), batch_size=len(batch))
        self.log("train/discriminator_accuracy", terms.accuracy, batch_size=len(batch))
        if self.objective.r1:
            self.log("train/r1", terms.r1, batch_size=len(batch))
        loss: Tensor = terms.loss
        return loss

    def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)
        self.target.update(self.net)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_TARGET] = self.target.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if _TARGET in checkpoint:
            self.target.load(checkpoint[_TARGET])
