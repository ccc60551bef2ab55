"""PixArt's transformer (arXiv 2403.04692) as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from emf_lightning.networks.architecture_checks import (
    require,
    require_patches,
    require_position_width,
    require_positive,
)
from emf_lightning.networks.backbone import BackboneFlowMap
from emf_lightning.networks.two_time.two_time_embedding import TimePlaces


@dataclass(frozen=True)
class PixArtArchitecture:
    """The size of a PixArt, in diffusers' own names; the defaults are PixArt-Sigma's, 611 M parameters.

    Attributes:
        num_layers: blocks.
        num_attention_heads: heads of each block; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        patch_size: latent positions per token, along each side.
    """

    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    patch_size: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
        require_position_width(self, self.num_attention_heads, self.attention_head_dim)


class PixArtFlowMap(BackboneFlowMap):
    """diffusers' ``PixArtTransformer2DModel``, with the features of ``PixArtTextEncoder``.

    Its published weights predict the noise of a variance-preserving schedule: ``prediction: PredictNoise``. They have
    twice the channels: the second half, a variance, is left out. PixArt-alpha at 1024 px also takes the size of the
    picture, which this network does not.

    Args:
        architecture: its size, if it starts from scratch.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.pixart import PixArtArchitecture
        >>> net = PixArtFlowMap(PixArtArchitecture(1, 2, 8), latent_size=8, context_width=16)
        >>> z, t, context, mask = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 16), torch.ones(1, 5).bool()
        >>> net(z, t, t, context, mask).shape
        torch.Size([1, 4, 8, 8])
    """

    context_width_key = "caption_channels"
    places = TimePlaces("adaln_single", conditioning="adaln_single", argument="timestep")

    def __init__(
        self,
        architecture: PixArtArchitecture | None = None,
        *,
        latent_channels: int = 4,
        latent_size: int = 128,
        context_width: int = 4096,
        **options: Any,
    ) -> None:
        from diffusers import PixArtTransformer2DModel

        size = architecture or PixArtArchitecture()
        width = size.num_attention_heads * size.attention_head_dim
        arguments = asdict(size) | {"cross_attention_dim": width, "caption_channels": context_width}
        arguments |= {"in_channels": latent_channels, "out_channels": latent_channels, "sample_size": latent_size}
        shape = latent_channels, latent_size, context_width
        arguments |= {"use_additional_conditions": False}
        super().__init__(PixArtTransformer2DModel, arguments, architecture, *shape, **options)
        require_patches(self, latent_size, self.model.config.patch_size)
        rule = "these weights also take the size of the picture (use_additional_conditions)"
        require(self, not self.model.use_additional_conditions, f"{rule}; take PixArt-Sigma, or PixArt-alpha at 512 px")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The model's output without its variance."""
        output = self.model(
            z,
            encoder_hidden_states=context,
            timestep=self.timestep(t),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return output[:, : z.shape[1]]
