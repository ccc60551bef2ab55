"""A suite of prompts with a judge as a metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.image_metric import ImageMetric
from emf_lightning.evaluation.prompt_suite import PromptSuite


class SuiteScore(ImageMetric):
    """The share of images that show their prompt: each task's, and the tasks' unweighted mean as ``score``.

    A folder may have GenEval's layout, ``00012/samples/0003.png``, with the number of the prompt.

    Args:
        suite: e.g. ``GenEvalSuite`` or ``ShapesSuite``.
    """

    images: Tensor
    correct: Tensor
    strict: Tensor

    def __init__(self, suite: PromptSuite) -> None:
        super().__init__()
        self.suite = suite
        self.name, self.title = suite.name, suite.title
        self._prompts = {prompt.prompt: prompt for prompt in suite.prompts()}
        self._row = {text: row for row, text in enumerate(self._prompts)}
        for name in ("images", "correct", "strict"):
            self.add_state(name, torch.zeros(len(self._row), dtype=torch.int64), dist_reduce_fx="sum")

    def prompts(self) -> Sequence[str]:
        return list(self._prompts)

    def prompt_of(self, path: PurePath) -> str | None:
        parts = path.parts
        if len(parts) == 3 and parts[0].isdigit() and parts[1] == "samples" and int(parts[0]) < len(self._row):
            return self.prompts()[int(parts[0])]
        return None

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        """Judges images of the suite's prompts.

        Raises:
            ValueError: for another prompt.
        """
        self.rows = []
        for image, text in zip(images, prompts, strict=True):
            if text not in self._prompts:
                raise ValueError(f"{self.title}: {text!r} is none of its {len(self._prompts)} prompts")
            prompt = self._prompts[text]
            judgement = self.suite.judge(image, prompt)
            row = self._row[text]
            self.images[row] += 1
            self.correct[row] += judgement.correct
            self.strict[row] += judgement.strict
            self.rows.append(
                {
                    "tag": prompt.tag,
                    "prompt": text,
                    "correct": judgement.correct,
                    "strict": judgement.strict,
                    "reason": judgement.reason,
                    "metadata": json.dumps(prompt.metadata()),
                    "details": json.dumps(judgement.boxes),
                }
            )

    def compute(self) -> dict[str, Tensor]:
        values = self.task_scores().values()
        values["score"] = values.pop("overall")
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def task_scores(self) -> TaskScores:
        """The scores of what was counted, of this rank alone unless the counts were summed before."""
        images, correct, strict = (count.cpu().numpy() for count in (self.images, self.correct, self.strict))
        return TaskScores.of_counts(list(self._prompts.values()), images, correct, strict)

    def settings(self) -> dict[str, Any]:
        return {"prompts": len(self._prompts), **self.suite.settings()}
