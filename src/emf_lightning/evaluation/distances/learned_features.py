"""Features of DINOv2 and CLIP, for FD-DINOv2, CMMD and diversity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.reading.decoding import stretch_to_square
from emf_lightning.evaluation.clip_hps.clip_model import load_clip
from emf_lightning.evaluation.devices import device_of
from emf_lightning.evaluation.distances.image_features import ImageFeatures
from emf_lightning.pretrained.loading import load_pretrained

SIDE = 224
"""Pixels of DINOv2's input."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels."""
SIZES = {384: "dinov2-small", 768: "dinov2-base", 1024: "dinov2", 1536: "dinov2-giant"}
"""Width -> name; the large one is that of FD-DINOv2."""


class Dinov2Features(ImageFeatures):
    """The class token of DINOv2 (arXiv 2304.07193) after the last normalisation, in transformers' port, fp32.

    Images are resized to 224 x 224 px as a whole, by PIL's antialiased bicubic filter, as in FD-DINOv2's own code
    (arXiv 2306.04675). The agreement of the port's position embeddings at that size with torch.hub's is not verified.

    Args:
        model: hub name or local folder in transformers' format; FD-DINOv2's is the large one, without registers.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.

    Raises:
        ValueError: if the model cannot be loaded, or its weights are incomplete or of another architecture.
    """

    resize = "bicubic, antialiased, whole image"

    def __init__(self, model: str = "facebook/dinov2-large", device: str | None = None) -> None:
        from transformers import Dinov2Model

        loaded = load_pretrained(
            "Dinov2Features", Dinov2Model, model, frozen=True, dtype="float32", argument="model", unused=("mask_token",)
        )
        self.device = device_of(device)
        self.network = loaded.to(self.device)
        self.width = loaded.config.hidden_size
        self.name = SIZES.get(self.width, f"dinov2-{self.width}")

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        squares = np.stack([stretch_to_square(image, SIDE) for image in images])
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in IMAGENET)
        pixels = (torch.from_numpy(squares).permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.autocast(self.device.type, enabled=False):
            return self.network(pixel_values=pixels.to(self.device)).pooler_output.float().cpu()


class ClipFeatures(ImageFeatures):
    """OpenCLIP's image embedding, of unit length: the centre square, resized by PIL's bicubic filter.

    Args:
        model: OpenCLIP's name of the architecture; CMMD's is OpenAI's ViT-L/14 at 336 px.
        pretrained: path of its weights, or a tag of OpenCLIP's.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        quick_gelu: see ``ClipColours``.

    Raises:
        ValueError: if the model cannot be loaded.
    """

    resize = "bicubic, antialiased, centre square"

    def __init__(
        self,
        model: str = "ViT-L-14-336-quickgelu",
        pretrained: str = "openai",
        device: str | None = None,
        quick_gelu: bool = False,
    ) -> None:
        self._clip = load_clip("ClipFeatures", model, pretrained, quick_gelu, device)
        self.network = self._clip.model
        self.width = int(self._clip.model.visual.output_dim)
        self.name = "clip" if model.startswith("ViT-L-14-336") else f"clip-{model}"

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        from PIL import Image

        pixels = torch.stack([self._clip.transform(Image.fromarray(image)) for image in images])
        return self._clip.image_features(pixels).float().cpu()
