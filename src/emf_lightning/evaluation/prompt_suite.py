"""What a suite of prompts offers: which images to ask for, and whether one shows what was asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.shapes.prompts import Prompt
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Judgement


@dataclass(frozen=True)
class PromptImage:
    """One image to draw: the ``index``-th of ``prompt``."""

    prompt: Prompt
    index: int


class PromptSuite(ABC):
    """Prompts and their judge.

    Attributes:
        name: the word that stands for the suite in tags and file names.
        title: what reports call it; the judge's limits are part of it.
    """

    name: str
    title: str

    @abstractmethod
    def prompts(self) -> Sequence[Prompt]:
        """All prompts, in their published order."""

    @abstractmethod
    def judge(self, image: NDArray[np.uint8], prompt: Prompt) -> Judgement:
        """Whether ``image``, 8-bit RGB ``[H, W, 3]``, shows ``prompt``."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a reader must know to compare scores: what judges, and how it was set; plain values."""

    def ceiling(self) -> TaskScores | None:
        """What perfect images score, where that is known."""
        return None

    def chance(self) -> TaskScores | None:
        """What good images of another prompt of the same task score, where that is known."""
        return None

    def picture(self, prompt: Prompt, number: int) -> NDArray[np.uint8] | None:
        """The ``number``-th real picture of ``prompt``, 8-bit RGB, where the suite can draw one."""
        return None

    def images(self, images_per_task: int) -> list[PromptImage]:
        """``images_per_task`` images of every task, grouped by task: each prompt once, then each a second time, ...

        A smaller number asks for a beginning of what a larger one asks for.
        """
        by_task: dict[str, list[Prompt]] = {}
        for prompt in self.prompts():
            by_task.setdefault(prompt.tag, []).append(prompt)
        return [
            PromptImage(prompts[i % len(prompts)], i // len(prompts))
            for prompts in by_task.values()
            for i in range(images_per_task)
        ]
