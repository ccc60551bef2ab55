"""GenEval's own 553 prompts, drawn anew as their authors drew them (arXiv 2310.11513)."""

from __future__ import annotations

import numpy as np

from emf_lightning.data.shapes.prompts import NUMBER_WORDS, RELATIONS, Prompt, plural, with_article
from emf_lightning.data.shapes.world import PALETTE

COLOURS = tuple(PALETTE)
"""GenEval's ten colour words, in the order that fixes their indices."""

# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""The 80 things of COCO in its order, three of them under GenEval's names: a detector's labels are known by number."""

IMAGES_PER_PROMPT = 4
"""Images that the published scores draw of each prompt: 2,212 in all."""


def geneval_prompts(per_task: int = 100, seed: int = 43) -> list[Prompt]:
    """The records of GenEval's ``evaluation_metadata.jsonl``, in its order; 553 of them with the defaults.

    The numbers of the published generator are drawn in its order: a prompt for each class, then ``per_task`` of each
    further task; records that come again are dropped. Nobody is given a colour but things: a person never is.

    Args:
        per_task: prompts drawn for each task but single objects.
        seed: of numpy's default generator.
    """
    rng = np.random.default_rng(seed)
    prompts = [
        Prompt("single_object", f"a photo of {with_article(CLASSES[i])}", ({"class": CLASSES[i], "count": 1},))
        for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)
    ]
    for _ in range(per_task):
        a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
        text = f"a photo of {with_article(a)} and {with_article(b)}"
        prompts.append(Prompt("two_object", text, ({"class": a, "count": 1}, {"class": b, "count": 1})))
    for _ in range(per_task):
        thing, count = CLASSES[rng.choice(len(CLASSES))], int(rng.integers(2, 4, endpoint=True))
        wanted, too_many = {"class": thing, "count": count}, {"class": thing, "count": count + 1}
        prompts.append(Prompt("counting", f"a photo of {NUMBER_WORDS[count]} {plural(thing)}", (wanted,), (too_many,)))
    for _ in range(per_task):
        thing = CLASSES[rng.choice(len(CLASSES) - 1) + 1]
        colour = COLOURS[rng.choice(len(COLOURS))]
        text = f"a photo of {with_article(colour)} {thing}"
        prompts.append(Prompt("colors", text, ({"class": thing, "count": 1, "color": colour},)))
    for _ in range(per_task):
        a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        text = f"a photo of {with_article(a)} {relation} {with_article(b)}"
        wanted = {"class": a, "count": 1, "position": (relation, 0)}
        prompts.append(Prompt("position", text, ({"class": b, "count": 1}, wanted)))
    for _ in range(per_task):
        a, b = (CLASSES[i + 1] for i in rng.choice(len(CLASSES) - 1, size=2, replace=False))
        c, d = (COLOURS[i] for i in rng.choice(len(COLOURS), size=2, replace=False))
        text = f"a photo of {with_article(c)} {a} and {with_article(d)} {b}"
        include = ({"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d})
        prompts.append(Prompt("color_attr", text, include))
    return list({repr(prompt): prompt for prompt in prompts}.values())
