"""Discriminators: networks that tell real latents from generated ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.base import FlowMapNetwork


class Discriminator(nn.Module, ABC):
    """A network with positive logits for real latents and negative ones for generated latents."""

    @abstractmethod
    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B]``, unbounded.

        Args:
            z: ``[B, C, H, W]``, latents, noised up to ``t``.
            t: ``[B]``, fp32, 0 for latents without noise.
            context: ``[B, L, D]``, token features of the captions.
            mask: ``[B, L]``, bool, True at tokens.
        """


DiscriminatorCallable = Callable[[FlowMapNetwork], Discriminator]
"""A constructor of a discriminator for a given generator."""


class ConvDiscriminator(Discriminator):
    """Residual convolutions, halving the side down to 4 or so, and the caption by projection (arXiv 1802.05637).

    StyleGAN2's discriminator (arXiv 1912.04958) without its filtered resampling: residual blocks, leaky units, the
    minibatch standard deviation, and no normalisation, which R1 does without.

    Args:
        net: the generator; sets the shapes of the latents and the text features.
        channels: channels at full resolution; doubled at every halving up to ``max_channels``.
        max_channels: upper bound of the channels.
        conditional: whether the logits depend on the caption.
        mbstd_group_size: samples that share a minibatch standard deviation, which shows a lack of variety.

    Raises:
        ValueError: if a number is below 1 or ``max_channels`` below ``channels``.
    """

    def __init__(
        self,
        net: FlowMapNetwork,
        channels: int = 32,
        max_channels: int = 256,
        conditional: bool = True,
        mbstd_group_size: int = 4,
    ) -> None:
        super().__init__()
        rule = f"needs 1 <= channels <= max_channels, got channels={channels}, max_channels={max_channels}"
        require(self, 1 <= channels <= max_channels, rule)
        require(self, mbstd_group_size >= 1, f"mbstd_group_size must be at least 1, got {mbstd_group_size}")
        self.mbstd_group_size = mbstd_group_size
        self.stem = nn.Conv2d(net.latent_channels, channels, 3, padding=1)
        blocks, side = [], net.latent_size
        while side > 4:
            blocks.append(_DownsamplingBlock(channels, min(2 * channels, max_channels)))
            channels, side = min(2 * channels, max_channels), -(-side // 2)
        self.blocks = nn.Sequential(*blocks)
        self.mix = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.head = nn.Linear(channels * side * side, channels)
        self.logit = nn.Linear(channels, 1)
        self.caption = nn.Linear(net.context_width, channels, bias=False) if conditional else None
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):  # with torch's default signal and gradient fade by layers
                nn.init.kaiming_normal_(part.weight, a=0.2)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B]``; it ignores ``t``."""
        h = self.blocks(self.stem(z))
        h = F.leaky_relu(self.mix(torch.cat([h, minibatch_stddev(h, self.mbstd_group_size)], dim=1)), 0.2)
        h = F.leaky_relu(self.head(h.flatten(1)), 0.2)
        logits: Tensor = self.logit(h)[:, 0]
        if self.caption is not None:
            tokens = context.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            logits = logits + (h * self.caption(tokens.to(h.dtype))).sum(1) / h.shape[1] ** 0.5
        return logits


class _DownsamplingBlock(nn.Module):
    """A residual block that halves the side, rounding up."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1, bias=False)
        self.downsample = nn.AvgPool2d(2, ceil_mode=True)

    def forward(self, h: Tensor) -> Tensor:
        skip = self.skip(self.downsample(h))
        h = F.leaky_relu(self.first(F.leaky_relu(h, 0.2)), 0.2)
        return (skip + self.downsample(self.second(h))) * 0.5**0.5


def minibatch_stddev(h: Tensor, group_size: int) -> Tensor:
    """Mean standard deviation within each group of samples, ``[B, 1, H, W]`` (arXiv 1710.10196, section 3)."""
    groups = [part.float() for part in torch.split(h, group_size)]
    stddevs = [(part.var(0, correction=0) + 1e-8).sqrt().mean().expand(len(part)) for part in groups]
    return torch.cat(stddevs).to(h.dtype).view(-1, 1, 1, 1).expand(-1, 1, *h.shape[2:])
