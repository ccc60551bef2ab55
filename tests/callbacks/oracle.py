"""Models that render images by program, so that their scores are known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.text.base import TextFeatures
from emf_lightning.text.words import WordEncoder
from tests.callbacks import tiny


class Oracle(FlowMapModule):
    """Knows each caption by its features, and renders the prompt that ``answer`` returns; a blank image for None."""

    def __init__(self, suite: ShapesSuite, answer: Callable[[Prompt], Prompt | None]) -> None:
        super().__init__(tiny.network())
        self.world = suite.world
        self.answers = [answer(prompt) for prompt in suite.prompts()]
        encoder = WordEncoder(width=16)
        self.known = encoder([prompt.prompt for prompt in suite.prompts()]).context.flatten(1)
        self.rng = np.random.default_rng(0)

    def sample_latents(
        self, text: TextFeatures, null: TextFeatures, noise: Tensor, steps: int, guidance_scale: float | None = None
    ) -> Tensor:
        rows = torch.cdist(text.context.flatten(1), self.known).argmin(1)
        images = [self._render(self.answers[row]) for row in rows.tolist()]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1

    def _render(self, prompt: Prompt | None) -> np.ndarray:
        if prompt is None:
            return np.full((self.world.canvas, self.world.canvas, 3), 153, np.uint8)
        return scene_for(self.world, prompt, self.rng).render(self.world)


class Twice(ShapesSuite):
    """A suite whose first prompt comes three times: in the first, the second and the last place."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._prompts = (self._prompts[0], *self._prompts, self._prompts[0])


class NoiseKeeper(Oracle):
    """An oracle that keeps the noises of its images; those of equal captions are apart by them alone."""

    def __init__(self, suite: ShapesSuite) -> None:
        super().__init__(suite, lambda prompt: prompt)
        self.noises: list[Tensor] = []

    def sample_latents(
        self, text: TextFeatures, null: TextFeatures, noise: Tensor, steps: int, guidance_scale: float | None = None
    ) -> Tensor:
        self.noises += noise
        return super().sample_latents(text, null, noise, steps, guidance_scale)
