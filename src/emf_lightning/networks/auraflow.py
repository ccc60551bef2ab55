"""AuraFlow's transformer (https://blog.fal.ai/auraflow) as a flow map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from emf_lightning.networks.architecture_checks import require, require_patches, require_positive
from emf_lightning.networks.backbone import BackboneFlowMap
from emf_lightning.networks.two_time.two_time_embedding import TimePlaces


@dataclass(frozen=True)
class AuraFlowArchitecture:
    """The size of an AuraFlow, in diffusers' own names; the defaults are version 0.3's, 6.86 B parameters.

    Attributes:
        num_mmdit_layers: joint blocks.
        num_single_dit_layers: blocks of one stream after them.
        num_attention_heads: heads of each block; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        patch_size: latent positions per token, along each side.
        pos_embed_max_size: learned positions of patches, a square number.
    """

    num_mmdit_layers: int = 4
    num_single_dit_layers: int = 32
    num_attention_heads: int = 12
    attention_head_dim: int = 256
    patch_size: int = 2
    pos_embed_max_size: int = 9216

    def __post_init__(self) -> None:
        require_positive(self, "num_mmdit_layers", "num_single_dit_layers", "num_attention_heads")
        require_positive(self, "attention_head_dim", "patch_size", "pos_embed_max_size")
        most = self.pos_embed_max_size
        require(self, math.isqrt(most) ** 2 == most, f"pos_embed_max_size must be a square number, got {most}")


class AuraFlowFlowMap(BackboneFlowMap):
    """diffusers' ``AuraFlowTransformer2DModel``; the text is T5's hidden states, zeros behind the caption.

    ``PretrainedTextEncoder`` with ``subfolder: text_encoder`` computes them. There is no mask in attention.

    Args:
        architecture: its size, if it starts from scratch.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.auraflow import AuraFlowArchitecture
        >>> size = AuraFlowArchitecture(1, 1, 2, 8, pos_embed_max_size=16)
        >>> net = AuraFlowFlowMap(size, latent_size=8, context_width=16)
        >>> z, t, context, mask = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 16), torch.ones(1, 5).bool()
        >>> net(z, t, t, context, mask).shape
        torch.Size([1, 4, 8, 8])
    """

    published_time_scale = 1.0  # the model multiplies it by 1000
    context_width_key = "joint_attention_dim"
    places = TimePlaces(
        "time_step_proj",
        sinusoid="time_step_embed",
        conditioning="time_step_proj",
        output_norm=("norm_out", "conditioning_embedding"),
    )

    def __init__(
        self,
        architecture: AuraFlowArchitecture | None = None,
        *,
        latent_channels: int = 4,
        latent_size: int = 128,
        context_width: int = 2048,
        **options: Any,
    ) -> None:
        from diffusers import AuraFlowTransformer2DModel

        size = architecture or AuraFlowArchitecture()
        width = size.num_attention_heads * size.attention_head_dim
        arguments = asdict(size) | {"joint_attention_dim": context_width, "caption_projection_dim": width}
        arguments |= {"in_channels": latent_channels, "out_channels": latent_channels, "sample_size": latent_size}
        shape = latent_channels, latent_size, context_width
        super().__init__(AuraFlowTransformer2DModel, arguments, architecture, *shape, **options)
        patch, most = self.model.config.patch_size, self.model.config.pos_embed_max_size
        require_patches(self, latent_size, patch)
        rule = f"latents of side {latent_size} have more patches of {patch} than pos_embed_max_size={most}"
        require(self, (latent_size // patch) ** 2 <= most, f"{rule}; lower the data's resolution")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.joint_transformer_blocks, *self.model.single_transformer_blocks]

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The model's output; masked tokens are zeros, as in its pipeline."""
        text = context * mask[..., None]
        return self.model(z, encoder_hidden_states=text, timestep=self.timestep(t), return_dict=False)[0]
