"""Diagnosis of few-step images beside the parent's images of the same noise: numbers, a page and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.geneval.task_scores import HEADINGS
from emf_lightning.evaluation.reports.contact_sheet import contact_sheet
from emf_lightning.evaluation.reports.figures import save_figure
from emf_lightning.evaluation.sampling_config import step_name
from emf_lightning.evaluation.shapes.detector import ShapesDetector
from emf_lightning.evaluation.shapes.diagnosis.estimates import Mean, deviations, distances
from emf_lightning.evaluation.shapes.diagnosis.failures import CORRECT, KINDS, MIXED, failure_kinds
from emf_lightning.evaluation.shapes.diagnosis.layouts import Layout, same_layout
from emf_lightning.evaluation.shapes.diagnosis.page import page
from emf_lightning.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST = 24
"""Images in the figure."""


@dataclass(frozen=True)
class Samples:
    """Images of one model at one step count, of the same prompts and noise as all others.

    Attributes:
        model: its name in tables.
        steps: from noise to data; 0 for real pictures.
        images: ``[N, H, W, 3]``, 8-bit RGB.
        kinds: of each image, ``CORRECT`` or one of ``KINDS``.
        layouts: detections of each image.
    """

    model: str
    steps: int
    images: NDArray[np.uint8]
    kinds: Sequence[str]
    layouts: Sequence[Layout]

    @classmethod
    def of(
        cls, model: str, steps: int, images: NDArray[np.uint8], prompts: Sequence[Prompt], detector: ShapesDetector
    ) -> Samples:
        """Samples with their kinds and layouts."""
        return cls(model, steps, images, *failure_kinds(detector, images, prompts))

    @property
    def title(self) -> str:
        """Model and steps in words."""
        return f"{self.model}, {step_name(self.steps)}" if self.steps else self.model

    def has(self, kind: str) -> NDArray[np.bool_]:
        """Which images are of a kind, ``[N]``."""
        return np.asarray(self.kinds) == kind


@dataclass(frozen=True)
class Boundary:
    """Distances of noise to a boundary where the parent's layouts part, see ``boundary_distances``.

    Attributes:
        rows: numbers of the images that were measured.
        found: of each, the index of the size.
        sizes: sizes of the steps.
        directions: number of random directions.
    """

    rows: Sequence[int]
    found: NDArray[np.int64]
    sizes: Sequence[float]
    directions: int

    @property
    def bins(self) -> list[str]:
        """A name for each index."""
        edges = [f"{size:g}" for size in self.sizes]
        between = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)]
        return [f"up to {edges[0]}", *between, f"above {edges[-1]}"]


@dataclass(frozen=True)
class Diagnosis:
    """Images of models at several step counts, beside the parent's.

    Attributes:
        prompts: of each of the N images.
        parent: its images, of many steps.
        models: images of each model and step count; the first model at the fewest steps is in the figure.
        real: pictures of the same prompts.
        near: distance up to which two images are near, see ``distances``.
        reach: see ``same_layout``.
        boundary: distances of the noise, where they were measured.
        about: lines of the page's head.
    """

    prompts: Sequence[Prompt]
    parent: Samples
    models: Sequence[Samples]
    real: Samples
    near: float
    reach: float
    boundary: Boundary | None
    about: Mapping[str, str]

    @cached_property
    def texts(self) -> list[str]:
        """The caption of each image."""
        return [prompt.prompt for prompt in self.prompts]

    @cached_property
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Name -> which images: all, the seen and held-out ones, and each task, seen and held-out where it has both."""
        held_out = np.array([prompt.held_out for prompt in self.prompts])
        found = {"all": np.ones(len(held_out), bool), "seen": ~held_out, "held-out": held_out}
        for tag in dict.fromkeys(prompt.tag for prompt in self.prompts):
            task = np.array([prompt.tag == tag for prompt in self.prompts])
            found[HEADINGS.get(tag, tag)] = task
            if (task & held_out).any() and (task & ~held_out).any():
                found |= {f"{HEADINGS.get(tag, tag)}, {n}": task & found[n] for n in ("seen", "held-out")}
        return {name: rows for name, rows in found.items() if rows.any()}

    @cached_property
    def fewest(self) -> list[Samples]:
        """Each model's images of the fewest steps."""
        steps = min(one.steps for one in self.models)
        return [one for one in self.models if one.steps == steps]

    def numbers(self) -> dict[str, Any]:
        """All numbers, as diagnosis.json has them."""
        shown = [*self.models, self.parent, self.real]
        return {
            "about": dict(self.about),
            "kinds": KINDS,
            "near": self.near,
            "reach": self.reach,
            "shares": {one.title: self._shares(one) for one in shown},
            "agreement": {
                **{one.title: self._agreement(one, self._rows) for one in self.models},
                f"{self.parent.title}, other noise": self._agreement(self.parent, self._partners),
            },
            "variance": {one.title: self._variance(one) for one in shown},
            "boundary": self._boundary(),
        }

    def write(self, folder: Path) -> str:
        """Writes diagnosis.md, .json and .png into ``folder``, and returns the page."""
        folder.mkdir(parents=True, exist_ok=True)
        numbers = self.numbers()
        text = page(numbers, [one.title for one in self.fewest])
        save_figure(self.figure(), folder / "diagnosis.png")
        write_atomic(folder / "diagnosis.json", json.dumps(_plain(numbers), indent=1, allow_nan=False) + "\n")
        write_atomic(folder / "diagnosis.md", text)
        return text

    def figure(self) -> Figure:
        """The first model's worst images of the fewest steps: failures first, then the farthest from the parent's."""
        worst, far = self.fewest[0], distances(self.fewest[0].images, self.parent.images)
        rows = np.lexsort((-far, worst.has(CORRECT)))[:WORST]
        shown = [one for one in self.models if one.model == worst.model or one in self.fewest] + [self.parent]
        names = [f"{worst.kinds[i]}: {self.texts[i].removeprefix('a photo of ')}" for i in rows]
        headings = [one.title.removeprefix(f"{worst.model}, ").rpartition("/")[2] for one in shown]
        return contact_sheet(
            names,
            {heading: one.images[rows] for heading, one in zip(headings, shown, strict=True)},
            {heading: one.has(CORRECT)[rows].tolist() for heading, one in zip(headings, shown, strict=True)},
            f"worst images of {worst.title}, and others of the same noise",
        )

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        return np.arange(len(self.prompts))

    @cached_property
    def _partners(self) -> NDArray[np.int64]:
        """For each image, another one of the same prompt; itself where there is none."""
        partners = self._rows.copy()
        for text in set(self.texts):
            own = [i for i, other in enumerate(self.texts) if other == text]
            partners[own] = np.roll(own, 1)
        return partners

    def _shares(self, samples: Samples) -> dict[str, dict[str, Mean]]:
        """Share of each kind in each group."""
        return {
            name: {kind: self._mean(samples.has(kind), rows) for kind in (CORRECT, *KINDS)}
            for name, rows in self.groups.items()
        }

    def _agreement(self, samples: Samples, partners: NDArray[np.int64]) -> dict[str, Any]:
        kept = np.flatnonzero((partners != self._rows) | (partners is self._rows))
        others = partners[kept]
        if not len(kept):
            return {}
        far = distances(samples.images[kept], self.parent.images[others])
        same = [
            same_layout(samples.layouts[i], self.parent.layouts[j], self.reach)
            for i, j in zip(kept.tolist(), others.tolist(), strict=True)
        ]
        texts = [self.texts[i] for i in kept]
        return {
            "near": Mean.of(far <= self.near, texts),
            "same layout": Mean.of(same, texts),
            "median distance": float(np.median(far)),
        }

    def _variance(self, samples: Samples) -> dict[str, Mean]:
        own, parents = deviations(samples.images, self.texts), deviations(self.parent.images, self.texts)
        names = ("over all images", "within a prompt")
        return {n: Mean.of(a, self.texts, b) for n, a, b in zip(names, own, parents, strict=True)}

    def _boundary(self) -> dict[str, Any] | None:
        if self.boundary is None:
            return None
        at, bins = self.boundary, {}
        for number, name in enumerate(at.bins):
            rows = np.zeros(len(self.prompts), bool)
            rows[np.asarray(at.rows, int)[at.found == number]] = True
            bins[name] = {
                "parent fails": self._mean(~self.parent.has(CORRECT), rows),
                "models": {one.title: self._errors(one, rows) for one in self.fewest},
            }
        return {"sizes": list(at.sizes), "directions": at.directions, "bins": bins}

    def _errors(self, samples: Samples, rows: NDArray[np.bool_]) -> dict[str, Mean]:
        pairs = zip(samples.layouts, self.parent.layouts, strict=True)
        other = np.array([not same_layout(a, b, self.reach) for a, b in pairs])
        return {
            "fails": self._mean(~samples.has(CORRECT), rows),
            "mixed": self._mean(np.isin(samples.kinds, MIXED), rows),
            "another layout": self._mean(other, rows),
            "distance": self._mean(distances(samples.images, self.parent.images), rows),
        }

    def _mean(self, values: NDArray, rows: NDArray[np.bool_]) -> Mean:
        return Mean.of(values[rows], [text for text, kept in zip(self.texts, rows, strict=True) if kept])


def _plain(value: Any) -> Any:
    """``value`` for JSON: means as dictionaries, and None for numbers that are NaN."""
    if isinstance(value, Mean):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and np.isnan(value) else value
