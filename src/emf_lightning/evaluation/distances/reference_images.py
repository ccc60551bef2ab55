"""Features of FID's and KID's reference images: computed on demand by all ranks together, and kept in a file."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.pixels import ImageLimits
from emf_lightning.evaluation.distances.image_features import ImageFeatures
from emf_lightning.evaluation.folders.image_files import image_files, usable_pixels
from emf_lightning.files import remove_partial, replacing
from emf_lightning.text.fingerprint import fingerprint

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

BATCH = 64
"""Images in one batch of features."""
PIXELS = "displayed"
"""Distinguishes kept features from those of versions that did not apply transparency and the range of 16 bits."""


class KeptFeatures(ABC):
    """Base of reference images: their features and moments, in memory and in a file.

    Args:
        caller: begins messages.
        features: the feature network.
        resolution: side in pixels of the squares that images are resized to first; None leaves them as they are.
    """

    def __init__(self, caller: str, features: ImageFeatures, resolution: int | None) -> None:
        self.caller, self.features, self.resolution = caller, features, resolution
        self._arrays: dict[str, Arrays] = {}

    @abstractmethod
    def _path(self, kind: str) -> Path | None:
        """The file of the arrays of one kind; None where they cannot be told from those of other images."""

    def _kept(self, kind: str, compute: Callable[[], Arrays], device: torch.device) -> Arrays:
        """Arrays in memory or in a file; all ranks compute and keep them unless each has them."""
        path = self._path(kind)
        here = kind in self._arrays or (path is not None and path.is_file())
        if all(gathered(torch.tensor([int(here)]), device)):
            if kind not in self._arrays:
                assert path is not None
                with np.load(path) as content:
                    self._arrays[kind] = dict(content)
            return self._arrays[kind]
        arrays = self._arrays[kind] = compute()
        if path is None or (_is_distributed() and dist.get_rank() > 0):
            return arrays
        about = {"features": np.array(self.features.digest), "resolution": np.array(self.resolution or 0)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_partial(path.parent)
            with replacing(path, shared=True) as partial, partial.open("wb") as file:
                np.savez(file, **(arrays | about))  # type: ignore[arg-type]
        except OSError as error:  # the folder may be read-only
            log.info("%s: cannot keep the features in %s (%s)", self.caller, path.parent, error)
        return arrays


class ReferenceImages(KeptFeatures):
    """A folder of images and their features.

    Features and moments are kept in ``FOLDER-statistics`` beside the folder, under a name that depends on the feature
    network, the resolution and the files' names, sizes and times.

    Attributes:
        files: paths of the images, sorted.

    Images that cannot be used are left out with a warning.

    Raises:
        ValueError: for a missing folder, or one without images; messages begin with ``caller``.
    """

    def __init__(self, caller: str, folder: Path, features: ImageFeatures, resolution: int | None) -> None:
        super().__init__(caller, features, resolution)
        self.folder = folder
        self.files = image_files(folder, f"{caller}: reference")

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    def moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean ``[D]`` and covariance ``[D, D]`` of the features, fp64. All ranks must call it, see ``gathered``."""

        def compute() -> Arrays:
            width = self.features.width
            total, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
            masks = [torch.zeros(0, dtype=torch.int64)]
            for batch, usable in self._own_features():
                rows = batch.double()
                total, products = total + rows.sum(0), products + rows.T @ rows
                masks.append(usable)
            sums = [torch.stack(gathered(part, device)).sum(0) for part in (total, products)]
            usable = self._interleaved(gathered(torch.cat(masks), device))
            if (count := int(usable.sum())) < 2:
                raise ValueError(f"{self.caller}: {count} of the reference's images can be used; give two or more")
            mu, sigma = gaussian(sums[0], sums[1], count)
            return {"mu": mu.numpy(), "sigma": sigma.numpy(), "usable": usable.numpy()}

        moments = self._kept("moments", compute, device)
        self._warn(moments)
        return torch.from_numpy(moments["mu"]), torch.from_numpy(moments["sigma"])

    def feature_matrix(self, device: torch.device) -> Tensor:
        """Features ``[N, D]`` in the order of ``files``. All ranks must call it, see ``gathered``."""

        def compute() -> Arrays:
            batches, masks = [torch.zeros(0, self.features.width)], [torch.zeros(0, dtype=torch.int64)]
            for batch, usable in self._own_features():
                batches.append(batch)
                masks.append(usable)
            every = gathered(torch.cat(masks), device)
            rows = torch.zeros(len(self.files), self.features.width)
            for rank, part in enumerate(gathered(torch.cat(batches), device)):
                rows[rank :: len(every)][every[rank] > 0] = part
            usable = self._interleaved(every)
            return {"rows": rows[usable > 0].numpy(), "usable": usable.numpy()}

        features = self._kept("features", compute, device)
        self._warn(features)
        return torch.from_numpy(features["rows"])

    def _own_features(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this rank's share: features of the usable images, and 1 for each of them, 0 for others."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
        files = self.files[rank::ranks]
        for first in range(0, len(files), BATCH):
            images = [usable_pixels(file, ImageLimits()) for file in files[first : first + BATCH]]
            read = [resize(image, self.resolution) for image in images if not isinstance(image, str)]
            features = self.features(read) if read else torch.zeros(0, self.features.width)
            yield features, torch.tensor([int(not isinstance(image, str)) for image in images])

    def _interleaved(self, parts: list[Tensor]) -> Tensor:
        """Numbers of all ranks' images in the order of ``files``."""
        whole = torch.zeros(len(self.files), dtype=torch.int64)
        for rank, part in enumerate(parts):
            whole[rank :: len(parts)] = part
        return whole

    def _warn(self, arrays: Arrays) -> None:
        """Names the images that are left out of ``arrays``."""
        if out := [file for file, usable in zip(self.files, arrays["usable"], strict=True) if not usable]:
            warnings.warn(
                f"{self.caller}: reference: {len(out):,} of {len(self.files):,} images are left out, {out[0]} first "
                f"({usable_pixels(out[0], ImageLimits())})",
                stacklevel=3,
            )

    @cached_property
    def _key(self) -> str:
        stats = [(str(path.relative_to(self.folder)), path.stat()) for path in self.files]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        resolution = None if self.resolution is None else str(SquareTransform(self.resolution))
        return fingerprint(features=self.features.digest, resolution=resolution, files=files, pixels=PIXELS)[:16]

    def _path(self, kind: str) -> Path:
        folder = self.folder.resolve()
        return folder.with_name(f"{folder.name}-statistics") / f"{kind}-{self._key}.npz"


def statistics(path: Path, features: ImageFeatures, resolution: int | None) -> tuple[Tensor, Tensor]:
    """Mean ``mu`` ``[D]`` and covariance ``sigma`` ``[D, D]`` from an ``.npz``.

    Raises:
        ValueError: for another file, or statistics of other features or another resolution, if the file names them;
            those of pytorch-fid and others do not.
    """
    try:
        with np.load(path) as content:
            mu, sigma = (torch.from_numpy(np.asarray(content[name], np.float64)) for name in ("mu", "sigma"))
            about = {name: content[name].item() for name in ("features", "resolution") if name in content}
    except OSError as error:
        remedy = "give a folder of images or an .npz"
        raise ValueError(f"FrechetDistance: cannot read reference {path}; {remedy}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"FrechetDistance: {path} holds no mu and sigma ({error})") from error
    width = features.width
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise ValueError(
            f"FrechetDistance: the statistics in {path} are of {mu.shape[0]} features, the images have {width}"
        )
    for name, value in {"features": features.digest, "resolution": resolution or 0}.items():
        if about.get(name, value) != value:
            raise ValueError(
                f"FrechetDistance: the statistics in {path} are of {name} {about[name]}, the images would be of "
                f"{value}: the two do not compare; give those of the same weights, resize and resolution"
            )
    return mu, sigma


def gaussian(total: Tensor, products: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and unbiased covariance ``[D, D]`` from the sum and the summed outer products of features."""
    mean = total / images
    return mean, (products - images * torch.outer(mean, mean)) / (images - 1)


def resize(image: NDArray[np.uint8], resolution: int | None) -> NDArray[np.uint8]:
    """The centre square of ``image`` at ``resolution``, bicubic with antialiasing; unchanged if it has that size."""
    if resolution is None or image.shape[:2] == (resolution, resolution):
        return image
    return SquareTransform(resolution)(image)


def gathered(part: Tensor, device: torch.device) -> list[Tensor]:
    """``part`` of every rank, on the CPU; ranks communicate on ``device``."""
    return [tensor.cpu() for tensor in gather_all_tensors(part.to(device))] if _is_distributed() else [part]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
