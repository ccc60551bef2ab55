"""Base class of prompt suites: prompts, and a verdict on whether an image shows its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Verdict

TITLES = {"geneval_hf": "GenEval (HF detector)", "shapes": "shapes world"}
"""Name of a suite -> its title in reports; here, a report of scores loads neither detectors nor networks."""


@dataclass(frozen=True)
class PromptImage:
    """One image to generate: the ``index``-th of ``prompt``, the ``number``-th of the suite's prompts."""

    prompt: Prompt
    index: int
    number: int


class PromptSuite(ABC):
    """Prompts with a rule that decides whether an image shows its prompt.

    Attributes:
        name: used in tags and file names.
        title: heading in reports; it says how the rule differs from the published one.
    """

    name: str
    title: str

    @abstractmethod
    def prompts(self) -> Sequence[Prompt]:
        """All prompts, in their published order."""

    @abstractmethod
    def evaluate(self, image: NDArray[np.uint8], prompt: Prompt) -> Verdict:
        """The verdict on whether ``image`` ``[H, W, 3]``, 8-bit RGB, shows ``prompt``."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that comparable scores must share, e.g. the detector and its thresholds; plain values."""

    def ceiling(self) -> TaskScores | None:
        """Scores of perfect images, or None if unknown."""
        return None

    def chance(self) -> TaskScores | None:
        """Scores of good images of another prompt of the same task, or None if unknown."""
        return None

    def reference_image(self, prompt: Prompt, index: int) -> NDArray[np.uint8] | None:
        """The ``index``-th real image of ``prompt``, 8-bit RGB; None if the suite has no real images."""
        return None

    def images(self, images_per_task: int) -> list[PromptImage]:
        """``images_per_task`` images of each task, grouped by task: every prompt once, then every one again, ...

        In each task, the images for a smaller number are the first of those for a larger one.
        """
        images = []
        for task in dict.fromkeys(prompt.tag for prompt in self.prompts()):
            prompts = [(prompt, number) for number, prompt in enumerate(self.prompts()) if prompt.tag == task]
            for i in range(images_per_task):
                prompt, number = prompts[i % len(prompts)]
                images.append(PromptImage(prompt, i // len(prompts), number))
        return images
