"""Few-step training by regression and distribution matching together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.modules import checkpoint as checkpoints
from emf_lightning.modules.alternating import AlternatingModule, Alternation
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.requirements import check_penalty
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import DiscriminatorCallable
from emf_lightning.networks.feature_discriminator import FeatureDiscriminator
from emf_lightning.networks.frozen import copied


class JointDistillation(AlternatingModule):
    """Trains an average velocity by regression, and its own samples by distribution matching and a discriminator.

    Teacher and online flow start as ``net``, a flow-matching model; the network itself may start further on, from a
    checkpoint ``init_from``. The discriminator, where its term counts, trains with the online flow's optimiser.

    Args:
        net: a flow-matching model with a second time input.
        objective: losses of all networks.
        discriminator: called with ``net``; needed where ``adversarial_weight`` is not 0.
        optimization: of the network.
        auxiliary_optimization: of the online flow and the discriminator; by default as the network's.
        alternation: how the two take turns.
        guidance_scale: see ``FlowMapModule``.
        init_from: see ``FlowMapModule``; of the network alone.

    Raises:
        ValueError: for a missing discriminator, and where no term but the regression counts.

    Example:
        >>> from emf_lightning.networks.sana import SanaArchitecture
        >>> size = SanaArchitecture(1, 2, 8, 2, 8, patch_size=12)
        >>> sorted(JointDistillation(SanaFlowMap(size)).auxiliaries)
        ['online_flow']
    """

    AUXILIARY = "auxiliaries"

    def __init__(
        self,
        net: FlowMapNetwork,
        objective: JointObjective | None = None,
        discriminator: DiscriminatorCallable | None = None,
        *,
        optimization: Optimization = Optimization(),
        auxiliary_optimization: Optimization | None = None,
        alternation: Alternation = Alternation(),
        guidance_scale: float = 1.0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            net,
            objective or JointObjective(),
            optimization=optimization,
            auxiliary_optimization=auxiliary_optimization,
            alternation=alternation,
            guidance_scale=guidance_scale,
            init_from=None,
        )
        joint: JointObjective = self.objective
        matching, adversarial = joint.matching_weight.weight, joint.adversarial_weight.weight
        if adversarial and discriminator is None:
            raise ValueError(
                "JointDistillation: adversarial_weight asks for a discriminator: set model.init_args.discriminator"
            )
        if not matching and not adversarial:
            raise ValueError("JointDistillation: both weights are 0: take FlowMapModule for the regression alone")
        self.auxiliaries = nn.ModuleDict()
        if matching:
            self.auxiliaries["online_flow"] = copied(self.net)
        if adversarial and discriminator is not None:
            critic = self.auxiliaries["discriminator"] = discriminator(self.net)
            check_penalty(self.net, critic, joint.r1)
            if isinstance(critic, FeatureDiscriminator):
                critic.backbone = self.teacher  # one frozen copy serves all
        if isinstance(joint.velocity, TeacherVelocity) and not joint.velocity.given:
            joint.velocity.teacher = self.teacher
        if init_from is not None:
            checkpoints.load_network(self.net, init_from)

    @property
    def auxiliary_updates(self) -> int:
        """None before the first of the two terms counts."""
        step = self.trainer.global_step
        counts = self.objective.matching_weight(step) or self.objective.adversarial_weight(step)
        return super().auxiliary_updates if counts else 0

    def compute_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The regression's loss, with the gradients of all terms."""
        terms = self.objective(
            self.net,
            batch.latents,
            batch.text.conditioning,
            teacher=self.teacher,
            online_flow=self._part("online_flow"),
            discriminator=self._part("discriminator"),
            null_context=batch.null.conditioning,
            progress=self.progress_of_batch,
            step=self.trainer.global_step,
            sampling_context=None if batch.sampling is None else batch.sampling.conditioning,
        )
        self.log_terms(terms.regression)
        self.log("train/loss", terms.loss.detach(), batch_size=len(batch))
        for name, value in terms.metrics.items():
            self.log(f"train/{name}", value, batch_size=len(batch))
        self.last_finite = terms.finite
        loss: Tensor = terms.loss
        return loss

    def compute_auxiliary_loss(self, batch: CaptionImageBatch) -> Tensor:
        """The online flow's error on the network's samples, and the discriminator's loss."""
        text = batch.sampling or batch.text
        now: dict[str, Any] = {"progress": self.progress_of_batch, "step": self.trainer.global_step}
        losses = []
        online_flow, discriminator = self._part("online_flow"), self._part("discriminator")
        if online_flow is not None:
            terms = self.objective.online_flow_loss(
                self.net, batch.latents, text.conditioning, online_flow=online_flow, **now
            )
            self.log("train/online_flow_mse", terms.squared_error.mean(), batch_size=len(batch))
            losses.append(terms.loss / batch.latents[0].numel())
        if discriminator is not None:
            critic = self.objective.discriminator_loss(
                self.net,
                batch.latents,
                (batch.text if self.objective.real_steps is None else text).conditioning,  # the real images' own
                teacher=self.teacher,
                discriminator=discriminator,
                null_context=batch.null.conditioning,
                **now,
            )
            self.log("train/discriminator_accuracy", critic.accuracy, batch_size=len(batch))
            losses.append(critic.loss)
        return sum(losses[1:], losses[0])

    def _part(self, name: str) -> nn.Module | None:
        return dict(self.auxiliaries.items()).get(name)
