"""FD-DINOv2 and CMMD of generated images against reference images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.evaluation.distances.fid_kid import FrechetDistance
from emf_lightning.evaluation.distances.image_features import ImageFeatures
from emf_lightning.evaluation.distances.learned_features import ClipFeatures, Dinov2Features
from emf_lightning.evaluation.distances.reference_metric import FeatureSetMetric, joined

SIGMA = 10.0
"""Width of CMMD's Gaussian kernel."""
ROWS = 1024
"""Rows of the kernel in memory at once."""


class FdDinov2(FrechetDistance):
    """FD-DINOv2 (arXiv 2306.04675): the Fréchet distance between features of DINOv2's ViT-L/14.

    Published numbers take 50,000 images against the training set. Numbers of other counts do not compare: below 1,024
    images the covariances are singular, and the distance is far too large.

    Args:
        features: by default ``Dinov2Features``; those of a smaller model become part of the name.
        reference: see ``FrechetDistance``.
        resolution: see ``FrechetDistance``.
        count: see ``FrechetDistance``.

    Raises:
        ValueError: as ``FrechetDistance`` does, and if DINOv2 cannot be loaded.
    """

    name, title = "fd_dinov2", "FD-DINOv2"
    own_features = "dinov2"

    def __init__(
        self,
        features: ImageFeatures | None = None,
        reference: Path | None = None,
        resolution: int | None = None,
        count: int | None = None,
    ) -> None:
        super().__init__(features or Dinov2Features(), reference, resolution, count)


class Cmmd(FeatureSetMetric):
    """CMMD (arXiv 2401.09603): 1000 times the squared MMD of CLIP embeddings with a Gaussian kernel of width 10.

    As in the published code, the estimate keeps the kernel's diagonal: it is not negative, and for n and m images of
    one distribution about 10 (1 - mean cosine) (1/n + 1/m). On unit vectors it is nearly 10 times the squared shift of
    the mean: it sees quality, not lost diversity. Published numbers take 30,000 images.

    Args:
        features: by default ``ClipFeatures``, those of the paper; others become part of the name.
        reference: folder of reference images; by default, in a run, the validation samples of its data.
        resolution: see ``FrechetDistance``.
        count: see ``FrechetDistance``.

    Raises:
        ValueError: for a missing reference, and if CLIP cannot be loaded.
    """

    name, title = "cmmd", "CMMD"
    own_features = "clip"
    asks_for_each = "CMMD needs"

    def __init__(
        self,
        features: ImageFeatures | None = None,
        reference: Path | None = None,
        resolution: int | None = None,
        count: int | None = None,
    ) -> None:
        super().__init__(features or ClipFeatures(), reference, resolution, count)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"sigma": SIGMA}

    def compute(self) -> dict[str, Tensor]:
        assert self._images is not None
        sets = joined(self.features), self._images.feature_matrix(self.device)
        # of fp32 features the difference would be off by as much as a good model's distance
        ours, theirs = (nn.functional.normalize(features.double(), dim=1) for features in sets)
        return {"score": 1000 * (kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs))}


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """Mean Gaussian kernel between unit vectors ``[N, D]`` and ``[M, D]``."""
    sums = [torch.exp((rows @ y.T - 1) / SIGMA**2).sum() for rows in torch.split(x, ROWS)]  # |a - b|^2 = 2 - 2 ab
    return torch.stack(sums).sum() / (len(x) * len(y))
