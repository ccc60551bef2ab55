"""Qwen-Image's transformer (arXiv 2508.02324) as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.networks.architecture_checks import require_patches, require_positive
from emf_lightning.networks.backbone import BackboneFlowMap, patches, unpatched
from emf_lightning.networks.flux import PATCH, FluxFlowMap, require_rope


@dataclass(frozen=True)
class QwenImageArchitecture:
    """The size of a Qwen-Image, in diffusers' own names; the defaults are the published one's, 20.4 B parameters.

    Attributes:
        num_layers: joint blocks.
        num_attention_heads: heads of each block; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        axes_dims_rope: channels of a head that encode the (unused) frame, the row and the column.
    """

    num_layers: int = 60
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "num_attention_heads", "attention_head_dim")
        require_rope(self, self.axes_dims_rope, self.attention_head_dim)


class QwenImageFlowMap(BackboneFlowMap):
    """diffusers' ``QwenImageTransformer2DModel``; the text is Qwen2.5-VL's hidden states with their mask.

    Under bf16 weights it rounds its time; the second time input does not pass through that rounding.

    Args:
        architecture: its size, if it starts from scratch.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.qwen_image import QwenImageArchitecture
        >>> size = QwenImageArchitecture(1, 2, 8, axes_dims_rope=(2, 2, 4))
        >>> net = QwenImageFlowMap(size, latent_channels=4, latent_size=8, context_width=16)
        >>> z, t, context, mask = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 16), torch.ones(1, 5).bool()
        >>> net(z, t, t, context, mask).shape
        torch.Size([1, 4, 8, 8])
    """

    published_time_scale = 1.0  # the model multiplies it by 1000
    context_width_key = "joint_attention_dim"
    places = FluxFlowMap.places

    def __init__(
        self,
        architecture: QwenImageArchitecture | None = None,
        *,
        latent_channels: int = 16,
        latent_size: int = 128,
        context_width: int = 3584,
        **options: Any,
    ) -> None:
        from diffusers import QwenImageTransformer2DModel

        arguments = asdict(architecture or QwenImageArchitecture()) | {"joint_attention_dim": context_width}
        arguments |= {"in_channels": PATCH**2 * latent_channels, "out_channels": latent_channels, "patch_size": PATCH}
        shape = latent_channels, latent_size, context_width
        super().__init__(QwenImageTransformer2DModel, arguments, architecture, *shape, **options)
        require_patches(self, latent_size, PATCH)

    @property
    def model_channels(self) -> int:
        return super().model_channels // PATCH**2

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.transformer_blocks)

    @property
    def unused_parts(self) -> Sequence[str]:
        """The last block's layers of the text, which nothing reads behind it."""
        last = f"transformer_blocks.{len(self.blocks) - 1}"
        return [f"{last}.attn.to_add_out", f"{last}.txt_mlp"]

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        height, width = (side // PATCH for side in z.shape[-2:])
        if torch.is_inference_mode_enabled():  # the model keeps these numbers, and a later pass may be a training's
            with torch.inference_mode(False):
                self.model.pos_embed._get_device_freqs(z.device)
        tokens = self.model(
            patches(z, PATCH),
            encoder_hidden_states=context,
            encoder_hidden_states_mask=mask,
            timestep=self.timestep(t),
            img_shapes=[[(1, height, width)]] * len(z),
            return_dict=False,
        )[0]
        return unpatched(tokens, height, PATCH)
