"""Scenes: random object positions that satisfy a prompt by GenEval's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import TASKS, Prompt
from emf_lightning.data.shapes.prompts import random_prompt
from emf_lightning.data.shapes.rendering import render
from emf_lightning.data.shapes.world import World

TASK_WEIGHTS: dict[str, float] = {
    "single_object": 0.06,
    "two_object": 0.16,
    "counting": 0.20,
    "colors": 0.10,
    "position": 0.22,
    "color_attr": 0.26,
}
"""Share of each task among training images; the binding tasks, position and color_attr, are learned last."""


@dataclass(frozen=True)
class SceneObject:
    """One object: its colour and shape by name, its centre (x, y) and radius in pixels."""

    colour: str
    shape: str
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """A prompt and the objects of one image that satisfies it."""

    prompt: Prompt
    objects: tuple[SceneObject, ...]

    def render(self, world: World) -> NDArray[np.uint8]:
        """The image ``[canvas, canvas, 3]``, 8-bit RGB."""
        return render([(o.colour, o.shape, o.centre, o.radius) for o in self.objects], world.canvas)


def _cells(world: World, count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[int, int]]:
    """``count`` neighbouring (column, row) cells at a random place of the grid.

    Objects stand side by side in the caption's order, four of them in a square. ``relation`` is that of the first
    object to the second. Only the place of the whole group is random.
    """
    columns = 1 if relation in ("above", "below") else 2 if count == 4 else count
    rows = count // columns
    left, top = (int(rng.integers(world.grid - extent + 1)) for extent in (columns, rows))
    cells = [(left + i % columns, top + i // columns) for i in range(count)]
    return cells[::-1] if relation in ("right of", "below") else cells


def scene_for(world: World, prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies ``prompt``; colours that the prompt leaves open never make a held-out pair."""
    relation = None
    wanted: list[tuple[str | None, str]] = []
    for item in prompt.include:
        wanted += [(item.get("color"), item["class"])] * item["count"]
        if "position" in item:
            relation = item["position"][0]
    if relation is not None:
        wanted.reverse()  # `include` names the reference object first, the cells come in the caption's order
    cells = _cells(world, len(wanted), relation, rng)
    objects = []
    for (colour, shape), cell in zip(wanted, cells, strict=True):
        if colour is None:
            open_colours = [c for c in world.colours if (c, shape) not in world.held_out_pairs]
            colour = open_colours[rng.integers(len(open_colours))]
        radius = float(rng.uniform(*world.radius)) * world.cell
        margin = max(world.cell / 2 - 1.21 * radius, 0.0)
        x, y = ((index + 0.5) * world.cell + float(rng.uniform(-margin, margin)) for index in cell)
        objects.append(SceneObject(colour, shape, (x, y), radius))
    return Scene(prompt, tuple(objects))


def training_scene(world: World, rng: np.random.Generator, task_weights: Mapping[str, float] = TASK_WEIGHTS) -> Scene:
    """A random training scene without held-out compositions; ``task_weights`` is the distribution of tasks."""
    weights = np.array([task_weights[tag] for tag in TASKS])
    tag = TASKS[rng.choice(len(TASKS), p=weights / weights.sum())]
    while True:
        prompt = random_prompt(world, tag, rng)
        if not prompt.held_out:
            return scene_for(world, prompt, rng)
