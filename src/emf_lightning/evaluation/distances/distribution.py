"""KID, FID and diversity of generated images against as many real images of the same prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.evaluation.distances.fid_kid import frechet, kernel_distances
from emf_lightning.evaluation.distances.image_features import ImageFeatures
from emf_lightning.evaluation.distances.reference_images import gaussian

SUBSETS = 50
SUBSET_SIZE = 500
"""Images in a subset of KID, or half of the images if they are fewer than twice as many."""


@dataclass(frozen=True)
class Distribution:
    """Generated images against real ones of the same prompts.

    Attributes:
        kid: kernel distance (arXiv 1801.01401) between features, times 1000; its mean is 0 for real images.
        kid_error: its standard deviation over subsets, times 1000.
        fid: Fréchet distance between features (arXiv 1706.08500); biased upwards for few images.
        diversity: mean distance between features of a prompt's generated images, over that of its real images: 0 if all
            images of a prompt are the same, 1 if they differ as much as real ones.
    """

    kid: float
    kid_error: float
    fid: float
    diversity: float


def distribution(
    generated: NDArray[np.uint8], real: NDArray[np.uint8], images_per_prompt: int, features: ImageFeatures
) -> Distribution:
    """The distances between ``generated`` and ``real``, both ``[P * images_per_prompt, H, W, 3]``, 8-bit RGB.

    The images of a prompt, at least 2, stand one after another; both sets have the same prompts in the same order.
    """
    ours, theirs = features(list(generated)), features(list(real))
    kid = kernel_distances(theirs, ours, SUBSETS, min(SUBSET_SIZE, len(ours) // 2))
    moments = [gaussian(x.sum(0), x.T @ x, len(x)) for x in (ours.double(), theirs.double())]
    fid = frechet(*moments[0], *moments[1])
    diversity = _pairwise_distance(ours, images_per_prompt) / _pairwise_distance(theirs, images_per_prompt)
    return Distribution(float(kid.mean()), float(kid.std(unbiased=False)), float(fid), diversity)


def _pairwise_distance(features: Tensor, images_per_prompt: int) -> float:
    """Mean distance between the features of two images of one prompt."""
    groups = features.view(-1, images_per_prompt, features.shape[1])
    pairs = images_per_prompt * (images_per_prompt - 1)
    return float(torch.cdist(groups, groups).sum((1, 2)).mean() / pairs)
