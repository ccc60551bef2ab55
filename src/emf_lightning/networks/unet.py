"""diffusers' UNets as flow maps: the unconditional one and Stable Diffusion's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from emf_lightning.networks.architecture_checks import require, require_positive
from emf_lightning.networks.backbone import BackboneFlowMap
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import Discriminator
from emf_lightning.networks.two_time.two_time_embedding import TimePlaces


@dataclass(frozen=True)
class UNetArchitecture:
    """The size of a UNet; the defaults are DDPM's for CIFAR-10 (arXiv 2006.11239), 35.7 M parameters.

    Attributes:
        channels: channels of each stage, from full resolution down; each stage halves the side.
        attention: whether each stage has attention: self-attention, or in text-conditioned UNets also to the text.
        layers: residual blocks of a stage.
        head_channels: channels of one head of self-attention; None for a single head.
        heads: heads of the attention to the text.
        groups: groups of the normalisations; every stage's channels must be a multiple.
        dropout: of the residual blocks, in [0, 1); text-conditioned UNets have none.
    """

    channels: list[int]
    attention: list[bool]
    layers: int = 2
    head_channels: int | None = None
    heads: int = 8
    groups: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        stages, attention = len(self.channels), len(self.attention)
        require(self, stages == attention, f"channels has {stages} stages and attention {attention}")
        require(self, len(self.channels) > 0, "channels is empty; give the channels of at least one stage")
        require(self, 0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")
        require_positive(self, "layers", "heads", "groups")
        self.require_multiples("groups", self.channels)
        if self.head_channels is not None:
            require_positive(self, "head_channels")
            self.require_multiples("head_channels", self.attending)

    @property
    def attending(self) -> list[int]:
        """Channels of the stages with attention, and of the middle, which always has it."""
        return [c for c, attends in zip(self.channels, self.attention, strict=True) if attends] + self.channels[-1:]

    def require_multiples(self, name: str, channels: list[int]) -> None:
        """Raises ``ValueError`` unless all ``channels`` are positive multiples of the setting ``name``."""
        divisor = getattr(self, name)
        wrong = [c for c in channels if c < 1 or c % divisor]
        require(self, not wrong, f"channels must be positive multiples of {name}={divisor}, got {wrong}")

    def stages(self, prefix: str) -> dict[str, object]:
        """diffusers' arguments; ``prefix`` begins its class names of stages with attention."""
        return {
            "block_out_channels": tuple(self.channels),
            "layers_per_block": self.layers,
            "norm_num_groups": self.groups,
            "down_block_types": tuple(f"{prefix * attends}DownBlock2D" for attends in self.attention),
            "up_block_types": tuple(f"{prefix * attends}UpBlock2D" for attends in reversed(self.attention)),
        }


DDPM = UNetArchitecture([128, 256, 256, 256], [False, True, False, False])
"""35.7 M parameters at 32 x 32 x 3."""

STABLE_DIFFUSION = UNetArchitecture([320, 640, 1280, 1280], [True, True, True, False])
"""Stable Diffusion 1.x, 860 M parameters at 4 channels with a text width of 768."""


def _shape(channels: int, side: int) -> dict[str, int]:
    return {"in_channels": channels, "out_channels": channels, "sample_size": side}


class _UNet(BackboneFlowMap):
    places = TimePlaces("time_embedding", sinusoid="time_proj")
    lora_prefix = "unet"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]


