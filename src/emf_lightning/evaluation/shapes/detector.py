"""An exact detector for the objects of a shapes world, strict enough to reject noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import BACKGROUND, PALETTE
from emf_lightning.data.shapes.world import World
from emf_lightning.evaluation.geneval.verdict import Detection
from emf_lightning.evaluation.shapes.components import compact_parts, connected_components
from emf_lightning.evaluation.shapes.templates import binomial, templates_of

UNKNOWN = "unknown"
"""Label of a region that is none of the world's shapes: no prompt names it, but ``strict`` verdicts count it."""

GREY = np.array(BACKGROUND, np.float32)
BACKGROUND_TOLERANCE = 30.0
"""Largest difference of the median border pixel from the nominal grey, per channel, 8-bit."""
COLOUR_TOLERANCE = 35.0
"""Largest distance of a smoothed pixel from the ray grey -> palette colour, 8-bit RGB; other pixels are blends."""
MIN_ALPHA = 0.4
"""Least alpha of an object's pixel; fainter haze is background."""
EDGE = 3
"""Width in pixels of the blurred edge that belongs to a region; haze further out is ignored."""
MIN_AREA = 0.25
"""Least area of a region, as a share of the world's smallest object; smaller ones are ignored."""
PARTS = (2, 3, 4)
"""Numbers of parts into which a region that fits no shape is split: objects of one colour may touch."""

CORRELATION = 0.975
"""Least normalised correlation with a template."""
DEVIATION = 0.3
"""Largest local difference from the template, relative to the region's contrast; it catches dents."""
MARGIN = 0.001
"""Least difference in correlation from the second-best shape."""
CONTRAST = (0.6, 1.3)
"""Least and largest contrast of a region to the background, relative to its palette colour's."""
SIZE = (0.85, 1.15)
"""Least and largest radius, relative to the world's own limits."""
COUNTED_MISFIT = 0.9
"""Misfit (1 = at one of the limits above) with a score of .9, GenEval's threshold for counting."""

