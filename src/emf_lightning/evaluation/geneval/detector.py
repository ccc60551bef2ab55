"""Base class of GenEval's object detectors, and a check that one works."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.evaluation.geneval.verdict import COUNTING_THRESHOLD, THRESHOLD, Detection

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
"""COCO's 80 thing classes in its order, which numbers a detector's labels; three have GenEval's names."""

PERSON_SHARE = (0.2, 0.9)
"""Least and largest share of the sample photograph in the person's mask; she fills about half of it."""


class ObjectDetector(ABC):
    """Finds the instances of GenEval's 80 classes, under GenEval's names; ``name`` is the detector's own in reports."""

    name: str

    @abstractmethod
    def __call__(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Objects in ``image`` ``[H, W, 3]``, 8-bit RGB, with scores above GenEval's lower threshold, best first."""

    def settings(self) -> dict[str, Any]:
        """Everything that comparable detections must share: name, weights, image size; plain values."""
        return {"detector": self.name}


def check_detector(detector: ObjectDetector) -> None:
    """Tests ``detector`` on a photograph of a person, which comes with matplotlib, and on a plain grey image.

    A detector with a wrong configuration or half of its weights otherwise shows only in scores of a few per cent.

    Raises:
        ValueError: if it does not find one person of a high score, or finds an object of a high score on plain grey.
    """
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with Image.open(get_sample_data("grace_hopper.jpg")) as opened:
        photograph = np.asarray(opened.convert("RGB"))
    found = detector(photograph)
    people = [d for d in found if d.label == "person" and d.score > COUNTING_THRESHOLD]
    fills = bool(people) and PERSON_SHARE[0] < people[0].mask.mean() < PERSON_SHARE[1]
    phantoms = [d for d in detector(np.full((512, 512, 3), 153, np.uint8)) if d.score > COUNTING_THRESHOLD]
    if len(people) == 1 and fills and not phantoms:
        return
    best = max((d.score for d in found if d.label == "person"), default=0.0)
    seen = f"a person of score {best:.2f}" if best > THRESHOLD else "no person"
    if people and not fills:
        seen = f"a person who covers {people[0].mask.mean():.0%} of it"
    if len(people) > 1:
        seen = f"{len(people)} people"
    extra = f", and on plain grey {phantoms[0].label!r} of score {phantoms[0].score:.2f}" if phantoms else ""
    raise ValueError(
        f"{type(detector).__name__}: {detector.name} is broken: on a portrait photograph it sees {seen}{extra}; its "
        "scores would mean nothing: give weights that are complete and belong to their configuration"
    )
