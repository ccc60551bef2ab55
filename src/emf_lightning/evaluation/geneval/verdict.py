"""GenEval's decision whether an image shows its prompt, given what a detector saw (arXiv 2310.11513)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.shapes.prompts import Prompt

THRESHOLD = 0.3
"""A detection counts when its score lies above this,"""
COUNTING_THRESHOLD = 0.9
"""or above this, for every class of a counting prompt."""
MAX_OBJECTS = 16
"""Detections kept per class, the best first."""
POSITION_THRESHOLD = 0.1
"""Share of the two objects' size by which their offset is shortened before it is read as a relation."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object that a detector saw.

    Attributes:
        label: its class.
        score: the detector's confidence in [0, 1].
        box: (x0, y0, x1, y1) in pixels, the far edges exclusive.
        mask: ``[H, W]``, bool, True on the object.
        colour: its colour where the detector tells, else None.
    """

    label: str
    score: float
    box: Box
    mask: NDArray[np.bool_]
    colour: str | None = None


@dataclass(frozen=True)
class Judgement:
    """Whether an image shows its prompt.

    Attributes:
        correct: GenEval's decision.
        strict: correct, and the image holds exactly as many objects as the prompt names, whatever their class.
        reason: what was missing, one line a finding; empty where nothing was.
        boxes: class -> box and score of each detection that counted, best first: GenEval's ``details``.
    """

    correct: bool
    strict: bool
    reason: str
    boxes: dict[str, list[list[float]]] = field(default_factory=dict)


ColourReader = Callable[[Sequence[Detection], str], Sequence[str | None]]
"""Colours of the given detections, all of the class named; GenEval's own step asks CLIP about masked crops."""


def detected_colours(detections: Sequence[Detection], label: str) -> list[str | None]:
    """The colours that the detector itself reported."""
    return [detection.colour for detection in detections]


def relations(a: Box, b: Box) -> set[str]:
    """Where box ``a`` stands to box ``b``: none, one or (on a diagonal) two of GenEval's four relations.

    The offset of the centres is shortened by a tenth of both sizes, then divided by the length of the *unshortened*
    offset, so that boxes that nearly touch fall short of the .5 that makes a relation.
    """
    corners_a, corners_b = np.asarray(a, float).reshape(2, 2), np.asarray(b, float).reshape(2, 2)
    offset = corners_a.mean(0) - corners_b.mean(0)
    sizes = abs(np.diff(corners_a, axis=0)[0]) + abs(np.diff(corners_b, axis=0)[0])
    shortened = np.maximum(abs(offset) - POSITION_THRESHOLD * sizes, 0.0) * np.sign(offset)
    if (abs(shortened) < 1e-3).all():
        return set()
    dx, dy = shortened / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}


def judge(detections: Sequence[Detection], prompt: Prompt, read_colours: ColourReader = detected_colours) -> Judgement:
    """GenEval's decision on one image.

    Of each class the detections above the threshold count, at most 16, overlapping ones too. Objects that the prompt
    does not name are not held against the image, except in counting; colour and position look at the most confident.

    Args:
        detections: what was seen, in any order; classes that the prompt does not name matter to ``strict`` only.
        prompt: what should be seen.
        read_colours: names the colours of detections of one class.
    """
    threshold = COUNTING_THRESHOLD if prompt.tag == "counting" else THRESHOLD
    ranked = sorted(detections, key=lambda detection: (-detection.score, detection.box))
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []

    def seen(label: str) -> list[Detection]:
        return [d for d in ranked if d.label == label and d.score > threshold][:MAX_OBJECTS]

    for wanted in prompt.include:
        label, count = wanted["class"], wanted["count"]
        found = seen(label)[:count]
        findings: list[str] = []
        if len(found) < count:
            findings.append(f"expected {label}>={count}, found {len(found)}")
        else:
            if "color" in wanted:
                colours = list(read_colours(found, label))
                if colours.count(wanted["color"]) < count:
                    names = ", ".join(str(colour) for colour in colours)
                    findings.append(f"expected {wanted['color']} {label}>={count}, found {names}")
            if "position" in wanted and not findings:
                relation, index = wanted["position"]
                target = groups[index]
                if target is None:
                    findings.append(f"no target for {label} to be {relation}")
                else:
                    pairs = ((a, b) for a in found for b in target)
                    wrong = next(((a, b) for a, b in pairs if relation not in relations(a.box, b.box)), None)
                    if wrong is not None:
                        held = " and ".join(sorted(relations(wrong[0].box, wrong[1].box))) or "no relation to"
                        findings.append(f"expected {label} {relation} target, found {held} target")
        groups.append(None if findings else found)
        reasons += findings
    for unwanted in prompt.exclude:
        label, count = unwanted["class"], unwanted["count"]
        if (number := len(seen(label))) >= count:
            reasons.append(f"expected {label}<{count}, found {number}")
    objects = sum(detection.score > THRESHOLD for detection in ranked)
    correct = not reasons
    strict = correct and objects == sum(wanted["count"] for wanted in prompt.include)
    boxes = {label: [[*d.box, d.score] for d in seen(label)] for label in dict.fromkeys(d.label for d in ranked)}
    return Judgement(correct, strict, "\n".join(reasons), {label: found for label, found in boxes.items() if found})
