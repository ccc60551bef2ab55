"""The kind of failure of an image of a shapes world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.geneval.verdict import COUNTING_THRESHOLD, THRESHOLD, Detection, evaluate
from emf_lightning.evaluation.shapes.components import connected_components
from emf_lightning.evaluation.shapes.detector import CHUNK, UNKNOWN, ShapesDetector

CORRECT = "correct"
SUPERPOSITION = "superposition"
BLENDED = "blended colour"
FAINT_OBJECT = "faint object"
NOTHING = "nothing recognisable"
COUNT = "wrong count"
MALFORMED = "malformed object"
SHAPE = "wrong shape"
COLOUR = "wrong colour"
BINDING = "wrong binding"

KINDS: dict[str, str] = {
    SUPERPOSITION: "a faint blob is there, and faint and clear blobs together are more than the prompt's objects",
    BLENDED: "as many regions as objects, but the colour of one lies between those of the palette",
    FAINT_OBJECT: "a faint blob is there, but no more blobs than objects: layouts that cancel out, or a pale object",
    NOTHING: "no region has the shape of an object",
    COUNT: "more or fewer regions than objects",
    MALFORMED: "as many regions as objects, but one has no shape of the world",
    SHAPE: "as many objects as the prompt names, but one has another shape",
    COLOUR: "the shapes are right, but a colour that the prompt names is missing",
    BINDING: "shapes and colours are right, but a colour is at the wrong object, or the objects stand wrongly",
}
"""Kind -> its definition, in the order in which they are tried: the first that fits is the failure's only kind."""

MIXED = (SUPERPOSITION, BLENDED, FAINT_OBJECT)
"""The kinds of an image that is between images."""

FAINT, CLEAR = 0.15, 0.75
"""Contrast from which a smoothed pixel is part of a blob, and from which the blob is clear."""
BACKGROUND, PLAIN = 0.1, 0.35
"""A background is plain if at least this share, ``PLAIN``, of the smoothed pixels has a contrast below the first."""
EDGE = 2
"""Working pixels around a clear blob that are its edge and no faint blob."""


def failure_kinds(
    detector: ShapesDetector, images: NDArray[np.uint8], prompts: Sequence[Prompt]
) -> tuple[list[str], list[list[Detection]]]:
    """The kind of each of ``images`` ``[N, H, W, 3]``, ``CORRECT`` or one of ``KINDS``, and its detections.

    A region is a detection: an object, or one of no known shape. ``blobs`` defines faint and clear ones.
    """
    kinds, layouts = list[str](), list[list[Detection]]()
    for first in range(0, len(images), CHUNK):
        part = slice(first, first + CHUNK)
        seen = detector.detect_batch(images[part])
        kinds += [failure_kind(*row) for row in zip(seen, prompts[part], *blobs(detector, images[part]), strict=True)]
        layouts += seen
    return kinds, layouts


def failure_kind(detections: Sequence[Detection], prompt: Prompt, faint: int = 0, clear: int = 0) -> str:
    """The kind of one image, from its detections and its numbers of faint and clear blobs."""
    if evaluate(detections, prompt).correct:
        return CORRECT
    wanted = [(item["class"], item.get("color")) for item in prompt.include for _ in range(item["count"])]
    least = COUNTING_THRESHOLD if prompt.tag == "counting" else THRESHOLD
    regions = [d for d in detections if d.score > THRESHOLD]
    objects = [d for d in regions if d.label != UNKNOWN and d.score > least]
    asked = Counter(colour for _, colour in wanted if colour is not None)
    if faint and faint + clear > len(wanted):
        return SUPERPOSITION
    if len(regions) == len(wanted) and any(d.colour is None for d in regions):
        return BLENDED
    if faint:
        return FAINT_OBJECT
    if not objects:
        return NOTHING
    if len(regions) != len(wanted):
        return COUNT
    if len(objects) < len(regions):
        return MALFORMED
    if Counter(d.label for d in objects) != Counter(shape for shape, _ in wanted):
        return SHAPE
    if asked - Counter(d.colour for d in objects if d.colour is not None):
        return COLOUR
    return BINDING


def blobs(detector: ShapesDetector, images: NDArray[np.uint8]) -> tuple[list[int], list[int]]:
    """Numbers of faint and of clear blobs of each of ``images``.

    A blob is connected pixels of one nearest colour, at least as large as a region of the detector. A clear one has
    contrasts of ``CLEAR`` and more; a faint one contrasts from ``FAINT`` up, more than ``EDGE`` pixels away from every
    clear pixel. An image without a plain background, such as noise, has no blobs. The mean of two images has the
    objects of both as faint blobs, where they do not cover each other.
    """
    contrast, colour = detector.contrasts(images)
    plain = (contrast < BACKGROUND).mean((1, 2)) >= PLAIN
    contrast = contrast * plain[:, None, None]
    clear = contrast >= CLEAR
    near = ndimage.binary_dilation(clear, np.ones((1, 3, 3), bool), EDGE)
    faint = (contrast >= FAINT) & ~near
    return _count(faint, colour, detector.least_area), _count(clear, colour, detector.least_area)


def _count(mask: NDArray[np.bool_], colour: NDArray[np.int64], least: float) -> list[int]:
    labels = connected_components(np.where(mask, colour, -1))
    large = np.bincount(labels.ravel()) >= least
    large[0] = False
    return [int(large[np.unique(plane)].sum()) for plane in labels]