class UNetFlowMap(_UNet):
    """diffusers' ``UNet2DModel``: images without captions.

    Args:
        architecture: its size, if it starts from scratch.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.unet import UNetArchitecture
        >>> net = UNetFlowMap(UNetArchitecture([8, 8], [False, True], layers=1, groups=4), latent_size=8)
        >>> z, t, context, mask = torch.randn(1, 3, 8, 8), torch.ones(1), torch.zeros(1, 1, 8), torch.ones(1, 1).bool()
        >>> net(z, t, t, context, mask).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        architecture: UNetArchitecture | None = None,
        *,
        latent_channels: int = 3,
        latent_size: int = 32,
        context_width: int = 8,
        **options: Any,
    ) -> None:
        from diffusers import UNet2DModel

        size = architecture or DDPM
        halvings = len(size.channels) - 1
        rule = f"latents of side {latent_size} do not halve {halvings} times, once between the stages of `channels`"
        fits = options.get("pretrained") is not None or latent_size % 2**halvings == 0
        require(self, fits, f"{rule}; change the data's resolution or the number of stages")
        arguments = size.stages("Attn") | {"attention_head_dim": size.head_channels, "dropout": size.dropout}
        arguments |= _shape(latent_channels, latent_size)
        super().__init__(UNet2DModel, arguments, architecture, latent_channels, latent_size, context_width, **options)

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The UNet's output; it ignores ``context``."""
        return self.model(z, self.timestep(t), return_dict=False)[0]


class TextUNetFlowMap(_UNet):
    """diffusers' ``UNet2DConditionModel``, Stable Diffusion 1.x's.

    InstaFlow's (arXiv 2309.06380) was trained as a rectified flow on t x 1000 and predicts x - e:
    ``prediction: PredictReversedVelocity``, ``time_scale: 1000``.

    Args:
        architecture: its size, if it starts from scratch.
        latent_channels: C of the latents; see ``BackboneFlowMap`` for it and for the other arguments.

    Example:
        >>> from emf_lightning.networks.unet import UNetArchitecture
        >>> size = UNetArchitecture([8, 16], [True, False], layers=1, heads=2, groups=4)
        >>> net = TextUNetFlowMap(size, latent_size=8, context_width=16)
        >>> z, t, context, mask = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 16), torch.ones(1, 5).bool()
        >>> net(z, t, t, context, mask).shape
        torch.Size([1, 4, 8, 8])
    """

    context_width_key = "cross_attention_dim"

    def __init__(
        self,
        architecture: UNetArchitecture | None = None,
        *,
        latent_channels: int = 4,
        latent_size: int = 64,
        context_width: int = 768,
        **options: Any,
    ) -> None:
        from diffusers import UNet2DConditionModel

        size = architecture or STABLE_DIFFUSION
        size.require_multiples("heads", size.attending)
        arguments = size.stages("CrossAttn") | {"attention_head_dim": size.heads, "cross_attention_dim": context_width}
        arguments |= _shape(latent_channels, latent_size)
        shape = latent_channels, latent_size, context_width
        super().__init__(UNet2DConditionModel, arguments, architecture, *shape, **options)

    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return self.model(z, self.timestep(t), context, encoder_attention_mask=mask, return_dict=False)[0]


class UNetDiscriminator(Discriminator):
    """A copy of the generator's encoder half and middle with a logit head: SCFlow's for text-to-image.

    The head has no sigmoid; the release applies one twice.

    Args:
        net: the generator, a ``TextUNetFlowMap``.

    Raises:
        ValueError: for another kind of network.
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
        """Logits ``[B]`` from the mean of the deepest features over positions."""
        dtype = self.conv_in.weight.dtype
        embedded = self.time_embedding(self.time_proj(t * self.time_scale).to(dtype))
        context = context.to(dtype)
        masked = ((1 - mask.to(dtype)) * -10_000.0)[:, None]  # diffusers adds it to the scores of masked tokens
        h = self.conv_in(z.to(dtype))
        for block in self.down_blocks:
            attends = getattr(block, "has_cross_attention", False)
            text = {"encoder_hidden_states": context, "encoder_attention_mask": masked} if attends else {}
            h = block(hidden_states=h, temb=embedded, **text)[0]
        h = self.mid_block(h, embedded, encoder_hidden_states=context, encoder_attention_mask=masked)
        h = F.silu(self.norm(self.conv(h)))
        return self.logit(h.mean((2, 3)))[:, 0]
