"""A suite of prompts as a metric, and the lines of GenEval's ``results.jsonl``, which its summary script reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.geneval.prompt_suite import PromptSuite
from emf_lightning.evaluation.geneval.task_scores import SHARE, TaskScores
from emf_lightning.evaluation.geneval.verdict import Verdict
from emf_lightning.evaluation.image_metric import ImageMetric


class SuiteScore(ImageMetric):
    """The share of images that show their prompt: each task's, and the tasks' unweighted mean as ``score``.

    A folder may have GenEval's layout, ``00012/samples/0003.png``, with the number of the prompt.

    Args:
        suite: e.g. ``GenEvalSuite`` or ``ShapesSuite``.

    Raises:
        ValueError: for a suite that asks for different things in the same words.
    """

    unit = SHARE
    images: Tensor
    correct: Tensor
    strict: Tensor

    def __init__(self, suite: PromptSuite) -> None:
        super().__init__()
        self.suite = suite
        self.name, self.title = suite.name, suite.title
        self._texts = [prompt.prompt for prompt in suite.prompts()]
        self._prompts = {prompt.prompt: prompt for prompt in suite.prompts()}
        self._index = {text: index for index, text in enumerate(self._prompts)}
        if other := next((prompt for prompt in suite.prompts() if prompt != self._prompts[prompt.prompt]), None):
            raise ValueError(
                f"SuiteScore: {suite.name} has different prompts of the text {other.prompt!r}; their texts must tell "
                "them apart, or their fields be the same, too"
            )
        for name in ("images", "correct", "strict"):
            self.add_sum(name, len(self._prompts), dtype=torch.int64)

    def prompts(self) -> Sequence[str]:
        return self._texts

    def tasks(self) -> Mapping[str, Sequence[int]]:
        tags = [prompt.tag for prompt in self.suite.prompts()]
        return {tag: [i for i, own in enumerate(tags) if own == tag] for tag in dict.fromkeys(tags)}

    def levels(self) -> dict[str, dict[str, float]]:
        known = {"ceiling": self.suite.ceiling(), "chance": self.suite.chance()}
        return {level: scores.numbers() for level, scores in known.items() if scores is not None}

    def prompt_of(self, path: PurePath) -> str | None:
        parts = path.parts
        if len(parts) == 3 and parts[0].isdigit() and parts[1] == "samples" and int(parts[0]) < len(self._texts):
            return self._texts[int(parts[0])]
        return None

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        asked = [self._prompt(text) for text in prompts]
        verdicts = [self.suite.evaluate(image, prompt) for image, prompt in zip(images, asked, strict=True)]
        self.count(asked, verdicts)
        self.rows = [result_row(prompt, verdict) for prompt, verdict in zip(asked, verdicts, strict=True)]

    def count(self, prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> None:
        """Counts images of ``prompts`` that were evaluated elsewhere; a prompt may come several times.

        Raises:
            ValueError: for another suite's prompt, or lists of different lengths.
        """
        indices = [self._index[self._prompt(prompt.prompt).prompt] for prompt in prompts]
        for index, verdict in zip(indices, verdicts, strict=True):
            self.images[index] += 1
            self.correct[index] += verdict.correct
            self.strict[index] += verdict.strict

    def compute(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self._counted().numbers().items()}

    def task_scores(self) -> TaskScores:
        """The scores of all ranks' images; every rank must call it."""
        with self.sync_context(should_sync=self._to_sync):
            return self._counted()

    def settings(self) -> dict[str, Any]:
        return {"prompts": len(self._texts), **self.suite.settings()}

    def _prompt(self, text: str) -> Prompt:
        if text not in self._prompts:
            raise ValueError(f"{self.title}: {text!r} is none of the {len(self._prompts)} prompts of the suite")
        return self._prompts[text]

    def _counted(self) -> TaskScores:
        images, correct, strict = (count.cpu().numpy() for count in (self.images, self.correct, self.strict))
        return TaskScores.of_counts(list(self._prompts.values()), images, correct, strict)


def result_row(prompt: Prompt, verdict: Verdict) -> dict[str, Any]:
    """GenEval's fields for one image except ``filename``, and whether it is strictly correct."""
    return {
        "tag": prompt.tag,
        "prompt": prompt.prompt,
        "correct": verdict.correct,
        "strict": verdict.strict,
        "reason": verdict.reason,
        "metadata": json.dumps(prompt.metadata()),
        "details": json.dumps(verdict.boxes),
    }


def sample_path(prompt: int, image: int) -> str:
    """GenEval's file name for the ``image``-th image of the ``prompt``-th prompt: ``00012/samples/0003.png``."""
    return f"{prompt:05d}/samples/{image:04d}.png"
