"""GenEval's prompts (arXiv 2310.11513): its six tasks and its vocabulary, for any list of object classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tags, in its order."""

RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (125, 40, 175),
    "pink": (250, 150, 195),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
"""GenEval's ten colour words, in the order that fixes their indices, each with an 8-bit RGB value of ours."""

BACKGROUND = (153, 153, 153)
"""GenEval's neutral grey #999, 8-bit RGB."""


@dataclass(frozen=True)
class Prompt:
    """One record of GenEval's ``evaluation_metadata.jsonl``.

    Attributes:
        tag: one of ``TASKS``.
        prompt: the caption.
        include: objects that the image must show: ``{"class", "count"[, "color"][, "position": (relation, index)]}``;
            ``index`` is the place of the reference object in ``include``.
        exclude: objects that it must not show, likewise (counting only).
        held_out: whether the composition is kept from the training images.
    """

    tag: str
    prompt: str
    include: tuple[dict[str, Any], ...]
    exclude: tuple[dict[str, Any], ...] = field(default=())
    held_out: bool = False

    def metadata(self) -> dict[str, Any]:
        """The record in GenEval's format, plus ``held_out``."""
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


def single_object(label: str) -> Prompt:
    """ "a photo of a bench"."""
    return Prompt("single_object", f"a photo of {with_article(label)}", ({"class": label, "count": 1},))


def two_object(a: str, b: str) -> Prompt:
    """ "a photo of a bench and a dog"."""
    include = ({"class": a, "count": 1}, {"class": b, "count": 1})
    return Prompt("two_object", f"a photo of {with_article(a)} and {with_article(b)}", include)


def counting(label: str, count: int) -> Prompt:
    """ "a photo of three dogs"; one more is too many."""
    exact, too_many = {"class": label, "count": count}, {"class": label, "count": count + 1}
    return Prompt("counting", f"a photo of {NUMBER_WORDS[count]} {plural(label)}", (exact,), (too_many,))


def colors(colour: str, label: str) -> Prompt:
    """ "a photo of a red bench"."""
    include = ({"class": label, "count": 1, "color": colour},)
    return Prompt("colors", f"a photo of {with_article(colour)} {label}", include)


def position(a: str, relation: str, b: str) -> Prompt:
    """ "a photo of a dog left of a bench"; the reference object b comes first in ``include``."""
    include = ({"class": b, "count": 1}, {"class": a, "count": 1, "position": (relation, 0)})
    return Prompt("position", f"a photo of {with_article(a)} {relation} {with_article(b)}", include)


def color_attr(a: tuple[str, str], b: tuple[str, str]) -> Prompt:
    """ "a photo of a red bench and a blue cup"; a and b are (colour, class)."""
    text = f"a photo of {with_article(a[0])} {a[1]} and {with_article(b[0])} {b[1]}"
    include = ({"class": a[1], "count": 1, "color": a[0]}, {"class": b[1], "count": 1, "color": b[0]})
    return Prompt("color_attr", text, include)


def sample_prompts(
    classes: Sequence[str], colours: Sequence[str], per_task: int, seed: int, colourless: int = 0
) -> list[Prompt]:
    """GenEval's prompt list for any classes, with duplicates: the published generator's random numbers in its order.

    One prompt for each class, then ``per_task`` of each further task. The first ``colourless`` classes never get a
    colour; ``seed`` is that of numpy's default generator.
    """
    rng = np.random.default_rng(seed)
    coloured, times = classes[colourless:], range(per_task)

    def one(names: Sequence[str]) -> str:
        return names[rng.choice(len(names))]

    def several(names: Sequence[str], count: int = 2) -> list[str]:
        return [names[i] for i in rng.choice(len(names), size=count, replace=False)]

    prompts = [single_object(label) for label in several(classes, len(classes))]
    prompts += [two_object(*several(classes)) for _ in times]
    prompts += [counting(one(classes), int(rng.integers(2, 4, endpoint=True))) for _ in times]
    prompts += [colors(label=one(coloured), colour=one(colours)) for _ in times]
    pairs = [(several(classes), one(RELATIONS)) for _ in times]
    prompts += [position(a, relation, b) for (a, b), relation in pairs]
    painted = [(several(coloured), several(colours)) for _ in times]
    prompts += [color_attr((i, a), (j, b)) for (a, b), (i, j) in painted]
    return prompts
