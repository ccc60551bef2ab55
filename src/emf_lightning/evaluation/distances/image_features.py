"""Features of images whose distributions FID and KID compare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emf_lightning.evaluation.devices import device_of
from emf_lightning.text.fingerprint import fingerprint, weights_digest


class ImageFeatures(ABC):
    """A frozen network that describes images.

    Attributes:
        name: what a distance over its features is called after; empty for the published one.
        width: D.
        resize: how images are brought to the size that the network sees: another way gives other distances.
    """

    name: str
    width: int
    resize: str
    network: nn.Module

    @cached_property
    def digest(self) -> str:
        """Of its weights and resizing: distances over others are not comparable."""
        return fingerprint(weights=weights_digest(self.network), resize=self.resize)[:12]

    @abstractmethod
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """``[B, D]``, fp32, on the CPU, of images ``[H, W, 3]``, 8-bit RGB, of any sizes."""


class InceptionFeatures(ImageFeatures):
    """The 2048 pooled features of the Inception network that FID is defined by, as torch-fidelity ports it.

    Args:
        weights: path of ``weights-inception-2015-12-05-6726825d.pth``; without one torch-fidelity downloads it.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        resize: bilinear resizing to 299 px. "tensorflow" is that of the network's own time, which does not centre
            pixels: what published CIFAR-10 numbers rest on. "pytorch" is pytorch-fid's, for statistics that it made.

    Raises:
        ValueError: where the weights are not there or something else.
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
        except Exception as error:  # of many kinds: no network, other weights
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"InceptionFeatures: cannot load weights={path!r} ({reason}); give the path of {file}"
            ) from error
        self.device = device_of(device)
        self.resize = resize
        self.network = network.to(self.device).eval().requires_grad_(False)
        # the network's forward resizes as TensorFlow did; up to its classifier it is a plain sequence
        self._blocks = nn.Sequential(*list(network.children())[:-1])

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._described(batch.to(self.device)).float().cpu() for batch in _by_size(images)])

    def _described(self, batch: Tensor) -> Tensor:
        if self.resize == "tensorflow":
            return self.network(batch)[0]  # type: ignore[no-any-return]
        pixels = nn.functional.interpolate(batch / 255, (299, 299), mode="bilinear", align_corners=False)
        return self._blocks(2 * pixels - 1).flatten(1)  # type: ignore[no-any-return]


class RandomFeatures(ImageFeatures):
    """A fixed random convolutional network's features: for worlds that no published network knows.

    Random features tell distributions apart, without any claim to do so as people would.

    Args:
        width: D.
        seed: of the weights.
        side: pixels that images are brought to.
    """

    name = "random"

    def __init__(self, width: int = 128, seed: int = 0, side: int = 36) -> None:
        self.width = width
        self.side = side
        self.resize = f"bilinear to {side} px"
        channels = (3, 32, 64, width)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):  # the layers' own first weights are drawn from the global generator
            for into, out in zip(channels, channels[1:], strict=False):
                layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), nn.ReLU()]
        self.network = nn.Sequential(*layers).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.network.parameters():
            if parameter.dim() > 1:
                nn.init.orthogonal_(parameter, 2**0.5, generator=generator)
            else:
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        described = []
        for batch in _by_size(images):
            pixels = nn.functional.interpolate(batch / 127.5 - 1, (self.side, self.side), mode="bilinear")
            states = self.network(pixels)
            described.append(states.mean((2, 3)) + states.amax((2, 3)))
        return torch.cat(described)


def _by_size(images: Sequence[NDArray[np.uint8]]) -> list[Tensor]:
    """Batches ``[B, 3, H, W]``, 8-bit, of neighbours of one size."""
    batches: list[list[NDArray[np.uint8]]] = []
    for image in images:
        if not batches or batches[-1][0].shape != image.shape:
            batches.append([])
        batches[-1].append(image)
    return [torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) for batch in batches]
