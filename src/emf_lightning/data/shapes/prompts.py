"""GenEval's six tasks over a world's vocabulary: the prompts and what their images must show (arXiv 2310.11513)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emf_lightning.data.shapes.world import World

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tags, in its order."""

RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Prompt:
    """One record of GenEval's ``evaluation_metadata.jsonl``.

    Attributes:
        tag: one of ``TASKS``.
        prompt: the caption.
        include: what must be seen: ``{"class", "count"[, "color"][, "position": (relation, index in include)]}``.
        exclude: what must not be seen, likewise (counting only).
        held_out: whether the composition is kept from the training images.
    """

    tag: str
    prompt: str
    include: tuple[dict[str, Any], ...]
    exclude: tuple[dict[str, Any], ...] = field(default=())
    held_out: bool = False

    def metadata(self) -> dict[str, Any]:
        """The record as GenEval writes it, plus ``held_out``."""
        record: dict[str, Any] = {"tag": self.tag, "include": [dict(item) for item in self.include]}
        if self.exclude:
            record["exclude"] = [dict(item) for item in self.exclude]
        return record | {"prompt": self.prompt, "held_out": self.held_out}


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """GenEval's plural: "es" after an s, else "s"."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def single_object(world: World, shape: str) -> Prompt:
    """ "a photo of a circle"."""
    return Prompt("single_object", f"a photo of {with_article(shape)}", ({"class": shape, "count": 1},))


def two_object(world: World, a: str, b: str) -> Prompt:
    """ "a photo of a circle and a square"."""
    return Prompt(
        "two_object",
        f"a photo of {with_article(a)} and {with_article(b)}",
        ({"class": a, "count": 1}, {"class": b, "count": 1}),
        held_out=world.is_held_out([(None, a), (None, b)]),
    )


def counting(world: World, shape: str, count: int) -> Prompt:
    """ "a photo of three circles"; one more is too many."""
    return Prompt(
        "counting",
        f"a photo of {NUMBER_WORDS[count]} {plural(shape)}",
        ({"class": shape, "count": count},),
        ({"class": shape, "count": count + 1},),
    )


def colors(world: World, colour: str, shape: str) -> Prompt:
    """ "a photo of a red circle"."""
    return Prompt(
        "colors",
        f"a photo of {with_article(colour)} {shape}",
        ({"class": shape, "count": 1, "color": colour},),
        held_out=world.is_held_out([(colour, shape)]),
    )


def position(world: World, a: str, relation: str, b: str) -> Prompt:
    """ "a photo of a circle left of a square"; the reference object b comes first in ``include``."""
    return Prompt(
        "position",
        f"a photo of {with_article(a)} {relation} {with_article(b)}",
        ({"class": b, "count": 1}, {"class": a, "count": 1, "position": (relation, 0)}),
        held_out=world.is_held_out([(None, a), (None, b)]),
    )


def color_attr(world: World, a: tuple[str, str], b: tuple[str, str]) -> Prompt:
    """ "a photo of a red circle and a blue square"; a and b are (colour, shape)."""
    return Prompt(
        "color_attr",
        f"a photo of {with_article(a[0])} {a[1]} and {with_article(b[0])} {b[1]}",
        ({"class": a[1], "count": 1, "color": a[0]}, {"class": b[1], "count": 1, "color": b[0]}),
        held_out=world.is_held_out([a, b]),
    )


def evaluation_prompts(world: World, per_task: int = 100, seed: int = 43) -> list[Prompt]:
    """GenEval's prompt list with the world's classes in place of COCO's.

    The published generator's draws in its order: ``per_task`` prompts a task (one per class for single objects),
    then duplicates dropped, first occurrence kept; a task may therefore have fewer than ``per_task``.
    """
    rng = np.random.default_rng(seed)
    shapes, colours = world.shapes, world.colours
    prompts = [single_object(world, shapes[i]) for i in rng.choice(len(shapes), size=len(shapes), replace=False)]
    for _ in range(per_task):
        a, b = rng.choice(len(shapes), 2, replace=False)
        prompts.append(two_object(world, shapes[a], shapes[b]))
    for _ in range(per_task):
        shape = shapes[rng.choice(len(shapes))]
        prompts.append(counting(world, shape, int(rng.integers(2, 4, endpoint=True))))
    for _ in range(per_task):
        shape = shapes[rng.choice(len(shapes))]
        prompts.append(colors(world, colours[rng.choice(len(colours))], shape))
    for _ in range(per_task):
        a, b = rng.choice(len(shapes), 2, replace=False)
        prompts.append(position(world, shapes[a], RELATIONS[rng.choice(4)], shapes[b]))
    for _ in range(per_task):
        a, b = rng.choice(len(shapes), 2, replace=False)
        i, j = rng.choice(len(colours), 2, replace=False)
        prompts.append(color_attr(world, (colours[i], shapes[a]), (colours[j], shapes[b])))
    return list({prompt.prompt: prompt for prompt in reversed(prompts)}.values())[::-1]
