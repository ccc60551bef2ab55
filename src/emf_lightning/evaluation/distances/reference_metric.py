"""Base of the scores that compare features of generated images with those of reference images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.evaluation.distances.image_features import ImageFeatures, RandomFeatures
from emf_lightning.evaluation.distances.reference_images import ReferenceImages, resize
from emf_lightning.evaluation.distances.validation_images import ValidationImages
from emf_lightning.evaluation.image_metric import ImageMetric


class ReferenceMetric(ImageMetric):
    """Base of FID, KID and others. The reference's features are computed for the first score; fresh copies share them.

    Attributes:
        own_features: name of the features that are no part of the score's name: those of its paper.
    """

    higher_is_better = False
    needs_prompts = False
    own_features = "inception"

    def __init__(
        self, features: ImageFeatures | None, reference: Path | None, resolution: int | None, count: int | None
    ) -> None:
        super().__init__()
        for argument, value in {"resolution": resolution, "count": count}.items():
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}: {argument} must be at least 1, got {value}")
        self._features = features = features or RandomFeatures()
        self.name, self.title = named_by_features(self, features, self.own_features)
        self.reference = None if reference is None else Path(reference)
        self.resolution = resolution
        self.count = count
        # None if statistics come from a file, or before the run's data are known
        self._images: ReferenceImages | ValidationImages | None = None
        if self.reference is not None and self.reference.suffix != ".npz":
            self._images = ReferenceImages(type(self).__name__, self.reference, features, resolution)

    def use_data(self, data: CaptionImageData) -> None:
        if self.reference is None and (not isinstance(self._images, ValidationImages) or self._images.data is not data):
            self._images = ValidationImages(type(self).__name__, data, self._features, self.resolution)

    def check_count(self, images: int) -> None:
        """Raises a ``ValueError`` for another number of images than the protocol's, and without a reference."""
        if self.reference is None and self._images is None:
            raise ValueError(
                f"{type(self).__name__}: reference is not set; give a folder of real images (only in a run, the "
                "validation samples stand for it)"
            )
        if self.count is not None and images != self.count:
            raise ValueError(
                f"{self.title}: {images:,} images, but count is {self.count:,}; the number of images shifts the "
                "distance: generate as many, or set count to your number and report it"
            )

    def settings(self) -> dict[str, Any]:
        return {
            "reference": "validation samples" if self.reference is None else str(self.reference),
            "reference_images": self._images.count if self._images else None,
            "features": self._features.digest,
            "resize": self._features.resize,
            "resolution": self.resolution,
            "count": self.count,
        }

    def features_of(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Features ``[B, D]`` of images, resized to the protocol's resolution first."""
        return self._features([resize(image, self.resolution) for image in images])


class FeatureSetMetric(ReferenceMetric):
    """Base of the scores that need the features of each image, generated and reference, and not their moments alone.

    Attributes:
        asks_for_each: what needs each reference image, with its verb, for the error about a file of statistics.
    """

    asks_for_each: str
    features: list[Tensor] | Tensor

    def __init__(
        self, features: ImageFeatures | None, reference: Path | None, resolution: int | None, count: int | None
    ) -> None:
        super().__init__(features, reference, resolution, count)
        if self.reference is not None and self._images is None:
            raise ValueError(
                f"{type(self).__name__}: reference {reference} must be a folder of images: {self.asks_for_each} each "
                "of them"
            )
        self.add_list("features", self._features.width, dtype=torch.float32)

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        assert isinstance(self.features, list)
        self.features.append(self.features_of(images).to(self.device))
        self.rows = [{} for _ in images]


def named_by_features(metric: ImageMetric, features: ImageFeatures, own: str = "") -> tuple[str, str]:
    """Name and title of ``metric`` with the name of its features, unless they are its ``own``."""
    kind = features.name or "inception"
    return (
        (metric.name, metric.title) if kind == own else (f"{metric.name}_{kind}", f"{metric.title} ({kind} features)")
    )


def joined(state: list[Tensor] | Tensor) -> Tensor:
    """A state that is concatenated over batches and ranks, on the CPU; a list before the ranks' parts are joined."""
    return (torch.cat(list(state)) if isinstance(state, list) else state).cpu()
