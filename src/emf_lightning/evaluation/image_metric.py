"""What every score of images is here: a torchmetrics ``Metric`` that is shown pictures and their prompts."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

RESAMPLES = 1000
"""Bootstrap samples behind a standard error."""

Self = TypeVar("Self", bound="ImageMetric")


class ImageMetric(Metric):
    """Base of the scores: sums over images, added up over ranks, whose networks are no part of the state.

    ``compute`` gives named numbers; ``score`` is the main one and ``se`` its standard error, where there is one.

    Attributes:
        name: the word that stands for it in tags and file names; judges other than the published one are part of it.
        title: what reports call it.
        rows: of the images of the last ``update``, one each: what is worth a line in a file.
        needs_prompts: whether images without a prompt can be scored.
    """

    full_state_update = False
    higher_is_better: bool | None = True
    name: str
    title: str
    needs_prompts = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @abstractmethod
    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        """Adds ``images``, each ``[H, W, 3]``, 8-bit RGB, drawn for ``prompts``."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The scores of all ranks' images."""

    def prompts(self) -> Sequence[str]:
        """The prompts that it is for; none where any prompt will do."""
        return ()

    def prompt_of(self, path: PurePath) -> str | None:
        """The prompt of the image at ``path`` in a folder of the benchmark's own layout, where it has one."""
        return None

    def check_count(self, images: int) -> None:
        """Raises a ``ValueError`` where its protocol wants another number of images than ``images``."""

    def settings(self) -> dict[str, Any]:
        """What a reader must know to compare the numbers: model, weights, protocol; plain values."""
        return {}

    def twin(self: Self) -> Self:
        """Another one with the same networks that has seen nothing."""
        other = copy.copy(self)
        other._defaults = dict(self._defaults)  # moving a metric moves these, too
        for name, default in self._defaults.items():
            setattr(other, name, [] if isinstance(default, list) else default.detach().clone().to(self.device))
        other.rows = []
        other._computed, other._update_count = None, 0
        return other

    def absorb(self: Self, other: Self) -> None:
        """Adds what ``other`` counted, on the same rank."""
        for name, default in self._defaults.items():
            if isinstance(default, list):
                getattr(self, name).extend(getattr(other, name))
            else:
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self._computed, self._update_count = None, self._update_count + other._update_count


class PromptMeans(ImageMetric):
    """Base of the scores that are means over prompts known beforehand, each of the mean over its images.

    Args:
        texts: the prompts; one that comes several times counts as often, each time with all its images.
        groups: the part of the benchmark that each belongs to; every part gets a mean of its own.
        scale: factor on the reported numbers, e.g. 100 for per cent.
    """

    images: Tensor
    totals: Tensor

    def __init__(self, texts: Sequence[str], groups: Sequence[str] | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self._texts = tuple(dict.fromkeys(texts))
        self._scale = scale
        self._row = {text: row for row, text in enumerate(self._texts)}
        self._places = np.array([self._row[text] for text in texts])
        self._groups = np.array(groups if groups is not None else [])
        self.add_state("images", torch.zeros(len(self._texts), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(len(self._texts), dtype=torch.float64), dist_reduce_fx="sum")

    def prompts(self) -> Sequence[str]:
        return self._texts

    @abstractmethod
    def values(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[float]:
        """What each image gets."""

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        """Adds images of known prompts.

        Raises:
            ValueError: for a prompt that is not one of ``prompts()``.
        """
        for prompt in prompts:
            if prompt not in self._row:
                raise ValueError(f"{self.title}: {prompt!r} is none of its {len(self._texts)} prompts")
        values = self.values(images, prompts)
        self.rows = [{"prompt": prompt, self.name: value} for prompt, value in zip(prompts, values, strict=True)]
        for prompt, value in zip(prompts, values, strict=True):
            self.images[self._row[prompt]] += 1
            self.totals[self._row[prompt]] += value

    def compute(self) -> dict[str, Tensor]:
        images, totals = self.images.cpu().numpy(), self.totals.cpu().numpy()
        drawn = images > 0
        means = self._scale * totals / np.maximum(images, 1)
        counted = drawn[self._places]
        values = means[self._places]
        weights = np.bincount(self._places, minlength=len(images))
        numbers = {"score": _mean(values[counted]), "se": standard_error(means[drawn], weights[drawn])}
        for group in dict.fromkeys(self._groups[counted].tolist() if len(self._groups) else []):
            numbers[group] = _mean(values[counted & (self._groups == group)])
        return numbers


def _mean(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values).mean()


def standard_error(means: NDArray[np.float64], weights: NDArray[np.integer], seed: int = 0) -> Tensor:
    """Of the mean of ``means`` ``[P]`` that count ``weights`` ``[P]`` times each.

    Bootstrap over prompts, because images of one prompt resemble each other.
    """
    n = len(means)
    if n < 2:
        return torch.tensor(float("nan"), dtype=torch.float64)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return torch.tensor(((drawn @ (weights * means)) / (drawn @ weights)).std(ddof=1))
