"""Diversity of generated images: how much images of one prompt differ, and the Vendi score."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emf_lightning.evaluation.distances.image_features import ImageFeatures, RandomFeatures
from emf_lightning.evaluation.distances.reference_metric import joined, named_by_features
from emf_lightning.evaluation.image_metric import ImageMetric


class _Diversity(ImageMetric):
    """Base of the scores of features of unit length, grouped by prompt; the mean of the groups' values is ``score``.

    It has no direction: images that fail differ, too.
    """

    higher_is_better = None
    features: list[Tensor] | Tensor
    keys: list[Tensor] | Tensor

    def __init__(self, features: ImageFeatures | None) -> None:
        super().__init__()
        self._features = features or RandomFeatures()
        self.name, self.title = named_by_features(self, self._features)
        self.add_list("features", self._features.width, dtype=torch.float32)
        self.add_list("keys", dtype=torch.int64)

    @abstractmethod
    def value(self, features: Tensor) -> Tensor:
        """The value of a group's unit vectors ``[N, D]``, fp64."""

    def check_requests(self, prompts: Sequence[str]) -> None:
        if self.needs_prompts and max(Counter(prompts).values(), default=0) < 2:
            raise ValueError(
                f"{type(self).__name__}: no two of the {len(prompts):,} images are of one prompt; sample several of "
                "each: StepSweep's images_per_prompt, or FewStepSampling's images_per_task and final_images_per_task "
                "beyond the number of prompts in a task (captions of validation samples come once: give `prompts`)"
            )

    def settings(self) -> dict[str, Any]:
        return {"features": self._features.digest, "resize": self._features.resize}

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        assert isinstance(self.features, list) and isinstance(self.keys, list)
        digests = [hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts]
        keys = [int.from_bytes(digest, "big", signed=True) for digest in digests]
        self.features.append(self._features(images).to(self.device))
        self.keys.append(torch.tensor(keys, device=self.device))
        self.rows = [{} for _ in images]

    def compute(self) -> dict[str, Tensor]:
        features, keys = nn.functional.normalize(joined(self.features).double(), dim=1), joined(self.keys)
        groups = [features[keys == key] for key in sorted(set(keys.tolist()))] if self.needs_prompts else [features]
        values = torch.stack([self.value(group) for group in groups if len(group) > self.needs_prompts] or [_nan()])
        error = {"se": values.std() / len(values) ** 0.5} if len(values) > 1 else {}
        return {"score": values.mean()} | error


class PromptDiversity(_Diversity):
    """100 times the mean distance, 1 - cosine, between the features of two images of one prompt, averaged over prompts.

    0 if all images of a prompt are the same. It is 100 minus the mean intra-prompt similarity in per cent. Prompts with
    one image do not count. Images that fail differ, too: compare checkpoints of similar quality, and with the parent's
    value. Comparable numbers share features and resolution; for DINOv2's and CLIP's embeddings see DP-DMD
    (arXiv 2602.03139), with 100 prompts of 16 seeds.

    Args:
        features: the feature network, e.g. ``Dinov2Features``; by default ``RandomFeatures``, which need no download:
            they tell checkpoints of one data set apart, but compare with no published number.
    """

    name, title = "diversity", "Diversity x 100"

    def __init__(self, features: ImageFeatures | None = None) -> None:
        super().__init__(features)

    def value(self, features: Tensor) -> Tensor:
        n = len(features)
        return 100 * (1 - (features.sum(0).square().sum() - n) / (n * (n - 1)))


class VendiScore(_Diversity):
    """Vendi score (arXiv 2210.02410) of order 1: exp of the entropy of the eigenvalues of K/n, K the n images' cosines.

    It is the effective number of different images: 1 if all are the same, n if all features are orthogonal. It grows
    with the number of images and with the variety of prompts: comparable numbers share both.

    Args:
        features: see ``PromptDiversity``.
        per_prompt: the mean of the Vendi scores of each prompt's images, in place of that of all images. Prompts with
            one image do not count.
    """

    name, title = "vendi", "Vendi score"

    def __init__(self, features: ImageFeatures | None = None, per_prompt: bool = False) -> None:
        self.needs_prompts = per_prompt
        if per_prompt:
            self.name, self.title = "vendi_per_prompt", "Vendi score of a prompt's images"
        super().__init__(features)

    def value(self, features: Tensor) -> Tensor:
        smaller = features if len(features) < features.shape[1] else features.T
        shares = torch.linalg.eigvalsh(smaller @ smaller.T / len(features)).clamp(min=0)
        return torch.special.entr(shares).sum().exp()


def _nan() -> Tensor:
    return torch.tensor(torch.nan, dtype=torch.float64)
