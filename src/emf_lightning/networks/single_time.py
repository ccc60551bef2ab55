"""diffusers' backbones with one time input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from emf_lightning.networks.diffusers_flow_map import DiffusersFlowMap
from emf_lightning.networks.prediction import Prediction
from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained


class SingleTimeFlowMap(DiffusersFlowMap):
    """Base of flow maps on a backbone with one time input, t: u(z, r, t) is the same for every r.

    Flow matching, FGM and SCFlow need no more; MeanFlow and its relatives need a network that takes intervals.

    Args:
        kind: diffusers' class.
        size: its arguments for a model from scratch.
        architecture: the settings that ``size`` was made from; None if they are the default ones.
        pretrained: the weights to start from instead, in diffusers' format: a local folder or hub name, or
            ``PretrainedWeights`` for a model inside a pipeline's repository.
        prediction: rule from the backbone's output to u.
        time_scale: factor on t before the backbone's time embedding.
        gradient_checkpointing: keep no activations inside the blocks and compute them again in the backward pass.
        latent_channels: C of the latents.
        latent_size: H = W of the latents.
        context_width: D of the text features.

    Raises:
        ValueError: if pretrained weights cannot be loaded or disagree with the data.
    """

    takes_interval = False

    def __init__(
        self,
        kind: Any,
        size: dict[str, Any],
        architecture: object | None,
        latent_channels: int,
        latent_size: int,
        context_width: int,
        *,
        pretrained: str | PretrainedWeights | None = None,
        prediction: Prediction | None = None,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(architecture, pretrained, prediction, time_scale)
        self.latent_channels, self.latent_size, self.context_width = latent_channels, latent_size, context_width
        if pretrained is None:
            self.model = kind(
                in_channels=latent_channels, out_channels=latent_channels, sample_size=latent_size, **size
            )
            self._record()
        else:
            self.model = load_pretrained(type(self).__name__, kind, pretrained, frozen=False)
            self._check_agreement(PretrainedWeights.of(pretrained), self._recorded())
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()

    @property
    def diffusers_model(self) -> Any:
        return self.model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]
