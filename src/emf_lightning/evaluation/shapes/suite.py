"""GenEval's tasks in a shapes world, with an exact judge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.shapes.prompts import Prompt, evaluation_prompts
from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.data.shapes.world import WORLDS
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Judgement, judge
from emf_lightning.evaluation.prompt_suite import PromptSuite
from emf_lightning.evaluation.shapes.detector import ShapesDetector


class ShapesSuite(PromptSuite):
    """The six tasks with a shapes world's vocabulary; the detector is exact, so that its ceiling is known.

    Args:
        world: name of the world, ``small`` or ``full``.
        per_task: prompts drawn for each task, as GenEval does; duplicates are dropped.
        scenes_per_task: pictures behind ``ceiling`` and ``chance``.

    Raises:
        ValueError: for another world.
    """

    name = "shapes"
    title = "shapes world"

    def __init__(self, world: str = "small", per_task: int = 100, scenes_per_task: int = 100) -> None:
        if world not in WORLDS:
            raise ValueError(f"ShapesSuite: no world {world!r}; the worlds are {', '.join(WORLDS)}")
        self.world = WORLDS[world]
        self.per_task = per_task
        self.scenes_per_task = scenes_per_task
        self._prompts = tuple(evaluation_prompts(self.world, per_task))
        self._detector = ShapesDetector(self.world)
        self._ceiling: TaskScores | None = None
        self._chance: TaskScores | None = None

    def prompts(self) -> Sequence[Prompt]:
        """The world's evaluation prompts."""
        return self._prompts

    def judge(self, image: NDArray[np.uint8], prompt: Prompt) -> Judgement:
        """GenEval's decision on what the world's detector sees."""
        return judge(self._detector(image), prompt)

    def settings(self) -> dict[str, Any]:
        """The world and how many prompts were drawn: its judge has no weights."""
        return {"world": self.world.name, "per_task": self.per_task}

    def picture(self, prompt: Prompt, number: int) -> NDArray[np.uint8]:
        """A scene of the world."""
        seed = int.from_bytes(hashlib.sha256(f"{number} {prompt.prompt}".encode()).digest()[:8], "big")
        return scene_for(self.world, prompt, np.random.default_rng(seed)).draw(self.world)

    def ceiling(self) -> TaskScores:
        """The scores of clean pictures of each prompt: what the detector costs."""
        if self._ceiling is None:
            self._ceiling = self._scores_of_scenes(lambda prompt, other: prompt)
        return self._ceiling

    def chance(self) -> TaskScores:
        """The scores of clean pictures of another prompt of the task: what a model that ignores the caption gets."""
        if self._chance is None:
            self._chance = self._scores_of_scenes(lambda prompt, other: other)
        return self._chance

    def _scores_of_scenes(self, drawn: Callable[[Prompt, Prompt], Prompt]) -> TaskScores:
        rng = np.random.default_rng(0)
        by_task: dict[str, list[Prompt]] = {}
        for prompt in self._prompts:
            by_task.setdefault(prompt.tag, []).append(prompt)
        judged = []
        for asked in self.images(self.scenes_per_task):
            prompt, task = asked.prompt, by_task[asked.prompt.tag]
            # any prompt of the task but this one
            other = task[(task.index(prompt) + int(rng.integers(1, len(task)))) % len(task)]
            image = scene_for(self.world, drawn(prompt, other), rng).draw(self.world)
            judged.append((prompt, self.judge(image, prompt)))
        return TaskScores.of(judged)
