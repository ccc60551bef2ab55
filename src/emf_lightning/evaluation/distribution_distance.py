"""How far the distribution of drawn images is from that of reference images: FID and KID."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.evaluation.image_features import ImageFeatures
from emf_lightning.evaluation.image_folder import image_files, read_image
from emf_lightning.evaluation.image_metric import ImageMetric

BATCH = 64
"""Reference images described at once."""


class _Distance(ImageMetric):
    """What FID and KID share: features, reference images, and how many images the protocol wants."""

    higher_is_better = False
    needs_prompts = False

    def __init__(self, features: ImageFeatures, reference: Path, resolution: int | None, count: int | None) -> None:
        super().__init__()
        self._features = features
        self.reference = Path(reference)
        self.resolution = resolution
        self.count = count

    def check_count(self, images: int) -> None:
        """Raises a ``ValueError`` where the protocol wants another number of images: FID depends on it."""
        if self.count is not None and images != self.count:
            raise ValueError(
                f"{self.title}: {images:,} images, but count is {self.count:,}; the number of images shifts the "
                "distance: draw as many, or set count to what you have and say so"
            )

    def settings(self) -> dict[str, Any]:
        return {
            "reference": str(self.reference),
            "features": self._features.digest,
            "resolution": self.resolution,
            "count": self.count,
        }

    def describe(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Features ``[B, D]`` of images, after they were brought to the protocol's resolution."""
        return self._features([resized(image, self.resolution) for image in images])

    def reference_features(self) -> Iterator[Tensor]:
        """Batches of the reference images' features."""
        files = image_files(self.reference, f"{type(self).__name__}: reference")
        for first in range(0, len(files), BATCH):
            yield self.describe([read_image(file) for file in files[first : first + BATCH]])


class FrechetDistance(_Distance):
    """FID (arXiv 1706.08500): Fréchet's distance between Gaussians fitted to features.

    Comparable numbers share features, resolution, reference and the number of images. The published protocols:
    CIFAR-10, 50,000 images against its 50,000 training images; CelebA-HQ 256, 50,000 against 30,000; COCO, 30,000
    against val2014 or 5,000 against val2017, at 256 px.

    Args:
        features: of images.
        reference: folder of reference images, or an ``.npz`` with their mean ``mu`` ``[D]`` and covariance ``sigma``.
        resolution: pixels of the square that images of other sizes are cut and scaled to, reference and drawn alike.
        count: images that the protocol wants.

    Raises:
        ValueError: for a reference that is not there or does not fit.
    """

    def __init__(
        self, features: ImageFeatures, reference: Path, resolution: int | None = None, count: int | None = None
    ) -> None:
        super().__init__(features, reference, resolution, count)
        self.name = f"fid_{features.name}" if features.name else "fid"
        self.title = f"FID ({features.name} features)" if features.name else "FID"
        width = features.width
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._mu, self._sigma = self._reference()

    total: Tensor
    products: Tensor
    images: Tensor

    def _reference(self) -> tuple[Tensor, Tensor]:
        if self.reference.suffix == ".npz":
            return _statistics(self.reference, self._features.width)
        width, images = self._features.width, 0
        total, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for batch in self.reference_features():
            rows = batch.double()
            total, products, images = total + rows.sum(0), products + rows.T @ rows, images + len(rows)
        return gaussian(total, products, images)

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        rows = self.describe(images).double().to(self.total.device)
        self.rows = [{} for _ in images]
        self.total += rows.sum(0)
        self.products += rows.T @ rows
        self.images += len(rows)

    def compute(self) -> dict[str, Tensor]:
        if self.images < 2:
            raise ValueError(f"{self.title}: needs two images or more, got {int(self.images)}")
        mu, sigma = gaussian(self.total, self.products, int(self.images))
        distance = frechet(mu.cpu(), sigma.cpu(), self._mu, self._sigma)
        return {"score": distance.clamp(min=0), "images": self.images.double().cpu()}


