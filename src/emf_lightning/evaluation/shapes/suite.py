"""GenEval's tasks in a shapes world, with an exact detector."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.data.shapes.prompts import evaluation_prompts, random_prompt
from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.data.shapes.world import WORLDS
from emf_lightning.evaluation.geneval.prompt_suite import TITLES, PromptSuite
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Verdict, evaluate
from emf_lightning.evaluation.shapes.detector import ShapesDetector


class ShapesSuite(PromptSuite):
    """The six tasks with a shapes world's vocabulary; the ceiling is known, because the detector is exact.

    Args:
        world: name of the world, ``small`` or ``full``.
        per_task: prompts sampled for each task, before duplicates are dropped.
        scenes_per_task: scenes of each task for ``ceiling`` and ``chance``.

    Raises:
        ValueError: for another world, and for numbers below 1.
    """

    name = "shapes"
    title = TITLES[name]

    def __init__(self, world: str = "small", per_task: int = 100, scenes_per_task: int = 100) -> None:
        if world not in WORLDS:
            raise ValueError(f"ShapesSuite: no world {world!r}; the worlds are {', '.join(WORLDS)}")
        for argument, value in {"per_task": per_task, "scenes_per_task": scenes_per_task}.items():
            if value < 1:
                raise ValueError(f"ShapesSuite: {argument} must be at least 1, got {value}")
        self.world = WORLDS[world]
        self.per_task = per_task
        self.scenes_per_task = scenes_per_task
        self._prompts = tuple(evaluation_prompts(self.world, per_task))
        self._detector = ShapesDetector(self.world)
        self._scene_scores: dict[bool, TaskScores] = {}

    def prompts(self) -> Sequence[Prompt]:
        return self._prompts

    def evaluate(self, image: NDArray[np.uint8], prompt: Prompt) -> Verdict:
        return evaluate(self._detector(image), prompt)

    def settings(self) -> dict[str, Any]:
        return {"world": self.world.name, "per_task": self.per_task}

    def reference_image(self, prompt: Prompt, index: int) -> NDArray[np.uint8]:
        """A random scene of ``prompt``; ``index`` and the prompt determine it."""
        seed = int.from_bytes(hashlib.sha256(f"{index} {prompt.prompt}".encode()).digest()[:8], "big")
        return scene_for(self.world, prompt, np.random.default_rng(seed)).render(self.world)

    def ceiling(self) -> TaskScores:
        """Scores of rendered scenes of each prompt: the errors of the detector."""
        return self._scores_of_scenes(of_other_prompts=False)

    def chance(self) -> TaskScores:
        """Scores of rendered scenes of another prompt of the task: those of a model that ignores the caption."""
        return self._scores_of_scenes(of_other_prompts=True)

    def _scores_of_scenes(self, of_other_prompts: bool) -> TaskScores:
        if of_other_prompts in self._scene_scores:
            return self._scene_scores[of_other_prompts]
        rng = np.random.default_rng(0)
        evaluated = []
        for asked in self.images(self.scenes_per_task):
            prompt = asked.prompt
            other = self._other_prompt(prompt, rng)
            image = scene_for(self.world, other if of_other_prompts else prompt, rng).render(self.world)
            evaluated.append((prompt, self.evaluate(image, prompt)))
        self._scene_scores[of_other_prompts] = TaskScores.of(evaluated)
        return self._scene_scores[of_other_prompts]

    def _other_prompt(self, prompt: Prompt, rng: np.random.Generator) -> Prompt:
        """Any other prompt of the task; of the world's, where the suite has no other."""
        task = [other for other in self._prompts if other.tag == prompt.tag]
        if len(task) > 1:
            return task[(task.index(prompt) + int(rng.integers(1, len(task)))) % len(task)]
        while (other := random_prompt(self.world, prompt.tag, rng)).prompt == prompt.prompt:
            pass
        return other
