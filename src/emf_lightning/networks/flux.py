"""FLUX.1's transformer as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.networks.architecture_checks import require, require_patches, require_pooled, require_positive
from emf_lightning.networks.backbone import BackboneFlowMap, patches, unpatched
from emf_lightning.networks.two_time.two_time_embedding import TimePlaces

PATCH = 2
"""Latents are packed 2 x 2 to a token."""

MODEL_SCALE = 1000
"""Factor on the time inside the model."""


def require_rope(owner: object, axes: Sequence[int], head_dim: int) -> None:
    """Raises ``ValueError`` unless the axes' even numbers of rotary channels add up to those of a head."""
    rule = f"axes_dims_rope must be even numbers with the sum attention_head_dim={head_dim}, got {list(axes)}"
    require(owner, sum(axes) == head_dim and all(axis > 0 and axis % 2 == 0 for axis in axes), rule)


@dataclass(frozen=True)
class FluxArchitecture:
    """The size of a FLUX.1, in diffusers' own names; the defaults are dev's, 11.9 B parameters.

    Attributes:
        num_layers: joint blocks; FLUX.1-lite has 8.
        num_single_layers: blocks of one stream after them.
        num_attention_heads: heads of each block; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        pooled_projection_dim: channels of the pooled text features.
        guidance_embeds: whether it takes the guidance scale as an input; schnell does not.
        axes_dims_rope: channels of a head that encode the (unused) frame, the row and the column.
    """

    num_layers: int = 19
    num_single_layers: int = 38
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
        require_positive(self, "pooled_projection_dim")
        require_rope(self, self.axes_dims_rope, self.attention_head_dim)


class FluxFlowMap(BackboneFlowMap):
    """diffusers' ``FluxTransformer2DModel``, with the features of ``FluxTextEncoder``.

    The first token holds the pooled features, the others are the sequence. FLUX has no mask: all tokens are attended.
    FLUX.1-dev and -lite are distilled for guidance: they need one evaluation a step, and no guidance in the target.
    Under bf16 weights FLUX rounds its time; the second time input does not pass through that rounding.

    Args:
        architecture: its size, if it starts from scratch.
        guidance: the guidance scale that the network is told, where it takes one. FLUX rounds 1000 times the scale to
            bf16, in which it was trained: 3.5 becomes 3504, 4 stays 4000. Here it does in every precision, so that
            passes of one step in different precisions agree.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.flux import FluxArchitecture
        >>> size = FluxArchitecture(1, 1, 2, 8, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4))
        >>> net = FluxFlowMap(size, latent_channels=4, latent_size=8, context_width=16)
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
        architecture: FluxArchitecture | None = None,
        *,
        guidance: float = 3.5,
        latent_channels: int = 16,
        latent_size: int = 128,
        context_width: int = 4096,
        **options: Any,
    ) -> None:
        from diffusers import FluxTransformer2DModel

        size = architecture or FluxArchitecture()
        arguments = asdict(size) | {"in_channels": PATCH**2 * latent_channels, "joint_attention_dim": context_width}
        shape = latent_channels, latent_size, context_width
        super().__init__(FluxTransformer2DModel, arguments, architecture, *shape, **options)
        self.guidance = guidance
        # bf16 of it times 1000 is the same number
        self._told = float((torch.tensor(guidance, device="cpu").bfloat16() * MODEL_SCALE).float() / MODEL_SCALE)
        require_patches(self, latent_size, PATCH)
        require_pooled(self, self.model.config.pooled_projection_dim, context_width)

    @property
    def model_channels(self) -> int:
        return super().model_channels // PATCH**2

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The model's output; there is no mask."""
        config, (height, width) = self.model.config, (side // PATCH for side in z.shape[-2:])
        tokens = self.model(
            patches(z, PATCH),
            encoder_hidden_states=context[:, 1:],
            pooled_projections=context[:, 0, : config.pooled_projection_dim],
            timestep=self.prediction.time(t) * (self.time_scale / MODEL_SCALE),  # the model multiplies it
            img_ids=_positions(height, width, z.device),
            txt_ids=torch.zeros(context.shape[1] - 1, 3, device=z.device),
            guidance=t.new_full(t.shape, self._told) if config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return unpatched(tokens, height, PATCH)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """Frame 0, row and column of each token, ``[height width, 3]``."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(torch.zeros(1, device=device), rows.float(), columns.float())