class KernelDistance(_Distance):
    """KID (arXiv 1801.01401), times 1000: the unbiased squared MMD with a cubic kernel, for a few thousand images.

    Args:
        features: of images.
        reference: folder of reference images.
        resolution: see ``FrechetDistance``.
        count: see ``FrechetDistance``.
        subsets: random subsets whose mean it is; ``spread`` is their standard deviation, which papers write behind ±.
        subset_size: images in one of them, of either side.

    Raises:
        ValueError: for a reference that is not there or smaller than a subset.
    """

    def __init__(
        self,
        features: ImageFeatures,
        reference: Path,
        resolution: int | None = None,
        count: int | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
    ) -> None:
        super().__init__(features, reference, resolution, count)
        self.name = f"kid_{features.name}" if features.name else "kid"
        self.title = f"KID x 1000 ({features.name} features)" if features.name else "KID x 1000"
        self.subsets, self.subset_size = subsets, subset_size
        self._real = torch.cat(list(self.reference_features()))
        if len(self._real) < subset_size:
            raise ValueError(
                f"KernelDistance: reference {reference} has {len(self._real)} images, fewer than subset_size="
                f"{subset_size}; give more images or a smaller subset_size"
            )
        self.add_state("features", [], dist_reduce_fx="cat")

    features: list[Tensor] | Tensor

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        assert isinstance(self.features, list)
        self.features.append(self.describe(images).to(self.device))
        self.rows = [{} for _ in images]

    def compute(self) -> dict[str, Tensor]:
        drawn = torch.cat(self.features) if isinstance(self.features, list) else self.features
        if len(drawn) < self.subset_size:
            raise ValueError(
                f"{self.title}: {len(drawn)} images, fewer than subset_size={self.subset_size}; draw more, or set a "
                "smaller subset_size"
            )
        from torchmetrics.image.kid import poly_mmd

        generator = torch.Generator().manual_seed(0)

        def subset(rows: Tensor) -> Tensor:
            return rows[torch.randperm(len(rows), generator=generator)[: self.subset_size]].double()

        distances = [poly_mmd(subset(self._real), subset(drawn.cpu())) for _ in range(self.subsets)]
        values = 1000 * torch.stack(distances)
        return {"score": values.mean(), "spread": values.std(unbiased=False)}


def frechet(mu: Tensor, sigma: Tensor, other_mu: Tensor, other_sigma: Tensor) -> Tensor:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) of two Gaussians, ``[D]`` and ``[D, D]``, in fp64."""
    roots = torch.linalg.eigvals(sigma @ other_sigma).sqrt().real.sum()
    return (mu - other_mu).square().sum() + sigma.trace() + other_sigma.trace() - 2 * roots


def gaussian(total: Tensor, products: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and unbiased covariance ``[D, D]`` of features, from their sum and their summed outer products."""
    mean = total / images
    return mean, (products - images * torch.outer(mean, mean)) / (images - 1)


def resized(image: NDArray[np.uint8], resolution: int | None) -> NDArray[np.uint8]:
    """The centre square of ``image`` at ``resolution``, bicubic with antialiasing; untouched where it has that size."""
    if resolution is None or image.shape[:2] == (resolution, resolution):
        return image
    from PIL import Image

    from emf_lightning.data.decoding import SquareTransform

    return SquareTransform(resolution)(Image.fromarray(image))


def _statistics(path: Path, width: int) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path) as content:
            mu, sigma = (torch.from_numpy(np.asarray(content[name], np.float64)) for name in ("mu", "sigma"))
    except OSError as error:
        raise ValueError(
            f"FrechetDistance: cannot read reference {path}; give a folder of images or an .npz"
        ) from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"FrechetDistance: {path} holds no mu and sigma ({error})") from error
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise ValueError(
            f"FrechetDistance: the statistics in {path} are of {mu.shape[0]} features, the images have {width}"
        )
    return mu, sigma
