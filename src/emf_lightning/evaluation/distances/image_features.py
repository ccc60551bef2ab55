"""Image features for FID and KID."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emf_lightning.evaluation.devices import device_of
from emf_lightning.text.fingerprint import fingerprint, weights_digest


class ImageFeatures(ABC):
    """Base class of frozen networks that map images to features.

    Attributes:
        name: part of the name of a distance between its features; empty for the Inception network of the papers.
        width: D.
        resize: method that resizes images to the network's input; distances depend on it.
    """

    name: str
    width: int
    resize: str
    network: nn.Module

    @cached_property
    def digest(self) -> str:
        """Digest of weights and resizing; distances of another digest are not comparable."""
        return fingerprint(weights=weights_digest(self.network), resize=self.resize)[:12]

    @abstractmethod
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Features ``[B, D]``, fp32, on the CPU, of images ``[H, W, 3]``, 8-bit RGB, of any sizes."""


class InceptionFeatures(ImageFeatures):
    """The 2048 pooled features of FID's Inception network, in torch-fidelity's port.

    Args:
        weights: path of ``weights-inception-2015-12-05-6726825d.pth``; by default torch-fidelity downloads it.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        resize: bilinear resizing to 299 px. "tensorflow" is that of the original network, which does not centre
            pixels; published CIFAR-10 numbers use it. "pytorch" is that of pytorch-fid, for statistics made with it.

    Raises:
        ValueError: for missing or malformed weights.
    """

    name = ""
    width = 2048

    def __init__(
        self,
        weights: Path | None = None,
        device: str | None = None,
        resize: Literal["tensorflow", "pytorch"] = "tensorflow",
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = "weights-inception-2015-12-05-6726825d.pth"
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"InceptionFeatures: no file {weights}; give {file} of torch-fidelity's releases")
        path = None if weights is None else str(weights)
        try:
            network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
            )
        except Exception as error:  # many types: no network, other weights
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"InceptionFeatures: cannot load weights={path!r} ({reason}); give the path of {file}"
            ) from error
        self.device = device_of(device)
        self.resize = resize
        self.network = network.to(self.device).eval().requires_grad_(False)
        # the network's forward resizes as TensorFlow did; its blocks before the classifier are a plain sequence
        self._blocks = nn.Sequential(*list(network.children())[:-1])

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            batches = (batch.to(self.device) for batch in _batches_by_size(images))
            return torch.cat([self._features(batch).float().cpu() for batch in batches])

    def _features(self, batch: Tensor) -> Tensor:
        if self.resize == "tensorflow":
            return self.network(batch)[0]  # type: ignore[no-any-return]
        pixels = nn.functional.interpolate(batch / 255, (299, 299), mode="bilinear", align_corners=False)
        return self._blocks(2 * pixels - 1).flatten(1)  # type: ignore[no-any-return]


class RandomFeatures(ImageFeatures):
    """Channel means and standard deviations of three convolutions with fixed random weights.

    For worlds without a published feature network. Images of different distributions may have the same random
    features; distances compare with others of the same ``width`` and ``seed`` alone. Images are not resized.

    Args:
        width: D, even and at least 8.
        seed: of the weights.

    Raises:
        ValueError: for another width.
    """

    name = "random"
    resize = "none"

    def __init__(self, width: int = 448, seed: int = 0) -> None:
        if width < 8 or width % 2:
            raise ValueError(f"RandomFeatures: width must be even and at least 8, got {width}")
        self.width = width
        first = max(width // 14, 1)  # layers as wide as 1 : 2 : 4
        self.network = _RandomConvolutions((first, 2 * first, width // 2 - 3 * first), seed)

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # reference images are described outside the trainer's precision
            return torch.cat([self.network(batch.float() / 127.5 - 1) for batch in _batches_by_size(images)])


class _RandomConvolutions(nn.Module):
    def __init__(self, widths: Sequence[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for number, (channels, width) in enumerate(pairwise((3, *widths))):
            weight = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            self.register_buffer(f"weight{number}", weight)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for number, weight in enumerate(self.buffers()):
            x = nn.functional.conv2d(x, weight, stride=1 if number == 0 else 2)
            x = nn.functional.leaky_relu(x, 0.2)
            parts += [x.mean((2, 3)), x.std((2, 3))]
        return torch.cat(parts, dim=1)


def _batches_by_size(images: Sequence[NDArray[np.uint8]]) -> list[Tensor]:
    """Batches ``[B, 3, H, W]``, 8-bit, of consecutive images of one size."""
    batches = groupby(images, key=lambda image: image.shape)
    return [torch.from_numpy(np.stack(list(batch))).permute(0, 3, 1, 2) for _, batch in batches]
