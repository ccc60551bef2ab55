"""Requirements of an objective on its network."""

from __future__ import annotations

from typing import Any

from emf_lightning.flow.derivative.forward_mode import Fused
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.feature_discriminator import FeatureDiscriminator
from emf_lightning.part_classes import spec_of


def check_penalty(net: FlowMapNetwork, discriminator: Any, r1: float) -> None:
    """Raises a ``ValueError`` for R1 on features of blocks that would be computed again in the backward pass."""
    if r1 > 0 and net.gradient_checkpointing and isinstance(discriminator, FeatureDiscriminator):
        raise ValueError(
            "r1: its second derivative goes through the blocks of FeatureDiscriminator, which gradient checkpointing "
            "computes again with kernels that have none: set r1 to 0, or net.gradient_checkpointing to false"
        )


def check_network(net: FlowMapNetwork, objective: Any) -> None:
    """Raises a ``ValueError`` for a network that lacks what the objective needs, and for an objective whose images no
    pipeline could generate again.
    """
    name, kind = type(objective).__name__, type(net).__name__
    for settings in (objective.sampler, objective.sampling_guidance):
        spec_of(settings)  # a pipeline builds them again
    if objective.needs_interval and not net.takes_interval:
        raise ValueError(
            f"{name} trains u(z, r, t), and u of this {kind} ignores r: give it a second time input (for diffusers' "
            "networks net.init_args.interval: AnchoredInterval), or take an objective with one time, e.g. FlowMatching"
        )
    if getattr(objective, "needs_guidance_conditioning", False) and not net.takes_guidance:
        raise ValueError(f"{name}: the network takes no guidance and gives no v; set net.guidance_conditioning to true")
    if getattr(objective, "needs_negative_times", False) and not net.takes_negative_times:
        raise ValueError(
            f"{name} trains a second flow at negative times, which {kind} does not tell apart from the first: take "
            "SanaFlowMap with net.negative_times set to true"
        )
    if net.gradient_checkpointing and isinstance(getattr(objective, "derivative", None), Fused):
        raise ValueError(
            f"{name}: the Fused derivative does not go together with gradient checkpointing (torch counts the "
            "recomputed tensors differently): take ForwardMode, or set net.gradient_checkpointing to false"
        )


def check_teacher(net: FlowMapNetwork, init_from: str | None) -> None:
    """Raises a ``ValueError`` if a frozen copy of the network as training starts would be no teacher."""
    if net.is_parent or init_from is not None:
        return
    raise ValueError(
        "The teacher is a copy of the network as training starts, and this network does not start as its parent: "
        "net.interval SummedInterval, finetuning.reset_time and finetuning.reset_text_projection change its velocity. "
        "Leave them out, take another velocity or objective, or start from trained weights (init_from)"
    )


def reads_own_null(objective: Any) -> bool:
    """Whether the objective's guidance reads the network itself without a caption."""
    regression = getattr(objective, "regression", objective)
    guidance = getattr(regression, "guidance", None)
    conditioned = getattr(regression, "needs_guidance_conditioning", False)
    guides = conditioned or (isinstance(guidance, TargetGuidance) and guidance.changes_velocity)
    return bool(guides) and not isinstance(getattr(regression, "velocity", None), TeacherVelocity)