WORKING_RADIUS = 4.5
"""Mean radius in pixels to which larger worlds are averaged down; shapes stay distinguishable."""
CHUNK = 64
"""Images measured at once: larger batches are no faster and take more memory."""
SMALLEST_AREA = 2.2
LARGEST_AREA = 3.2
"""Areas in squared radii of the triangle, the smallest shape, and of the square, the largest."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class _Regions:
    """K connected regions; every field is an array over K."""

    number: Ids  # value of its pixels in the map of owners
    plane: Ids  # image of the batch
    colour: Ids  # index; the number of colours means a blend
    shape: Ids
    misfit: NDArray[np.float64]  # largest measurement relative to its limit; below 1 the region is an object
    area: NDArray[np.float64]
    corner: Ids  # [K, 2]: x, y of the window's first pixel
    mask: NDArray[np.bool_]  # [K, window, window]

    def __getitem__(self, rows: NDArray[np.bool_]) -> _Regions:
        return _Regions(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __add__(self, other: _Regions) -> _Regions:
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return _Regions(*(np.concatenate(pair) for pair in pairs))


class ShapesDetector:
    """Finds the coloured shapes of ``world`` at any position, without using the world's cells.

    A pixel's alpha is its projection on the ray from the border's grey to the nearest palette colour. Connected pixels
    of one colour are a region. A region is an object if its alpha matches an analytic template of the same centroid and
    area; otherwise its label is ``UNKNOWN``.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._stride = max(1, int(sum(world.radius) / 2 * world.cell / WORKING_RADIUS))
        self._templates = templates_of(replace(world, canvas=world.canvas // self._stride))
        self._rays = np.array([PALETTE[name] for name in world.colours], np.float32) - GREY
        self._squared = (self._rays**2).sum(1)
        smallest, largest = (fraction * world.cell / self._stride for fraction in world.radius)
        radii = self._templates.radii
        self._plausible = (radii > SIZE[0] * smallest) & (radii < SIZE[1] * largest)
        self._areas = SMALLEST_AREA * smallest**2, LARGEST_AREA * largest**2

    def __call__(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Detections in ``image`` ``[H, W, 3]``, 8-bit RGB, best first."""
        return self.detect_batch(image[None])[0]

    def detect_batch(self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> list[list[Detection]]:
        """Detections in each of ``images`` ``[N, H, W, 3]``, best first; twice as fast as one at a time.

        An image with another background than the world's grey has no detections.

        Raises:
            ValueError: for images that are not 8-bit RGB of the world's size.
        """
        excess, grey = self._excess(images)
        rows_with_objects = np.flatnonzero(grey)
        seen: list[list[Detection]] = [[] for _ in range(len(excess))]
        for start in range(0, len(rows_with_objects), CHUNK):
            rows = rows_with_objects[start : start + CHUNK]
            for row, found in zip(rows, self._detect(excess[rows]), strict=True):
                seen[row] = found
        return seen

    def contrasts(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Ids]:
        """Contrast of each smoothed pixel to the background, 1 on a clear object, and the index of its nearest colour.

        Both are ``[N, h, w]``, in the detector's working pixels. The index of blends is the number of colours, and
        their contrast is relative to the palette's least. An image with another background than the world's grey has
        contrast 0.
        """
        excess, grey = self._excess(images)
        strength, alphas, colour, blend = self._colours(excess)
        of_colour = np.take_along_axis(alphas, colour[..., None], -1)[..., 0]
        contrast = np.where(blend, np.sqrt(strength / self._squared.min()), of_colour)
        return contrast * grey[:, None, None], np.where(blend, len(self._rays), colour)

    @property
    def least_area(self) -> float:
        """Least area of a region in working pixels."""
        return MIN_AREA * self._areas[0]

    def _excess(self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], Any]:
        """Images minus their background, in working pixels, and whether that background is the world's grey."""
        images = np.asarray(images)
        side = self.world.canvas
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images must be uint8 [N, {side}, {side}, 3], the {self.world.name!r} world's, "
                f"got {images.dtype} {list(images.shape)}; resize them, or name their own world"
            )
        k, n = self._stride, len(images)
        pixels = images.reshape(n, side // k, k, side // k, k, 3).mean((2, 4), dtype=np.float32)
        border = np.ones(pixels.shape[1:3], bool)  # the two outermost rows and columns on each side
        border[2:-2, 2:-2] = False
        background = np.median(pixels[:, border], axis=1)
        return pixels - background[:, None, None], (abs(background - GREY) <= BACKGROUND_TOLERANCE).all(1)

    def _colours(self, excess: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], Ids, Any]:
        """Smoothed strength and alphas of every colour, the nearest colour, and whether a pixel is a blend instead."""
        smooth = binomial(excess.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        alphas = np.maximum(smooth @ (self._rays / self._squared[:, None]).T, 0)  # [N, H, W, colours]
        strength = (smooth**2).sum(-1)
        distances = strength[..., None] - alphas**2 * self._squared
        return strength, alphas, distances.argmin(-1), distances.min(-1) > COLOUR_TOLERANCE**2

    def _detect(self, excess: NDArray[np.float32]) -> list[list[Detection]]:
        """Detections in images minus their background."""
        strength, alphas, colour, blend = self._colours(excess)
        projector = self._rays / self._squared[:, None]
        sharp = (excess * projector[colour]).sum(-1)  # not smoothed, to keep narrow gaps
        classes = np.where(blend, len(self._rays), np.where(sharp > MIN_ALPHA, colour, -1))
        # blends are one more colour with an alpha of its own
        alphas = np.concatenate([alphas, np.sqrt(strength)[..., None] / COLOUR_TOLERANCE], -1)

        labels = connected_components(classes)
        kept = np.bincount(labels.ravel()) >= MIN_AREA * self._areas[0]
        kept[0] = False
        labels = np.where(kept, np.cumsum(kept), 0)[labels]  # renumbered from 1
        colours = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
        colours[labels] = classes
        owner: Ids = labels
        for _ in range(EDGE):  # each free pixel joins a neighbour's region
            owner = np.where(owner > 0, owner, _neighbours(owner).max(0))
        edge = (owner > 0) & (labels == 0)
        regions = self._measure(owner, edge, colours[1:], alphas)
        for parts in PARTS:
            regions = self._split(regions, parts, owner, edge, alphas)
        return self._report(regions, len(excess))

    def _measure(self, owner: Ids, edge: NDArray[np.bool_], colour: Ids, alphas: NDArray[np.float32]) -> _Regions:
        """Matches the regions, numbered from 1 in ``owner`` ``[N, H, W]``, with the templates."""
        templates, k = self._templates, len(colour)
        number = np.arange(1, k + 1)
        plane = np.zeros(k + 1, np.int64)
        plane[owner] = np.arange(len(owner))[:, None, None]
        alpha = np.take_along_axis(alphas, np.append(0, colour)[owner][..., None], -1)[..., 0] * (owner > 0)
        y, x = (np.broadcast_to(axis, alpha.shape) for axis in np.ogrid[: alpha.shape[1], : alpha.shape[2]])

        def sums(values: NDArray[np.floating]) -> NDArray[np.float64]:
            return np.asarray(np.bincount(owner.ravel(), values.ravel(), k + 1)[1:], np.float64)

        total = sums(alpha) + 1e-6
        centroid = np.stack([sums(alpha * x), sums(alpha * y)], 1) / total[:, None]
        area = total**2 / (sums(alpha**2) + 1e-6)
        corner = np.rint(centroid).astype(np.int64)  # after padding by half a window: the window's first pixel
        half_window = templates.window // 2
        padding = ((0, 0), (half_window, half_window), (half_window, half_window))
        span = np.arange(templates.window)
        window = plane[1:, None, None], (corner[:, 1:] + span)[:, :, None], (corner[:, :1] + span)[:, None, :]
        own = np.pad(owner, padding)[window] == number[:, None, None]
        seen = np.where(own, np.pad(alpha, padding)[window], np.float32(0))
        # the alpha is unknown where edges of two regions meet
        on_edge = np.pad(edge, padding)[window]
        known = ~np.pad(edge & _disputed(owner), padding)[window] & (own | ~on_edge)
        match = templates.match(seen, known, centroid - corner, area)
        refused = (
            (match.margin < MARGIN)
            | (match.contrast < CONTRAST[0])
            | (match.contrast > CONTRAST[1])
            | ~self._plausible[match.radius]
            | (colour == len(self._rays))
        )
        misfit = np.maximum((1 - match.correlation) / (1 - CORRELATION), match.deviation / DEVIATION)
        half = 0.5 * np.minimum(match.contrast, seen.max((1, 2), initial=0))
        return _Regions(
            number=number,
            plane=plane[1:],
            colour=colour,
            shape=match.shape,
            misfit=np.where(refused, np.inf, misfit),
            area=area,
            corner=corner - half_window,
            mask=own & (~on_edge | (seen > half[:, None, None])),
        )

    def _split(
        self, regions: _Regions, parts: int, owner: Ids, edge: NDArray[np.bool_], alphas: NDArray[np.float32]
    ) -> _Regions:
        """Replaces each region that fits no shape by its ``parts`` compact parts if all of those fit."""
        least, most = (parts * area for area in self._areas)
        fits = (regions.misfit >= 1) & (regions.colour < len(self._rays))
        candidates = np.flatnonzero(fits & (regions.area > 0.8 * least) & (regions.area < 1.4 * most))
        if not candidates.size:
            return regions
        # one plane for each candidate, so that its parts meet no other region
        pieces = np.zeros((len(candidates), *owner.shape[1:]), np.int64)
        for row, i in enumerate(candidates):
            y, x = np.nonzero(owner[regions.plane[i]] == regions.number[i])
            pieces[row, y, x] = row * parts + 1 + compact_parts(np.stack([x, y], 1).astype(np.float32), parts)
        planes = regions.plane[candidates]
        seam = (edge[planes] & (pieces > 0)) | _disputed(pieces)
        found = self._measure(pieces, seam, np.repeat(regions.colour[candidates], parts), alphas[planes])
        good = (found.misfit.reshape(-1, parts) < 1).all(1)
        found = replace(found, plane=np.repeat(planes, parts))[np.repeat(good, parts)]
        whole = np.ones(len(regions.number), bool)
        whole[candidates[good]] = False
        return regions[whole] + found

    def _report(self, regions: _Regions, n: int) -> list[list[Detection]]:
        """Detections of ``n`` images in pixels of the world, best first."""
        seen: list[list[Detection]] = [[] for _ in range(n)]
        known = regions.misfit < 1
        scores = np.where(known, np.interp(regions.misfit, (0.0, COUNTED_MISFIT, 1.0), (1.0, 0.9, 0.3)), 1.0)
        colours = (*self.world.colours, None)
        side, window = self.world.canvas // self._stride, self._templates.window
        for i in np.argsort(-scores, kind="stable"):
            # the window may extend beyond the canvas: paste it into a larger plane and crop that
            x, y = regions.corner[i] + window
            plane = np.zeros((side + 2 * window,) * 2, bool)
            plane[y : y + window, x : x + window] = regions.mask[i]
            mask = plane[window:-window, window:-window].repeat(self._stride, 0).repeat(self._stride, 1)
            if mask.any():
                label = self.world.shapes[regions.shape[i]] if known[i] else UNKNOWN
                detection = Detection.of_mask(label, float(scores[i]), mask, colours[regions.colour[i]])
                seen[regions.plane[i]].append(detection)
        return seen


def _neighbours(owner: Ids) -> Ids:
    """The owners ``[4, N, H, W]`` of the pixels above, below, left and right; 0 beyond the border."""
    padded = np.pad(owner, ((0, 0), (1, 1), (1, 1)))
    return np.stack([padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]])


def _disputed(owner: Ids) -> NDArray[np.bool_]:
    """Mask of the pixels with a neighbour in another region."""
    beside = _neighbours(owner)
    return ((beside != owner) & (beside > 0)).any(0)
