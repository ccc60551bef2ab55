"""Stable Diffusion 3's transformer (MM-DiT, arXiv 2403.03206) as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from emf_lightning.networks.prediction import Prediction
from emf_lightning.networks.single_time import SingleTimeFlowMap


@dataclass(frozen=True)
class MMDiTArchitecture:
    """The size of an MM-DiT, in diffusers' own names; the defaults are SD3-medium's, 2.03 B parameters.

    Attributes:
        num_layers: joint blocks.
        num_attention_heads: of each; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        patch_size: latent positions per token, along each side.
        pooled_projection_dim: channels of the pooled text features.
        pos_embed_max_size: patches along the side for which positions are made.
        qk_norm: normalisation of queries and keys: ``rms_norm`` for SD3.5, None for SD3.
    """

    num_layers: int = 24
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    patch_size: int = 2
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    qk_norm: str | None = None


class MMDiTFlowMap(SingleTimeFlowMap):
    """diffusers' ``SD3Transformer2DModel``, with the features of ``SD3TextEncoder``.

    The first token holds the pooled features, the others are the sequence. There is no mask in SD3: all are attended.

    Args:
        architecture: its size, where it starts from scratch.
        pretrained: see ``SingleTimeFlowMap``, as everything else.
    """

    def __init__(
        self,
        architecture: MMDiTArchitecture | None = None,
        pretrained: str | None = None,
        subfolder: str | None = None,
        prediction: Prediction | None = None,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
        latent_channels: int = 16,
        latent_size: int = 128,
        context_width: int = 4096,
    ) -> None:
        from diffusers import SD3Transformer2DModel

        if architecture is not None and pretrained is not None:
            raise ValueError("MMDiTFlowMap: give `architecture` or `pretrained`, not both; the weights say the size")
        size = architecture or MMDiTArchitecture()
        width = size.num_attention_heads * size.attention_head_dim
        super().__init__(
            SD3Transformer2DModel,
            asdict(size) | {"joint_attention_dim": context_width, "caption_projection_dim": width},
            pretrained,
            subfolder,
            prediction,
            time_scale,
            gradient_checkpointing,
            latent_channels,
            latent_size,
            context_width,
        )

    def said_widths(self) -> dict[str, int]:
        """The width of the sequence's features."""
        return {"text feature width": self.model.config.joint_attention_dim}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The joint blocks."""
        return list(self.model.transformer_blocks)

    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """The transformer's output."""
        dtype, config = self.model.dtype, self.model.config
        output: Tensor = self.model(
            z.to(dtype),
            encoder_hidden_states=context[:, 1:].to(dtype),
            pooled_projections=context[:, 0, : config.pooled_projection_dim].to(dtype),
            timestep=self.scaled(t),
            return_dict=False,
        )[0]
        return output
