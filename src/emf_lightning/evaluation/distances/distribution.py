"""How far drawn pictures are from real ones as a distribution, and how different those of one prompt are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


class RandomFeatures(nn.Module):
    """448 features of small pictures: channel means and spreads of three convolutions with random, fixed weights.

    For worlds on which nothing was trained, and that have no published feature network: what such features call equal
    may still differ, what they call different is. Numbers compare with others of the same class and seed alone.

    Args:
        seed: of the weights.
    """

    WIDTHS = (32, 64, 128)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_features = 2 * sum(self.WIDTHS)
        channels = 3
        for number, width in enumerate(self.WIDTHS):
            weight = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            self.register_buffer(f"weight{number}", weight)
            channels = width
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, 448]`` of 8-bit images ``[B, 3, H, W]``."""
        h = images.float() / 127.5 - 1
        parts = []
        for number in range(len(self.WIDTHS)):
            h = F.leaky_relu(F.conv2d(h, getattr(self, f"weight{number}"), stride=1 if number == 0 else 2), 0.2)
            parts += [h.mean((2, 3)), h.std((2, 3))]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Distribution:
    """Drawn pictures against real ones of the same prompts.

    Attributes:
        kid: kernel distance (arXiv 1801.01401) between features, times 1000; 0 on average for real pictures.
        kid_error: its standard deviation over subsets, times 1000.
        fid: Frechet distance between features (arXiv 1706.08500); biased upwards by few pictures.
        diversity: mean distance between features of one prompt's pictures, over that of its real ones: 0 where they are
            all the same, 1 where they are as different as real ones.
    """

    kid: float
    kid_error: float
    fid: float
    diversity: float


def distribution(
    drawn: NDArray[np.uint8], real: NDArray[np.uint8], images_per_prompt: int, network: RandomFeatures
) -> Distribution:
    """The distances between two sets of pictures.

    Args:
        drawn: ``[P * images_per_prompt, H, W, 3]``, 8-bit RGB, a prompt's pictures one after another.
        real: likewise, of the same prompts in the same order.
        images_per_prompt: at least 2.
        network: whose features are compared.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    pictures = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (drawn, real)]
    fid = FrechetInceptionDistance(network, input_img_size=(3, *drawn.shape[1:3]))
    kid = KernelInceptionDistance(network, subsets=50, subset_size=min(500, len(drawn) // 2))
    for images, is_real in zip(pictures, (False, True), strict=True):
        fid.update(images, real=is_real)
        kid.update(images, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        mean, deviation = kid.compute()
    spreads = [_spread(network(images), images_per_prompt) for images in pictures]
    return Distribution(1000 * float(mean), 1000 * float(deviation), float(fid.compute()), spreads[0] / spreads[1])


def _spread(features: Tensor, images_per_prompt: int) -> float:
    """The mean distance between two pictures of one prompt."""
    groups = features.view(-1, images_per_prompt, features.shape[1])
    pairs = images_per_prompt * (images_per_prompt - 1)
    return float(torch.cdist(groups, groups).sum((1, 2)).mean() / pairs)
