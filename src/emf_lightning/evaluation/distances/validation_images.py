"""The validation samples of a run's data as FID's and KID's reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.picture_folders import PictureFolders
from emf_lightning.evaluation.distances.image_features import ImageFeatures
from emf_lightning.evaluation.distances.reference_images import BATCH, Arrays, KeptFeatures, gaussian, resize
from emf_lightning.text.fingerprint import fingerprint


class ValidationImages(KeptFeatures):
    """The images of a run's validation samples, as the training sees them: same reader, crop and resolution.

    Every rank reads all of them, one batch after another. Features and moments of files on this machine are kept in
    ``FOLDER-statistics`` beside the folder of the pictures, or of the first shard.

    Raises:
        ValueError: for data without ``validation_shards``.
    """

    def __init__(self, caller: str, data: CaptionImageData, features: ImageFeatures, resolution: int | None) -> None:
        super().__init__(caller, features, resolution)
        if not data.validates:
            raise ValueError(
                f"{caller}: reference is not set, and the data have no validation_shards to stand for it; give either"
            )
        self.data = data

    @property
    def count(self) -> int:
        """The largest number of images that are read."""
        return self.data.validation_samples

    def moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean ``[D]`` and covariance ``[D, D]`` of the features, fp64. All ranks must call it."""

        def compute() -> Arrays:
            width, count = self.features.width, 0
            total, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
            for features in self._batches():
                rows = features.double()
                total, products, count = total + rows.sum(0), products + rows.T @ rows, count + len(rows)
            self._check(count)
            mu, sigma = gaussian(total, products, count)
            return {"mu": mu.numpy(), "sigma": sigma.numpy()}

        moments = self._kept("moments", compute, device)
        return torch.from_numpy(moments["mu"]), torch.from_numpy(moments["sigma"])

    def feature_matrix(self, device: torch.device) -> Tensor:
        """Features ``[N, D]`` in the order of the samples. All ranks must call it."""

        def compute() -> Arrays:
            rows = torch.cat([torch.zeros(0, self.features.width), *self._batches()])
            self._check(len(rows))
            return {"rows": rows.numpy()}

        return torch.from_numpy(self._kept("features", compute, device)["rows"])

    def _batches(self) -> Iterator[Tensor]:
        for batch in self.data.validation_batches():
            pixels = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
            for first in range(0, len(pixels), BATCH):
                yield self.features([resize(image, self.resolution) for image in pixels[first : first + BATCH]])

    def _check(self, count: int) -> None:
        if count < 2:
            raise ValueError(f"{self.caller}: {count} of the validation samples can be used; give two or more")

    def _path(self, kind: str) -> Path | None:
        data = self.data
        wanted, files = data.validation_stream().wanted, list[tuple[str, int, int]]()
        try:
            for source in data.validation_sources:
                if isinstance(source, PictureFolders):
                    files += source.stamps(data.validation_samples, wanted)
                else:
                    path, about = Path(str(source)), Path(str(source)).stat()
                    files.append((path.name, about.st_size, about.st_mtime_ns))
        except OSError:  # URLs
            return None
        which = [data.validation_samples, data.validation_share, data.image_column, data.caption_column]
        reading = [*which, str(data.transform), data.member_mb, str(data.image_limits)]
        resolution = None if self.resolution is None else str(SquareTransform(self.resolution))
        settings = {"features": self.features.digest, "resolution": resolution, "reading": reading}
        key = fingerprint(files=files, captions=str(data.captions), **settings)[:16]
        first = data.validation_sources[0]
        folder = Path(str(first)).resolve()
        folder = folder if isinstance(first, PictureFolders) else folder.parent
        return folder.with_name(f"{folder.name}-statistics") / f"validation-{kind}-{key}.npz"
