"""GenEval's verdict on an image: whether the detected objects satisfy the prompt (arXiv 2310.11513)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import Prompt

THRESHOLD = 0.3
"""A detection counts if its score is above this."""
COUNTING_THRESHOLD = 0.9
"""The threshold for counting prompts."""
MAX_OBJECTS = 16
"""Detections kept of each class, those of the highest scores."""
POSITION_THRESHOLD = 0.1
"""Share of both boxes' sizes that is subtracted from the offset of their centres before its direction is taken."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        score: the detector's confidence in [0, 1].
        box: (x0, y0, x1, y1) in pixels, the far edges exclusive.
        mask: ``[H, W]``, bool, True on the object.
        colour: its colour where the detector reports one, else None.
    """

    label: str
    score: float
    box: Box
    mask: NDArray[np.bool_]
    colour: str | None = None

    @classmethod
    def of_mask(cls, label: str, score: float, mask: NDArray[np.bool_], colour: str | None = None) -> Detection:
        """The detection whose box is that of ``mask``, which has at least one pixel."""
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        return cls(label, score, box, mask, colour)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image.

    Attributes:
        correct: GenEval's verdict.
        strict: correct, and the image shows exactly as many objects as the prompt names, whatever their class.
        reason: unmet requirements, one a line; empty for a correct image.
        boxes: class -> box and score of each detection that counted, highest score first: GenEval's ``details``.
    """

    correct: bool
    strict: bool
    reason: str
    boxes: dict[str, list[list[float]]] = field(default_factory=dict)


ColourClassifier = Callable[[Sequence[Detection], str], Sequence[str | None]]
"""Maps detections, all of the class named, to their colours; GenEval classifies masked crops with CLIP."""


def detected_colours(detections: Sequence[Detection], label: str) -> list[str | None]:
    """The colours that the detector itself reported."""
    return [detection.colour for detection in detections]


def relations(a: Box, b: Box) -> set[str]:
    """GenEval's relations of box ``a`` to box ``b``: none, one, or two on a diagonal.

    The offset of the centres, less a tenth of both sizes, is divided by the length of the *whole* offset: a relation
    holds where that is above .5, which boxes that nearly touch do not reach.
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


def evaluate(
    detections: Sequence[Detection], prompt: Prompt, classify_colours: ColourClassifier = detected_colours
) -> Verdict:
    """GenEval's verdict on one image.

    Of each class, at most 16 detections above the threshold count, overlapping ones too. Objects that the prompt does
    not name are ignored, except in counting and in ``strict``. Colour and position are those of the detections with the
    highest scores; detections come in any order.
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
                colours = list(classify_colours(found, label))
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
    return Verdict(correct, strict, "\n".join(reasons), {label: found for label, found in boxes.items() if found})
