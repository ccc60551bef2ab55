"""Lumina-Image 2.0's transformer (arXiv 2503.21758) as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.networks.architecture_checks import require, require_patches, require_positive
from emf_lightning.networks.backbone import BackboneFlowMap
from emf_lightning.networks.flux import require_rope
from emf_lightning.networks.two_time.two_time_embedding import TimePlaces


@dataclass(frozen=True)
class Lumina2Architecture:
    """The size of a Lumina-Image 2.0, in diffusers' own names; the defaults are the published one's, 2.61 B parameters.

    Attributes:
        hidden_size: the width; a head has width / ``num_attention_heads`` channels.
        num_layers: blocks of the joint sequence.
        num_refiner_layers: blocks of the text alone, and of the image alone, before them.
        num_attention_heads: heads of each block.
        num_kv_heads: heads of its keys and values.
        patch_size: latent positions per token, along each side.
        multiple_of: the hidden channels of a feed-forward layer are a multiple of it.
        axes_dim_rope: channels of a head that encode the place in the text, the row and the column.
        axes_lens: most places along each.
    """

    hidden_size: int = 2304
    num_layers: int = 26
    num_refiner_layers: int = 2
    num_attention_heads: int = 24
    num_kv_heads: int = 8
    patch_size: int = 2
    multiple_of: int = 256
    axes_dim_rope: tuple[int, int, int] = (32, 32, 32)
    axes_lens: tuple[int, int, int] = (300, 512, 512)

    def __post_init__(self) -> None:
        require_positive(self, "hidden_size", "num_layers", "num_refiner_layers", "num_attention_heads")
        require_positive(self, "num_kv_heads", "patch_size", "multiple_of")
        heads = self.num_attention_heads
        rule = f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={heads}"
        require(self, self.hidden_size % heads == 0, rule)
        rule = f"num_attention_heads={heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
        require(self, heads % self.num_kv_heads == 0, rule)
        require_rope(self, self.axes_dim_rope, self.hidden_size // heads)


class Lumina2FlowMap(BackboneFlowMap):
    """diffusers' ``Lumina2Transformer2DModel``, with the features of ``Lumina2TextEncoder``.

    Its own time is 1 - t and its output the way to the data; both are turned round here. Masked tokens must follow the
    others. It reads the captions' lengths off the mask, so it waits for the device at each pass.

    Args:
        architecture: its size, if it starts from scratch.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.lumina2 import Lumina2Architecture
        >>> size = Lumina2Architecture(16, 1, 1, 2, 1, multiple_of=8, axes_dim_rope=(2, 2, 4), axes_lens=(16, 8, 8))
        >>> net = Lumina2FlowMap(size, latent_channels=4, latent_size=8, context_width=16)
        >>> z, t, context, mask = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 16), torch.ones(1, 5).bool()
        >>> net(z, t, t, context, mask).shape
        torch.Size([1, 4, 8, 8])
    """

    context_width_key = "cap_feat_dim"
    published_time_scale = 1.0
    places = TimePlaces("time_caption_embed.timestep_embedder", sinusoid="time_caption_embed.time_proj", reversed=True)

    def __init__(
        self,
        architecture: Lumina2Architecture | None = None,
        *,
        latent_channels: int = 16,
        latent_size: int = 128,
        context_width: int = 2304,
        **options: Any,
    ) -> None:
        from diffusers import Lumina2Transformer2DModel

        size = architecture or Lumina2Architecture()
        arguments = asdict(size) | {"cap_feat_dim": context_width}
        arguments |= {"in_channels": latent_channels, "out_channels": latent_channels, "sample_size": latent_size}
        shape = latent_channels, latent_size, context_width
        super().__init__(Lumina2Transformer2DModel, arguments, architecture, *shape, **options)
        config = self.model.config
        require_patches(self, latent_size, config.patch_size)
        most = min(config.axes_lens[1:]) * config.patch_size
        rule = f"latents of side {latent_size} have more patches along a side than axes_lens={list(config.axes_lens)}"
        require(self, latent_size <= most, f"{rule}; lower the data's resolution")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.context_refiner, *self.model.noise_refiner, *self.model.layers]

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The model's output with the other sign."""
        most = self.model.config.axes_lens[0] - 1  # an image's positions begin behind its caption's
        if context.shape[1] > most:
            raise ValueError(
                f"Lumina2FlowMap: captions of {context.shape[1]} tokens, but axes_lens has positions for {most}; set "
                f"data.text.init_args.length to {most} or less"
            )
        time = self.time_scale - self.timestep(t)
        # the captions' lengths are read off the mask's numbers; on the meta device captions are whole
        hook = self.model.rope_embedder.register_forward_pre_hook(_whole_captions) if mask.is_meta else None
        try:
            return -self.model(z, time, context, mask, return_dict=False)[0]
        finally:
            if hook is not None:
                hook.remove()


def _whole_captions(_: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return inputs[0], torch.ones(inputs[1].shape, dtype=torch.bool, device="cpu")
