"""Base classes of all image scores: torchmetrics ``Metric``s of images and their prompts."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from emf_lightning.evaluation.bootstrap import bootstrap_means

if TYPE_CHECKING:
    from emf_lightning.data.datamodule import CaptionImageData

Self = TypeVar("Self", bound="ImageMetric")


class ImageMetric(Metric):
    """Base of the scores: states are sums over images and ranks; networks are no part of the state.

    ``compute`` returns named numbers; ``score`` is the main one, ``se`` its standard error where there is one.

    Attributes:
        name: used in tags and file names; a network other than the benchmark's own is part of it.
        title: heading in reports.
        unit: quantity on a figure's axis; by default the title.
        higher_is_better: direction of ``score``; None where it has none.
        draws_all: whether each evaluation during training samples every prompt once, unless a number is set.
        rows: one dict for each image of the last ``update``, for a line of ``results.jsonl``.
        needs_prompts: whether images must have prompts.
    """

    full_state_update = False
    higher_is_better: bool | None = True
    name: str
    title: str
    unit: str = ""
    draws_all = False
    needs_prompts = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self._no_rows: dict[str, Tensor] = {}

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Adds a state of zeros, summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def add_list(self, name: str, *shape: int, dtype: torch.dtype) -> None:
        """Adds a state of rows ``[N, *shape]``, one for each image, in a list that is concatenated over ranks."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._no_rows[name] = torch.zeros(0, *shape, dtype=dtype)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        for name, none in self._no_rows.items():  # torchmetrics would take a rank's empty list for a vector of fp32
            if isinstance(state := getattr(self, name), list) and not state:
                state.append(none.to(self.device))
        super().sync(*args, **kwargs)

    @abstractmethod
    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        """Adds ``images``, each ``[H, W, 3]``, 8-bit RGB, generated from ``prompts``.

        Raises:
            ValueError: for a prompt that is none of the benchmark's.
        """

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The scores of all ranks' images."""

    def prompts(self) -> Sequence[str]:
        """The benchmark's prompts; empty if the metric takes any prompt."""
        return ()

    def tasks(self) -> Mapping[str, Sequence[int]]:
        """Task -> the places of its prompts among ``prompts``; a benchmark without tasks is one task."""
        return {"": range(len(self.prompts()))}

    def requests(self, images_per_task: int) -> list[tuple[int, int]]:
        """``images_per_task`` images of each task: every prompt once, then every one again, ...

        In each task, the images for a smaller number are the first of those for a larger one.

        Returns:
            The place of the prompt among ``prompts``, and the number of its image.
        """
        tasks = filter(None, self.tasks().values())
        return [(places[i % len(places)], i // len(places)) for places in tasks for i in range(images_per_task)]

    def levels(self) -> dict[str, dict[str, float]]:
        """Level, e.g. ``ceiling`` or ``chance`` -> scores that are known without a model, named as in ``compute``."""
        return {}

    def use_data(self, data: CaptionImageData) -> None:
        """Hands over a run's data before its first image, for metrics that compare with the validation samples."""

    def prompt_of(self, path: PurePath) -> str | None:
        """The prompt of the image at ``path`` in the benchmark's own folder layout; None where it has none."""
        return None

    def check_count(self, images: int) -> None:
        """Raises a ``ValueError`` if the protocol asks for another number of images than ``images``."""

    def check_requests(self, prompts: Sequence[str]) -> None:
        """Raises a ``ValueError`` if images of ``prompts``, one for each, have no score: called before the first one.

        A prompt with several images comes as often.
        """

    def settings(self) -> dict[str, Any]:
        """Everything that comparable numbers must share, e.g. model, weights, protocol; plain values."""
        return {}

    def fresh_copy(self: Self) -> Self:
        """A copy in the initial state that shares the networks."""
        other = copy.copy(self)
        other._defaults = dict(self._defaults)  # moving a metric moves these, too
        for name in self._defaults:
            setattr(other, name, copy.copy(getattr(self, name)))  # resetting a list empties it
        other.reset()
        other.rows = []
        return other

    def merge(self: Self, other: Self) -> None:
        """Adds the state of ``other``, which is on the same rank."""
        self._reduce_states(other.metric_state)
        self._computed, self._update_count = None, self._update_count + other._update_count


class PromptMeans(ImageMetric):
    """Base of benchmarks whose score is the mean over their prompts of the mean over a prompt's images.

    Args:
        texts: the prompts; a repeated one counts as often, each time with all its images.
        groups: the part of the benchmark that each prompt belongs to; each part has a mean of its own.
        scale: factor on the reported numbers, e.g. 100 for per cent.
    """

    images: Tensor
    totals: Tensor

    def __init__(self, texts: Sequence[str], groups: Sequence[str] | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self._texts = tuple(dict.fromkeys(texts))
        self._scale = scale
        self._index = {text: index for index, text in enumerate(self._texts)}
        self._places = np.array([self._index[text] for text in texts])
        self._groups = np.array(groups if groups is not None else [])
        self.add_sum("images", len(self._texts), dtype=torch.int64)
        self.add_sum("totals", len(self._texts))

    def prompts(self) -> Sequence[str]:
        return self._texts

    def tasks(self) -> Mapping[str, Sequence[int]]:
        first = dict(
            zip(self._places[::-1].tolist(), self._groups[::-1].tolist(), strict=False)
        )  # of a repeated prompt
        names = [first.get(index, "") for index in range(len(self._texts))]
        return {task: [i for i, name in enumerate(names) if name == task] for task in dict.fromkeys(names)}

    @abstractmethod
    def values(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[float]:
        """The value of each image."""

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt not in self._index:
                raise ValueError(f"{self.title}: {prompt!r} is none of its {len(self._texts)} prompts")
        self.rows = []
        for prompt, value in zip(prompts, self.values(images, prompts), strict=True):
            self.rows.append({"prompt": prompt, self.name: value})
            self.images[self._index[prompt]] += 1
            self.totals[self._index[prompt]] += value

    def compute(self) -> dict[str, Tensor]:
        images, totals = self.images.cpu().numpy(), self.totals.cpu().numpy()
        present = images > 0
        means = self._scale * totals / np.maximum(images, 1)
        counted = present[self._places]
        values = torch.from_numpy(means[self._places])
        weights = np.bincount(self._places, minlength=len(images))[present]
        error = np.nan
        if len(weights) > 1:
            error = bootstrap_means(weights * means[present], weights, np.random.default_rng(0)).std(ddof=1)
        numbers = {"score": values[counted].mean(), "se": torch.tensor(error, dtype=torch.float64)}
        for group in dict.fromkeys(self._groups[counted].tolist() if len(self._groups) else []):
            numbers[group] = values[counted & (self._groups == group)].mean()
        return numbers


def image_rows(metrics: Sequence[ImageMetric], images: int) -> list[dict[str, Any]]:
    """The row of each image: what all metrics say of it; of a key that several have, the first one's value.

    Raises:
        ValueError: for a metric that has rows, but not one for each image.
    """
    joined: list[dict[str, Any]] = [{} for _ in range(images)]
    for metric in metrics:
        if metric.rows and len(metric.rows) != images:
            raise ValueError(
                f"{metric.name}: update left {len(metric.rows)} rows for {images} images; set self.rows to one "
                "dictionary for each image, or to []"
            )
        for row, own in zip(joined, metric.rows, strict=False):
            row |= {**own, **row}
    return joined
