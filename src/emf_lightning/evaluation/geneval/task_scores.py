"""GenEval's score: the share of correct images of each task, their unweighted mean and its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.bootstrap import bootstrap_means
from emf_lightning.evaluation.geneval.verdict import Verdict

HEADINGS = {
    "single_object": "single",
    "two_object": "two",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "attribution",
}
"""Column headings of GenEval's tags in tables and figures."""
SHARE = "share of correct images"
"""Unit of these scores."""


@dataclass(frozen=True)
class TaskScores:
    """Shares of correct images by task, in the order of the suite; tasks without images are left out.

    Attributes:
        correct: task -> share of images that are correct by GenEval's rule.
        strict: task -> share that also show no further object.
        images: task -> number of images.
        standard_error: of ``overall``, by bootstrap over prompts; NaN where a task has one prompt.
        seen: task -> share correct among compositions that the training images show; tasks with held-out ones only.
        held_out: task -> share correct among held-out compositions; the same tasks.
        held_out_error: standard error of the mean of ``held_out`` over images, of which there may be few: that of
            binomial shares with two more right and two more wrong images each (Agresti and Coull), so that ten right
            of ten do not give an error of 0. None without held-out compositions, and in rows of earlier versions.
    """

    correct: dict[str, float]
    strict: dict[str, float]
    images: dict[str, int]
    standard_error: float
    seen: dict[str, float]
    held_out: dict[str, float]
    held_out_error: float | None = None

    @property
    def overall(self) -> float:
        """The unweighted mean of the task means: GenEval's overall score. NaN without images."""
        return _mean(self.correct)

    @property
    def overall_strict(self) -> float:
        """The unweighted mean of the strict shares."""
        return _mean(self.strict)

    def values(self) -> dict[str, float]:
        """All numbers by their names in tags: tasks, ``overall``, ``strict``, ``se``, ``seen``, ``held_out[_se]``."""
        numbers = {**self.correct, "overall": self.overall, "strict": self.overall_strict, "se": self.standard_error}
        if self.held_out:
            numbers |= {"seen": _mean(self.seen), "held_out": _mean(self.held_out)}
        if self.held_out_error is not None:
            numbers["held_out_se"] = self.held_out_error
        return numbers

    def numbers(self) -> dict[str, float]:
        """``values`` as a metric's ``compute`` names them: ``score`` for ``overall``."""
        return {"score" if name == "overall" else name: value for name, value in self.values().items()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TaskScores:
        """Inverts ``dataclasses.asdict``; null is NaN."""
        images = {task: int(count) for task, count in row["images"].items()}
        shares = {
            name: {task: float(share) for task, share in row[name].items()}
            for name in ("correct", "strict", "seen", "held_out")
        }
        error, unseen = row["standard_error"], row.get("held_out_error")
        return cls(
            images=images,
            standard_error=float("nan") if error is None else float(error),
            held_out_error=None if unseen is None else float(unseen),
            **shares,
        )

    @classmethod
    def of(cls, evaluated: Iterable[tuple[Prompt, Verdict]]) -> TaskScores:
        """The scores of single images, each a prompt and its image's verdict."""
        prompts: dict[str, Prompt] = {}
        counts: dict[str, NDArray[np.int64]] = {}
        for prompt, verdict in evaluated:
            prompts.setdefault(prompt.prompt, prompt)
            count = counts.setdefault(prompt.prompt, np.zeros(3, np.int64))
            count += (1, verdict.correct, verdict.strict)
        images, correct, strict = np.array([*counts.values()]).reshape(-1, 3).T
        return cls.of_counts([*prompts.values()], images, correct, strict)

    @classmethod
    def of_counts(cls, prompts: Sequence[Prompt], images: NDArray, correct: NDArray, strict: NDArray) -> TaskScores:
        """The scores of counts per prompt: images, correct and strictly correct ones, each ``[P]``.

        The order of the P prompts determines that of the tasks.
        """
        tags = np.array([prompt.tag for prompt in prompts])
        unseen = np.array([prompt.held_out for prompt in prompts], bool)
        rng = np.random.default_rng(0)
        shown = [tag for tag in dict.fromkeys(tags.tolist()) if images[tags == tag].any()]
        tasks = {tag: (tags == tag) & (images > 0) for tag in shown}

        def shares(counts: NDArray, kept: NDArray, names: Iterable[str]) -> dict[str, float]:
            return {name: float(counts[tasks[name] & kept].sum() / images[tasks[name] & kept].sum()) for name in names}

        resampled = [bootstrap_means(correct[rows], images[rows], rng) for rows in tasks.values()]
        split = [name for name, rows in tasks.items() if (rows & unseen).any() and (rows & ~unseen).any()]
        everything = np.ones(len(prompts), bool)
        varies = tasks and min(rows.sum() for rows in tasks.values()) > 1  # one prompt does not show how prompts vary
        return cls(
            correct=shares(correct, everything, tasks),
            strict=shares(strict, everything, tasks),
            images={name: int(images[rows].sum()) for name, rows in tasks.items()},
            standard_error=float(np.mean(resampled, axis=0).std(ddof=1)) if varies else float("nan"),
            seen=shares(correct, ~unseen, split),
            held_out=shares(correct, unseen, split),
            held_out_error=_error([(correct[tasks[n] & unseen].sum(), images[tasks[n] & unseen].sum()) for n in split]),
        )


def _error(counts: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of the mean of shares, each given as its right images and all of its images."""
    shares = [((right + 2) / (images + 4), images + 4) for right, images in counts]
    return float(np.sqrt(sum(p * (1 - p) / n for p, n in shares)) / len(shares)) if shares else None


def _mean(shares: Mapping[str, float]) -> float:
    return sum(shares.values()) / len(shares) if shares else float("nan")
