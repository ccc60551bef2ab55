"""Stable Diffusion 3's transformer (MM-DiT, arXiv 2403.03206) as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from emf_lightning.networks.architecture_checks import (
    require,
    require_patches,
    require_pooled,
    require_position_width,
    require_positive,
)
from emf_lightning.networks.backbone import BackboneFlowMap
from emf_lightning.networks.two_time.two_time_embedding import TimePlaces


@dataclass(frozen=True)
class MMDiTArchitecture:
    """The size of an MM-DiT, in diffusers' own names; the defaults are SD3-medium's, 2.03 B parameters.

    Attributes:
        num_layers: joint blocks.
        num_attention_heads: heads of each block; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        patch_size: latent positions per token, along each side.
        pooled_projection_dim: channels of the pooled text features.
        pos_embed_max_size: patches along each side for which there are positions.
        qk_norm: normalisation of queries and keys: ``rms_norm`` for SD3.5, None for SD3.
        dual_attention_layers: numbers of the blocks with a second self-attention of the image: 0 to 12 in SD3.5-medium.
    """

    num_layers: int = 24
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    patch_size: int = 2
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    qk_norm: str | None = None
    dual_attention_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
        require_positive(self, "pooled_projection_dim", "pos_embed_max_size")
        require_position_width(self, self.num_attention_heads, self.attention_head_dim)


class MMDiTFlowMap(BackboneFlowMap):
    """diffusers' ``SD3Transformer2DModel``, with the features of ``SD3TextEncoder``.

    The first token holds the pooled features, the others are the sequence. SD3 has no mask: all tokens are attended.

    Args:
        architecture: its size, if it starts from scratch.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.mmdit import MMDiTArchitecture
        >>> size = MMDiTArchitecture(2, 2, 8, pooled_projection_dim=12, pos_embed_max_size=8)
        >>> net = MMDiTFlowMap(size, latent_channels=4, latent_size=8, context_width=16)
        >>> z, t, context, mask = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 16), torch.ones(1, 5).bool()
        >>> net(z, t, t, context, mask).shape
        torch.Size([1, 4, 8, 8])
    """

    context_width_key = "joint_attention_dim"
    places = TimePlaces(
        "time_text_embed.timestep_embedder",
        sinusoid="time_text_embed.time_proj",
        conditioning="time_text_embed",
        output_norm=("norm_out", "conditioning_embedding"),
    )

    def __init__(
        self,
        architecture: MMDiTArchitecture | None = None,
        *,
        latent_channels: int = 16,
        latent_size: int = 128,
        context_width: int = 4096,
        **options: Any,
    ) -> None:
        from diffusers import SD3Transformer2DModel

        size = architecture or MMDiTArchitecture()
        width = size.num_attention_heads * size.attention_head_dim
        arguments = asdict(size) | {"joint_attention_dim": context_width, "caption_projection_dim": width}
        arguments |= {"in_channels": latent_channels, "out_channels": latent_channels, "sample_size": latent_size}
        shape = latent_channels, latent_size, context_width
        super().__init__(SD3Transformer2DModel, arguments, architecture, *shape, **options)
        config = self.model.config
        patch, most, pooled = config.patch_size, config.pos_embed_max_size, config.pooled_projection_dim
        require_patches(self, latent_size, patch)
        rule = f"latents of side {latent_size} have more patches of {patch} along a side than pos_embed_max_size={most}"
        require(self, latent_size <= most * patch, f"{rule}; lower the data's resolution")
        require_pooled(self, pooled, context_width)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The model's output; there is no mask."""
        return self.model(
            z,
            encoder_hidden_states=context[:, 1:],
            pooled_projections=context[:, 0, : self.model.config.pooled_projection_dim],
            timestep=self.timestep(t),
            return_dict=False,
        )[0]
