"""Precision and recall of generated images against reference images, by nearest neighbours."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf_lightning.evaluation.distances.image_features import ImageFeatures
from emf_lightning.evaluation.distances.reference_metric import FeatureSetMetric, joined

ROWS = 1024
"""Rows of distances in memory at once."""


class _Coverage(FeatureSetMetric):
    """Base of precision and recall: shares of one set of features near the other's."""

    higher_is_better = True
    own_features = ""  # always part of the name: that of the paper, VGG-16, is not there
    asks_for_each = "neighbours need"

    def __init__(
        self,
        features: ImageFeatures | None = None,
        reference: Path | None = None,
        resolution: int | None = None,
        count: int | None = None,
        neighbours: int = 3,
    ) -> None:
        super().__init__(features, reference, resolution, count)
        if neighbours < 1:
            raise ValueError(f"{type(self).__name__}: neighbours must be at least 1, got {neighbours}")
        self.neighbours = neighbours
        self._radii: list[tuple[Any, Tensor]] = []  # those of the reference, once for all fresh copies

    def check_requests(self, prompts: Sequence[str]) -> None:
        for whose, count in (("reference", self._images.count if self._images else None), ("run", len(prompts))):
            if count is not None and count <= self.neighbours:
                raise ValueError(
                    f"{type(self).__name__}: the {whose} has {count} images, which have no {self.neighbours} "
                    "neighbours; give more, or a smaller `neighbours`"
                )

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"neighbours": self.neighbours}

    def compute(self) -> dict[str, Tensor]:
        assert self._images is not None
        generated, real = joined(self.features).double(), self._images.feature_matrix(self.device).double()
        if min(len(generated), len(real)) <= self.neighbours:
            return {"score": torch.tensor(torch.nan, dtype=torch.float64)}
        return {"score": self.share(generated, real)}

    @abstractmethod
    def share(self, generated: Tensor, real: Tensor) -> Tensor:
        """The share for features ``[N, D]`` and ``[M, D]``, fp64."""


class Recall(_Coverage):
    """Improved recall (arXiv 1904.06991): the share of reference images within the manifold of the generated ones.

    The manifold is a ball around the features of each image, up to its ``neighbours``-th nearest other one. Modes that
    a model lost lower it. It depends on the number of images on both sides: comparable numbers share them.

    Args:
        features: see ``FrechetDistance``.
        reference: folder of reference images; by default, in a run, the validation samples of its data.
        resolution: see ``FrechetDistance``.
        count: see ``FrechetDistance``.
        neighbours: k, the number of neighbours within a ball.

    Raises:
        ValueError: for a missing reference or numbers below 1; before the first image, for too few images.
    """

    name, title = "recall", "Recall"

    def share(self, generated: Tensor, real: Tensor) -> Tensor:
        return covered(real, generated, radii(generated, self.neighbours))


class Precision(_Coverage):
    """Improved precision (arXiv 1904.06991): the share of generated images within the reference images' manifold.

    Images that fail lower it. Its arguments are those of ``Recall``.
    """

    name, title = "precision", "Precision"

    def share(self, generated: Tensor, real: Tensor) -> Tensor:
        if not self._radii or self._radii[0][0] is not self._images:
            self._radii[:] = [(self._images, radii(real, self.neighbours))]
        return covered(generated, real, self._radii[0][1])


def radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance ``[N]`` of each of ``features`` ``[N, D]`` to its ``neighbours``-th nearest other one."""
    parts = [_distances(rows, features).kthvalue(neighbours + 1).values for rows in torch.split(features, ROWS)]
    return torch.cat(parts)


def covered(tested: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """The share of ``tested`` ``[N, D]`` within ``radius`` ``[M]`` of any of ``centres`` ``[M, D]``."""
    rounding = 1e-5 * centres.norm(dim=1)  # features of one image in two batches differ; copies have radius 0
    inside = [(_distances(rows, centres) <= radius + rounding).any(1) for rows in torch.split(tested, ROWS)]
    return torch.cat(inside).double().mean()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # a matrix product would round distances of equal features to other than 0
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
