"""diffusers' UNets as flow maps: unconditional ones, and Stable Diffusion's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import Discriminator
from emf_lightning.networks.prediction import Prediction
from emf_lightning.networks.single_time import SingleTimeFlowMap


@dataclass(frozen=True)
class UNetArchitecture:
    """The size of a UNet; the defaults are DDPM's for CIFAR-10 (arXiv 2006.11239), 35.7 M parameters.

    Attributes:
        channels: of each stage, from full side down; the side halves from one to the next.
        attention: whether each stage attends: to itself, or to the text where there is any.
        layers: residual blocks of a stage.
        head_channels: of one head of self-attention; None for a single head.
        heads: of the attention to the text.
        groups: of the normalisations; the channels must divide by it.
        dropout: in the residual blocks; not where there is text.
    """

    channels: list[int]
    attention: list[bool]
    layers: int = 2
    head_channels: int | None = None
    heads: int = 8
    groups: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.attention):
            raise ValueError(
                f"UNetArchitecture: channels has {len(self.channels)} stages and attention {len(self.attention)}"
            )

    def stages(self, down: str, up: str, plain_down: str, plain_up: str) -> dict[str, object]:
        """diffusers' arguments, with these names for stages that attend and that do not."""
        return {
            "block_out_channels": tuple(self.channels),
            "layers_per_block": self.layers,
            "norm_num_groups": self.groups,
            "down_block_types": tuple(down if attends else plain_down for attends in self.attention),
            "up_block_types": tuple(up if attends else plain_up for attends in reversed(self.attention)),
        }


DDPM = UNetArchitecture([128, 256, 256, 256], [False, True, False, False])
"""35.7 M parameters at 32 x 32 x 3."""

STABLE_DIFFUSION = UNetArchitecture([320, 640, 1280, 1280], [True, True, True, False])
"""Stable Diffusion 1.x, 860 M parameters at 4 channels with a text width of 768."""


class UNetFlowMap(SingleTimeFlowMap):
    """diffusers' ``UNet2DModel``: pictures without captions.

    Args:
        architecture: its size, where it starts from scratch.
        pretrained: see ``SingleTimeFlowMap``, as everything else.
    """

    def __init__(
        self,
        architecture: UNetArchitecture | None = None,
        pretrained: str | None = None,
        subfolder: str | None = None,
        prediction: Prediction | None = None,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
        latent_channels: int = 3,
        latent_size: int = 32,
        context_width: int = 8,
    ) -> None:
        from diffusers import UNet2DModel

        _one_source(self, architecture, pretrained)
        size = architecture or DDPM
        super().__init__(
            UNet2DModel,
            size.stages("AttnDownBlock2D", "AttnUpBlock2D", "DownBlock2D", "UpBlock2D")
            | {"attention_head_dim": size.head_channels, "dropout": size.dropout},
            pretrained,
            subfolder,
            prediction,
            time_scale,
            gradient_checkpointing,
            latent_channels,
            latent_size,
            context_width,
        )

    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """The UNet's output; captions are not read."""
        output: Tensor = self.model(z.to(self.model.dtype), self.scaled(t), return_dict=False)[0]
        return output


class TextUNetFlowMap(SingleTimeFlowMap):
    """diffusers' ``UNet2DConditionModel``, Stable Diffusion 1.x's.

    InstaFlow's (arXiv 2309.06380) was trained as a rectified flow on t x 1000 and gives x - e:
    ``prediction: PredictReversedVelocity``, ``time_scale: 1000``.

    Args:
        architecture: its size, where it starts from scratch.
        pretrained: see ``SingleTimeFlowMap``, as everything else.
    """

    def __init__(
        self,
        architecture: UNetArchitecture | None = None,
        pretrained: str | None = None,
        subfolder: str | None = None,
        prediction: Prediction | None = None,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
        latent_channels: int = 4,
        latent_size: int = 64,
        context_width: int = 768,
    ) -> None:
        from diffusers import UNet2DConditionModel

        _one_source(self, architecture, pretrained)
        size = architecture or STABLE_DIFFUSION
        super().__init__(
            UNet2DConditionModel,
            size.stages("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D")
            | {"attention_head_dim": size.heads, "cross_attention_dim": context_width},
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
        """The width of the attention to the text."""
        return {"text feature width": self.model.config.cross_attention_dim}

    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """The UNet's output."""
        dtype = self.model.dtype
        output: Tensor = self.model(
            z.to(dtype), self.scaled(t), context.to(dtype), encoder_attention_mask=mask, return_dict=False
        )[0]
        return output


class UNetDiscriminator(Discriminator):
    """The way down of the drawing ``TextUNetFlowMap``, copied, with a head: SCFlow's for text-to-image.

    Its head has no sigmoid, unlike the release's, which squashes its logits twice.

    Args:
        net: what draws, and what is copied.
    """

    def __init__(self, net: FlowMapNetwork) -> None:
        super().__init__()
        if not isinstance(net, TextUNetFlowMap):
            raise ValueError(
                f"UNetDiscriminator copies the UNet of a TextUNetFlowMap, and net is a {type(net).__name__}: take "
                "ConvDiscriminator"
            )
        unet = net.model
        self.time_scale = net.time_scale
        self.time_proj = unet.time_proj
        parts = (unet.time_embedding, unet.conv_in, unet.down_blocks, unet.mid_block)
        self.time_embedding, self.conv_in, self.down_blocks, self.mid_block = map(copy.deepcopy, parts)
        width = unet.config.block_out_channels[-1]
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(unet.config.norm_num_groups, width)
        self.logit = nn.Linear(width, 1)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B]``, the mean over places of what the deepest features say."""
        dtype = self.conv_in.weight.dtype
        embedded = self.time_embedding(self.time_proj(t * self.time_scale).to(dtype))
        context = context.to(dtype)
        unseen = ((1 - mask.to(dtype)) * -10_000.0)[:, None]  # what diffusers adds to the scores of masked tokens
        h = self.conv_in(z.to(dtype))
        for block in self.down_blocks:
            attends = getattr(block, "has_cross_attention", False)
            text = {"encoder_hidden_states": context, "encoder_attention_mask": unseen} if attends else {}
            h = block(hidden_states=h, temb=embedded, **text)[0]
        h = self.mid_block(h, embedded, encoder_hidden_states=context, encoder_attention_mask=unseen)
        h = F.silu(self.norm(self.conv(h)))
        logits: Tensor = self.logit(h.mean((2, 3)))[:, 0]
        return logits


def _one_source(net: nn.Module, architecture: object, pretrained: str | None) -> None:
    if architecture is not None and pretrained is not None:
        raise ValueError(
            f"{type(net).__name__}: give `architecture` or `pretrained`, not both; the weights say the size"
        )
