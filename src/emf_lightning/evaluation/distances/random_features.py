"""Features of a convolutional network with fixed random weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from emf_lightning.evaluation.distances.image_features import ImageFeatures, batches_by_size


class RandomFeatures(ImageFeatures):
    """Channel means and standard deviations of three convolutions with fixed random weights.

    For worlds without a published feature network. Images of different distributions may have the same random
    features; distances compare with others of the same ``width``, ``seed`` and ``side`` alone.

    Args:
        width: D, even and at least 8.
        seed: of the weights.
        side: pixels of the square that images are resized to; by default they keep their size.

    Raises:
        ValueError: for another width.
    """

    name = "random"

    def __init__(self, width: int = 448, seed: int = 0, side: int | None = None) -> None:
        if width < 8 or width % 2:
            raise ValueError(f"RandomFeatures: width must be even and at least 8, got {width}")
        self.width, self.side = width, side
        self.resize = "none" if side is None else f"bilinear to {side} px"
        first = max(width // 14, 1)  # layers as wide as 1 : 2 : 4
        self.network = _RandomConvolutions((first, 2 * first, width // 2 - 3 * first), seed)

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        features = []
        for batch in batches_by_size(images):
            pixels = batch.float() / 127.5 - 1
            if self.side is not None:
                pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear")
            features.append(self.network(pixels))
        return torch.cat(features)


class _RandomConvolutions(nn.Module):
    def __init__(self, widths: Sequence[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        channels = 3
        for number, width in enumerate(widths):
            weight = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            self.register_buffer(f"weight{number}", weight)
            channels = width

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for number, weight in enumerate(self.buffers()):
            x = F.leaky_relu(F.conv2d(x, weight, stride=1 if number == 0 else 2), 0.2)
            parts += [x.mean((2, 3)), x.std((2, 3))]
        return torch.cat(parts, dim=1)
