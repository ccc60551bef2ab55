"""Scenes of all six tasks, and perturbations of their images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import TASKS
from emf_lightning.data.shapes.prompts import random_prompt
from emf_lightning.data.shapes.scenes import Scene, scene_for
from emf_lightning.data.shapes.world import World
from emf_lightning.evaluation.geneval.verdict import evaluate
from emf_lightning.evaluation.shapes.detector import ShapesDetector

Images = NDArray[np.uint8]


def scenes(world: World, per_task: int, seed: int = 0) -> list[Scene]:
    """``per_task`` scenes of each task, task by task."""
    rng = np.random.default_rng(seed)
    return [scene_for(world, random_prompt(world, tag, rng), rng) for tag in TASKS for _ in range(per_task)]


def render_all(world: World, scenes: list[Scene]) -> Images:
    return np.stack([scene.render(world) for scene in scenes])


def to_bytes(images: NDArray) -> Images:
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def noisy(images: Images, sigma: float) -> Images:
    return to_bytes(images + np.random.default_rng(1).normal(0, sigma, images.shape))


def blurred(images: Images, sigma: float) -> Images:
    """After a Gaussian filter with the border repeated."""
    reach = 4
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    result = images.astype(float)
    for axis in (1, 2):
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(result, padding, mode="edge")
        size = images.shape[axis]
        shifted = [np.take(padded, range(k, k + size), axis) for k in range(2 * reach + 1)]
        result = np.tensordot(weights / weights.sum(), shifted, 1)
    return to_bytes(result)


def tinted(images: Images, sigma: float) -> Images:
    shift = np.random.default_rng(1).uniform(-sigma, sigma, (len(images), 1, 1, 3))
    return to_bytes(images + shift)


def accepted(detector: ShapesDetector, images: Images, scenes: list[Scene], strict: bool = False) -> list[float]:
    """Share of images that show their scene's prompt, task by task."""
    verdicts = [evaluate(d, s.prompt) for d, s in zip(detector.detect_batch(images), scenes, strict=True)]
    good = np.array([v.strict if strict else v.correct for v in verdicts]).reshape(len(TASKS), -1)
    return good.mean(1).tolist()
