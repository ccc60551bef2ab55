"""Prompts of one's own as a benchmark without a score: they are sampled, and other metrics may score their images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.text.fingerprint import fingerprint
from emf_lightning.text.plain import plain


class OwnPrompts(ImageMetric):
    """Prompts without a verdict on their images. A prompt that is given twice counts once.

    Args:
        prompts: text file in UTF-8 with one prompt a line, or a list of prompts.
        name: used in tags and folders.

    Raises:
        ValueError: for a file that is missing or is not text, and for no prompt.
    """

    title = "own prompts"
    higher_is_better = None
    draws_all = True

    def __init__(self, prompts: Path | list[str], name: str = "prompts") -> None:
        super().__init__()
        if not name or set(name) & set("/\\") or name.startswith("."):
            raise ValueError(f"OwnPrompts: name {name!r} must be the name of a folder, e.g. 'prompts'")
        listed = list(map(plain, prompts)) if isinstance(prompts, list) else PromptList(prompts).prompts
        self.name = name
        self._prompts = list(dict.fromkeys(filter(None, listed)))
        if not self._prompts:
            raise ValueError("prompts: the list holds no prompt; give one or more")

    def prompts(self) -> Sequence[str]:
        return self._prompts

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        self.rows = [{"prompt": prompt} for prompt in prompts]

    def compute(self) -> dict[str, Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {"prompts": len(self._prompts), "benchmark": fingerprint(prompts=self._prompts)[:12]}


class ValidationCaptions(OwnPrompts):
    """The captions of the first validation samples of a run's data, in their order, as prompts without a verdict.

    Args:
        data: the run's data; its ``validation_shards`` are read.
        count: number of different captions; fewer where the validation samples have fewer.

    Raises:
        ValueError: for data without ``validation_shards``, or for ones that cannot be read.
    """

    name = "validation_captions"
    title = "validation captions"
    draws_all = False

    def __init__(self, data: CaptionImageData, count: int) -> None:
        if not data.validates:
            raise ValueError(
                "prompts are not set, and the data have no validation_shards whose captions would stand for them; give "
                "prompts, e.g. a text file, or benchmarks"
            )
        captions = (caption for batch in data.validation_batches(images=False) for caption in batch.captions)
        different: dict[str, None] = {}
        for caption in captions:
            different[caption] = None
            if len(different) == count:
                break
        ImageMetric.__init__(self)
        self._prompts = list(different)


def chosen_benchmarks(
    caller: str,
    benchmarks: Sequence[ImageMetric] | None,
    prompts: Path | list[str] | None,
    extra_metrics: Sequence[ImageMetric] = (),
) -> list[ImageMetric]:
    """The benchmarks that a callback's arguments name, ``prompts`` as ``OwnPrompts``.

    Raises:
        ValueError: for a benchmark without prompts, two benchmarks or two ``extra_metrics`` of one name, or unusable
            ``prompts``.
    """
    chosen = [*(benchmarks or []), *([] if prompts is None else [OwnPrompts(prompts)])]
    for benchmark in chosen:
        if not benchmark.prompts():
            name = type(benchmark).__name__
            raise ValueError(f"{caller}: {name} has no prompts of its own; put it into `extra_metrics`")
    names = [benchmark.name for benchmark in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"{caller}: benchmarks of one name ({', '.join(names)}); give each another `name`, or one run")
    extra = [metric.name for metric in extra_metrics]
    if twice := next((name for name in extra if extra.count(name) > 1), None):
        raise ValueError(
            f"{caller}: two of extra_metrics have the name {twice}, under which scores are kept; leave one out, and "
            "score its images in another run, or by `emf score` with --out"
        )
    return chosen
