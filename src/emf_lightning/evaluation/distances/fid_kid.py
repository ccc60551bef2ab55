"""FID and KID of generated images against reference images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.evaluation.distances.image_features import ImageFeatures
from emf_lightning.evaluation.distances.reference_images import gaussian, statistics
from emf_lightning.evaluation.distances.reference_metric import FeatureSetMetric, ReferenceMetric, joined


class FrechetDistance(ReferenceMetric):
    """FID (arXiv 1706.08500): Fréchet distance between Gaussians fitted to features.

    Comparable numbers share features, their resize, resolution, reference and number of images. Published protocols:
    CIFAR-10, 50,000 images against its 50,000 training images; CelebA-HQ 256, 50,000 against 30,000 with
    pytorch-fid's resize; COCO, 30,000 against val2014 or 5,000 against val2017, at 256 px.

    Args:
        features: the feature network; by default ``RandomFeatures``, which need no download: they tell checkpoints of
            one data set apart, but compare with no published number.
        reference: folder of reference images, or an ``.npz`` with their mean ``mu`` ``[D]`` and covariance ``sigma``;
            a folder's statistics are kept in such a file in ``FOLDER-statistics`` beside it. By default, in a run, the
            validation samples of its data at the training resolution.
        resolution: side in pixels of the square that reference and generated images are cropped and resized to.
        count: number of generated images in the protocol.

    Raises:
        ValueError: for a missing reference, or statistics of other features or another resolution.
    """

    name, title = "fid", "FID"
    total: Tensor
    products: Tensor
    images: Tensor

    def __init__(
        self,
        features: ImageFeatures | None = None,
        reference: Path | None = None,
        resolution: int | None = None,
        count: int | None = None,
    ) -> None:
        super().__init__(features, reference, resolution, count)
        width = self._features.width
        self.add_sum("total", width)
        self.add_sum("products", width, width)
        self.add_sum("images", dtype=torch.int64)
        if self.reference is not None and self._images is None:
            self._statistics = statistics(self.reference, self._features, resolution)
        elif self._images is not None and self._images.count < 2:
            raise ValueError(f"FrechetDistance: reference {reference} has one image; give two or more")

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        features = self.features_of(images).double().to(self.total.device)
        self.rows = [{} for _ in images]
        self.total += features.sum(0)
        self.products += features.T @ features
        self.images += len(features)

    def compute(self) -> dict[str, Tensor]:
        if self.images < 2:
            raise ValueError(f"{self.title}: needs two images or more, got {int(self.images)}")
        mu, sigma = gaussian(self.total, self.products, int(self.images))
        reference = self._images.moments(self.device) if self._images else self._statistics
        distance = frechet(mu.cpu(), sigma.cpu(), *reference)
        return {"score": distance.clamp(min=0), "images": self.images.double().cpu()}


class KernelDistance(FeatureSetMetric):
    """KID (arXiv 1801.01401), times 1000: the unbiased squared MMD with a cubic kernel, for a few thousand images.

    Images are sorted by digests of their pixels before subsets are taken, so that the distance depends neither on ranks
    nor on batches. Fewer images than a subset, e.g. those of one seed, are one subset: the estimate stays unbiased, but
    varies more.

    Args:
        features: see ``FrechetDistance``.
        reference: folder of reference images; their features are kept in ``FOLDER-statistics`` beside it. By default
            see ``FrechetDistance``; subsets are then as large as the smaller set of images allows.
        resolution: see ``FrechetDistance``.
        count: see ``FrechetDistance``.
        subsets: random subsets over which KID is averaged; ``spread`` is the standard deviation over them, which papers
            write after ±.
        subset_size: generated images, and reference images, in a subset.

    Raises:
        ValueError: for a missing reference, or one with fewer images than a subset.
    """

    name, title = "kid", "KID x 1000"
    asks_for_each = "KID needs"
    keys: list[Tensor] | Tensor

    def __init__(
        self,
        features: ImageFeatures | None = None,
        reference: Path | None = None,
        resolution: int | None = None,
        count: int | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
    ) -> None:
        super().__init__(features, reference, resolution, count)
        for argument, value, lowest in (("subsets", subsets, 1), ("subset_size", subset_size, 2)):
            if value < lowest:
                raise ValueError(f"KernelDistance: {argument} must be at least {lowest}, got {value}")
        self.subsets, self.subset_size = subsets, subset_size
        if self._images is not None and self._images.count < subset_size:
            raise ValueError(
                f"KernelDistance: reference {reference} has {self._images.count} images, fewer than subset_size="
                f"{subset_size}; give more images or a smaller subset_size"
            )
        self.add_list("keys", dtype=torch.int64)

    def check_count(self, images: int) -> None:
        if self.reference is not None and images < self.subset_size:
            raise ValueError(
                f"{self.title}: {images} images, fewer than subset_size={self.subset_size}; generate more, or set "
                "a smaller subset_size"
            )
        super().check_count(images)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"subsets": self.subsets, "subset_size": self.subset_size}

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        assert isinstance(self.keys, list)
        super().update(images, prompts)
        digests = [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest() for image in images]
        keys = [int.from_bytes(digest, "big", signed=True) for digest in digests]
        self.keys.append(torch.tensor(keys, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        features, keys = joined(self.features), joined(self.keys)
        if len(features) < 2:
            raise ValueError(f"{self.title}: needs two images or more, got {len(features)}")
        assert self._images is not None
        generated, real = features[keys.argsort()], self._images.feature_matrix(self.device)
        size = min(self.subset_size, len(generated), len(real))
        distances = kernel_distances(real, generated, self.subsets, size)
        whole = size in (len(generated), len(real))  # subsets of a whole set do not show how much it would vary
        return {"score": distances.mean(), "spread": distances.std(unbiased=False) * (torch.nan if whole else 1)}


def kernel_distances(real: Tensor, generated: Tensor, subsets: int, subset_size: int) -> Tensor:
    """KID x 1000 of random subsets of two sets of features ``[N, D]`` and ``[M, D]``, ``[subsets]``, fp64."""
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(0)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size]].double()

    return 1000 * torch.stack([poly_mmd(subset(real), subset(generated)) for _ in range(subsets)])


def frechet(mu: Tensor, sigma: Tensor, other_mu: Tensor, other_sigma: Tensor) -> Tensor:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) of two Gaussians, ``[D]`` and ``[D, D]``, in fp64."""
    roots = torch.linalg.eigvals(sigma @ other_sigma).sqrt().real.sum()
    return (mu - other_mu).square().sum() + sigma.trace() + other_sigma.trace() - 2 * roots
