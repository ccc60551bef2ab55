"""GenEval's six tasks in the vocabulary of a shapes world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from emf_lightning.data import geneval_prompts as geneval
from emf_lightning.data.geneval_prompts import RELATIONS, TASKS, Prompt
from emf_lightning.data.shapes.world import World
from emf_lightning.files import replacing


def mark_held_out(world: World, prompt: Prompt) -> Prompt:
    """``prompt`` with ``held_out`` set where no training image of ``world`` shows its composition."""
    pairs = {(item.get("color"), item["class"]) for item in prompt.include}
    shapes = frozenset(shape for _, shape in pairs)
    return replace(prompt, held_out=not world.held_out_pairs.isdisjoint(pairs) or shapes in world.held_out_shape_pairs)


def evaluation_prompts(world: World, per_task: int = 100) -> list[Prompt]:
    """GenEval's prompt list with the world's shapes in place of COCO's classes; see ``sample_prompts``.

    Of duplicates the last stays, unlike in GenEval's list: a task may have fewer than ``per_task`` prompts.
    """
    prompts = geneval.sample_prompts(world.shapes, world.colours, per_task, seed=43)
    unique = list({prompt.prompt: prompt for prompt in reversed(prompts)}.values())[::-1]
    return [mark_held_out(world, prompt) for prompt in unique]


def write_captions(path: Path, world: World, count: int, seed: int, task_weights: Mapping[str, float]) -> None:
    """Writes ``count`` captions of random compositions, held-out ones included, as a text file with one a line."""
    rng = np.random.default_rng(seed)
    tags, weights = list(task_weights), np.array(list(task_weights.values()))
    chosen = rng.choice(len(tags), count, p=weights / weights.sum())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text("".join(f"{random_prompt(world, tags[i], rng).prompt}\n" for i in chosen))


def random_prompt(world: World, tag: str, rng: np.random.Generator) -> Prompt:
    """A random prompt of task ``tag``, among all compositions, held-out ones included.

    Raises:
        ValueError: for an unknown task.
    """
    shapes, colours = world.shapes, world.colours
    a, b = (shapes[i] for i in rng.choice(len(shapes), 2, replace=False))
    c, d = (colours[i] for i in rng.choice(len(colours), 2, replace=False))
    match tag:
        case "single_object":
            prompt = geneval.single_object(a)
        case "two_object":
            prompt = geneval.two_object(a, b)
        case "counting":
            prompt = geneval.counting(a, int(rng.integers(2, 5)))
        case "colors":
            prompt = geneval.colors(c, a)
        case "position":
            prompt = geneval.position(a, RELATIONS[rng.integers(4)], b)
        case "color_attr":
            prompt = geneval.color_attr((c, a), (d, b))
        case _:
            raise ValueError(f"unknown task {tag!r}; the tasks are {', '.join(TASKS)}")
    return mark_held_out(world, prompt)
