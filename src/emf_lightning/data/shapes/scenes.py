"""Scenes: where the objects of a prompt stand, drawn at random such that GenEval's rules hold for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.shapes import prompts as p
from emf_lightning.data.shapes.drawing import draw
from emf_lightning.data.shapes.prompts import RELATIONS, TASKS, Prompt
from emf_lightning.data.shapes.world import World

TASK_WEIGHTS: dict[str, float] = {
    "single_object": 0.06,
    "two_object": 0.16,
    "counting": 0.20,
    "colors": 0.10,
    "position": 0.22,
    "color_attr": 0.26,
}
"""Share of each task among training images: the binding tasks are learned last and get most."""


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

    def draw(self, world: World) -> NDArray[np.uint8]:
        """The image ``[canvas, canvas, 3]``, 8-bit RGB."""
        return draw([(o.colour, o.shape, o.centre, o.radius) for o in self.objects], world.canvas)


def _cells(world: World, count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[int, int]]:
    """``count`` (column, row) cells of one compact group, somewhere on the grid.

    Objects stand side by side in the caption's order, four of them in a square; with a relation the first stands so
    to the second. Which of the group's places it takes is left to chance: that is what noise decides.
    """
    if relation in ("above", "below"):
        columns, rows = 1, count
    else:
        columns = 2 if count == 4 else count
        rows = count // columns
    left, top = (int(rng.integers(world.grid - extent + 1)) for extent in (columns, rows))
    cells = [(left + i % columns, top + i // columns) for i in range(count)]
    return cells[::-1] if relation in ("right of", "below") else cells


def _place(world: World, colour: str, shape: str, cell: tuple[int, int], rng: np.random.Generator) -> SceneObject:
    radius = float(rng.uniform(*world.radius)) * world.cell
    play = max(world.cell / 2 - 1.21 * radius, 0.0)
    x, y = ((index + 0.5) * world.cell + float(rng.uniform(-play, play)) for index in cell)
    return SceneObject(colour, shape, (x, y), radius)


def scene_for(world: World, prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies ``prompt``; a colour that it leaves open never makes a held-out pair."""
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
        objects.append(_place(world, colour, shape, cell, rng))
    return Scene(prompt, tuple(objects))


def random_prompt(world: World, tag: str, rng: np.random.Generator) -> Prompt:
    """A random prompt of task ``tag``, seen and held-out compositions alike."""
    shapes, colours = world.shapes, world.colours
    a, b = (shapes[i] for i in rng.choice(len(shapes), 2, replace=False))
    c, d = (colours[i] for i in rng.choice(len(colours), 2, replace=False))
    match tag:
        case "single_object":
            return p.single_object(world, a)
        case "two_object":
            return p.two_object(world, a, b)
        case "counting":
            return p.counting(world, a, int(rng.integers(2, 5)))
        case "colors":
            return p.colors(world, c, a)
        case "position":
            return p.position(world, a, RELATIONS[rng.integers(4)], b)
        case "color_attr":
            return p.color_attr(world, (c, a), (d, b))
    raise ValueError(f"unknown task {tag!r}; the tasks are {', '.join(TASKS)}")


def training_scene(world: World, rng: np.random.Generator, task_weights: Mapping[str, float] = TASK_WEIGHTS) -> Scene:
    """A random training scene: the task drawn by ``task_weights``, held-out compositions never."""
    weights = np.array([task_weights[tag] for tag in TASKS])
    tag = TASKS[rng.choice(len(TASKS), p=weights / weights.sum())]
    while True:
        prompt = random_prompt(world, tag, rng)
        if not prompt.held_out:
            return scene_for(world, prompt, rng)
