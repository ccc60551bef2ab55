"""Published scores for comparison: Tables 3, 4 and 6 of EMF (arXiv 2604.18168), and FIDs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One line of a published table.

    Attributes:
        steps: network steps; the papers do not give the number of evaluations.
        scores: metric's name -> number's name -> value, shares for GenEval, per cent for DPG and HPS; some models have
            the ``score`` alone.
    """

    model: str
    steps: int
    scores: dict[str, dict[str, float]]

    @property
    def cells(self) -> dict[str, str]:
        """Cells that every table begins with."""
        return {"model": self.model, "steps": str(self.steps)}


Scores = tuple[float, ...] | float
_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "score")
_KINDS = ("score", "global", "entity", "attribute", "relation", "other")
_STYLES = ("anime", "concept-art", "paintings", "photo", "score")
_EMF_DPG = {
    8: (81.94, 89.07, 88.13, 88.96, 87.49, 86.34),
    4: (81.20, 88.01, 87.27, 88.24, 88.78, 87.68),
    2: (79.44, 85.63, 88.15, 85.96, 85.69, 86.20),
    1: (77.36, 85.24, 85.85, 85.19, 82.37, 82.65),
}
"""Network steps -> EMF's scores on DPG-Bench, Table 6."""


def _row(model: str, steps: int, geneval: Scores = (), dpg: Scores = (), hps: Scores = ()) -> PublishedRow:
    """A row; a bare number of GenEval or DPG-Bench is the score."""
    scores: dict[str, dict[str, float]] = {}
    for metric, names, values in (("geneval", _TASKS, geneval), ("dpg", _KINDS, dpg), ("hps", _STYLES, hps)):
        if isinstance(values, float):
            scores[metric] = {"score": values}
        elif values:
            scores[metric] = dict(zip(names, values, strict=True))
    return PublishedRow(model, steps, scores)


PUBLISHED = (
    _row("BLIP3o-NEXT 3B", 30, (0.99, 0.95, 0.88, 0.90, 0.92, 0.79, 0.91), 82.05, (30.27, 29.15, 28.99, 29.26, 29.42)),
    _row("BLIP3o-NEXT 3B", 4, (0.99, 0.93, 0.84, 0.84, 0.86, 0.70, 0.86), 78.15, (28.13, 26.22, 27.18, 26.30, 26.96)),
    _row("BLIP3o-NEXT 3B", 2, (0.92, 0.68, 0.55, 0.66, 0.60, 0.40, 0.63), 67.38, (23.51, 21.70, 22.78, 21.82, 22.45)),
    _row("BLIP3o-NEXT 3B", 1, (0.81, 0.40, 0.40, 0.56, 0.38, 0.23, 0.46), 57.05, (19.77, 17.54, 18.23, 18.64, 18.54)),
    _row("EMF", 8, (), _EMF_DPG[8]),
    _row("EMF", 4, (1.00, 0.94, 0.88, 0.92, 0.91, 0.76, 0.90), _EMF_DPG[4], (30.03, 29.02, 29.09, 28.86, 29.25)),
    _row("EMF", 2, (0.99, 0.91, 0.81, 0.86, 0.86, 0.66, 0.85), _EMF_DPG[2], (28.02, 26.83, 27.03, 26.96, 27.21)),
    _row("EMF", 1, (0.98, 0.86, 0.66, 0.69, 0.80, 0.47, 0.74), _EMF_DPG[1], (26.64, 25.60, 25.53, 25.32, 25.77)),
    _row("Qwen-Image", 50, 0.87),
    _row("SD3.5-L", 28, 0.71),
    _row("FLUX-dev", 50, 0.66),
    _row("SANA-1.5 4.8B", 20, (0.99, 0.93, 0.86, 0.84, 0.59, 0.65, 0.81)),
    _row("rCM 14B", 4, (1.00, 0.98, 0.80, 0.86, 0.59, 0.73, 0.83)),
    _row("SANA-Sprint 0.6B", 4, (1.00, 0.90, 0.71, 0.89, 0.61, 0.54, 0.77)),
    _row("SANA-Sprint 1.6B", 4, (1.00, 0.92, 0.59, 0.91, 0.54, 0.55, 0.75), 81.08),
    _row("FLUX-schnell", 4, (0.99, 0.88, 0.64, 0.78, 0.30, 0.52, 0.69), 84.94),
    _row("SD3.5-L-Turbo", 4, (0.99, 0.89, 0.68, 0.78, 0.23, 0.54, 0.68), 81.97),
    _row("SDXL-DMD2", 4, (1.00, 0.76, 0.52, 0.88, 0.11, 0.24, 0.58), 74.24),
    _row("Hyper-SDXL", 4, (1.00, 0.77, 0.48, 0.89, 0.11, 0.23, 0.58)),
    _row("SDXL-Turbo", 4, (1.00, 0.72, 0.49, 0.82, 0.11, 0.21, 0.56)),
    _row("SDXL-Lightning", 4, (0.98, 0.61, 0.44, 0.84, 0.11, 0.21, 0.53)),
    _row("SDXL-LCM", 4, (0.99, 0.55, 0.38, 0.85, 0.07, 0.14, 0.50)),
)
"""The paper's Tables 3, 4 and 6, which give no seeds, guidance scale, images per prompt or standard errors.

BLIP3o-NEXT's categories are left out: Tables 4 and 6 give the same numbers in another order.
"""


def _fid(model: str, steps: int, score: float) -> PublishedRow:
    return PublishedRow(model, steps, {"fid": {"score": score}})


PUBLISHED_FID: dict[tuple[int | None, int | None], tuple[PublishedRow, ...]] = {
    (32, 50_000): (_fid("MeanFlow, CIFAR-10", 1, 2.92), _fid("FGM, CIFAR-10", 1, 3.08)),
    (256, 30_000): (_fid("InstaFlow-0.9B, COCO val2014", 1, 13.1),),
    (256, 5_000): (_fid("InstaFlow-0.9B, COCO val2017", 1, 23.4), _fid("2-Rectified Flow, COCO val2017", 25, 21.5)),
}
"""FIDs by resolution and number of images (arXiv 2505.13447, 2410.19310, 2309.06380); each row names its data set."""
