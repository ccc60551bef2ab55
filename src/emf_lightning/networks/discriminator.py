"""Networks that tell data from what was drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emf_lightning.networks.base import FlowMapNetwork


class Discriminator(nn.Module, ABC):
    """A network that gives data positive logits and what was drawn negative ones."""

    @abstractmethod
    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B]``, unbounded.

        Args:
            z: ``[B, C, H, W]``, latents, noised up to ``t``.
            t: ``[B]``, fp32, 0 where nothing was noised.
            context: ``[B, L, D]``, token features of the captions.
            mask: ``[B, L]``, bool, True where there is a token.
        """


DiscriminatorCallable = Callable[[FlowMapNetwork], Discriminator]
"""A discriminator that is yet to be told which network draws."""


class ConvDiscriminator(Discriminator):
    """Residual convolutions, halving the side down to 4 or so, and the caption by projection (arXiv 1802.05637).

    What StyleGAN2's discriminator (arXiv 1912.04958) is without its filtered resampling: its residual blocks, leaky
    units, statistics over the batch's groups, and no normalisation, which R1 does without.

    Args:
        net: what draws: says the latents' and the text features' shapes.
        width: channels at full side; doubled at every halving up to ``most``.
        most: channels at most.
        captioned: whether captions are looked at.
        group: rows that share a statistic, which shows the judge that they are all alike.
    """

    def __init__(
        self, net: FlowMapNetwork, width: int = 32, most: int = 256, captioned: bool = True, group: int = 4
    ) -> None:
        super().__init__()
        if width < 1 or most < width:
            raise ValueError(f"ConvDiscriminator: needs 1 <= width <= most, got width={width}, most={most}")
        if group < 1:
            raise ValueError(f"ConvDiscriminator: group must be at least 1, got {group}")
        self.group = group
        self.stem = nn.Conv2d(net.latent_channels, width, 3, padding=1)
        blocks, side = [], net.latent_size
        while side > 4:
            blocks.append(_Halving(width, min(2 * width, most)))
            width, side = min(2 * width, most), -(-side // 2)
        self.blocks = nn.Sequential(*blocks)
        self.mix = nn.Conv2d(width + 1, width, 3, padding=1)
        self.head = nn.Linear(width * side * side, width)
        self.logit = nn.Linear(width, 1)
        self.caption = nn.Linear(net.context_width, width, bias=False) if captioned else None
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):  # torch's own would let signal and gradient fade by layers
                nn.init.kaiming_normal_(part.weight, a=0.2)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B]``; ``t`` is not looked at."""
        h = self.blocks(self.stem(z))
        h = F.leaky_relu(self.mix(torch.cat([h, _spread(h, self.group)], dim=1)), 0.2)
        h = F.leaky_relu(self.head(h.flatten(1)), 0.2)
        logits: Tensor = self.logit(h)[:, 0]
        if self.caption is not None:
            tokens = context.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            logits = logits + (h * self.caption(tokens.to(h.dtype))).sum(1) / h.shape[1] ** 0.5
        return logits


class _Halving(nn.Module):
    """A residual block that halves the side, rounding up."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        kept = self.skip(_halved(h))
        h = F.leaky_relu(self.first(F.leaky_relu(h, 0.2)), 0.2)
        return (kept + _halved(self.second(h))) * 0.5**0.5


def _halved(h: Tensor) -> Tensor:
    return F.avg_pool2d(h, 2, ceil_mode=True)


def _spread(h: Tensor, group: int) -> Tensor:
    """``[B, 1, H, W]``, the mean standard deviation within each group of rows (arXiv 1710.10196, section 3)."""
    rows = [part.float() for part in torch.split(h, group)]
    spreads = [(part.var(0, correction=0) + 1e-8).sqrt().mean().expand(len(part)) for part in rows]
    return torch.cat(spreads).to(h.dtype).view(-1, 1, 1, 1).expand(-1, 1, *h.shape[2:])
