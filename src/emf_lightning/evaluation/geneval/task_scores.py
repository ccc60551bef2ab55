"""GenEval's score: the share of correct images task by task, their unweighted mean, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from emf_lightning.data.shapes.prompts import Prompt
from emf_lightning.evaluation.geneval.verdict import Judgement

RESAMPLES = 1000
"""Bootstrap samples behind a standard error, which is then known to about 2 %."""

HEADINGS = {
    "single_object": "single",
    "two_object": "two",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "attribution",
}
"""What tables and figures call GenEval's tags."""


@dataclass(frozen=True)
class TaskScores:
    """Shares of correct images, task by task, in the order of the suite; only tasks that have images.

    Attributes:
        correct: task -> share of images that are correct as GenEval counts it.
        strict: task -> share that moreover hold no further object.
        images: task -> images judged.
        standard_error: of ``overall``: bootstrap over prompts, because images of one prompt resemble each other.
        seen: task -> share correct where the training images show the composition; tasks that hold some out only.
        held_out: task -> share correct where they do not; the same tasks.
    """

    correct: dict[str, float]
    strict: dict[str, float]
    images: dict[str, int]
    standard_error: float
    seen: dict[str, float]
    held_out: dict[str, float]

    @property
    def overall(self) -> float:
        """The unweighted mean of the task means: GenEval's overall score. NaN without images."""
        return _mean(self.correct)

    @property
    def overall_strict(self) -> float:
        """The same of the strict shares."""
        return _mean(self.strict)

    def values(self) -> dict[str, float]:
        """Every number by its name in tags: the tasks, ``overall``, ``strict``, ``se``, ``seen``, ``held_out``."""
        numbers = {**self.correct, "overall": self.overall, "strict": self.overall_strict, "se": self.standard_error}
        if self.held_out:
            numbers |= {"seen": _mean(self.seen), "held_out": _mean(self.held_out)}
        return numbers

    @classmethod
    def of(cls, judged: Iterable[tuple[Prompt, Judgement]]) -> TaskScores:
        """The scores of single images, each a prompt and what was judged of its image; other ranks are not asked."""
        rows = list(judged)
        score = GenEvalScore(list({prompt.prompt: prompt for prompt, _ in rows}.values()))
        score.update([prompt for prompt, _ in rows], [judgement for _, judgement in rows])
        return score._current()

    @classmethod
    def of_counts(
        cls, prompts: Sequence[Prompt], images: NDArray, correct: NDArray, strict: NDArray, seed: int = 0
    ) -> TaskScores:
        """The scores of counts per prompt.

        Args:
            prompts: P prompts; their order gives that of the tasks.
            images: ``[P]``, images judged of each.
            correct: ``[P]``, how many of them were correct.
            strict: ``[P]``, how many strictly so.
            seed: of the bootstrap.
        """
        tags = np.array([prompt.tag for prompt in prompts])
        unseen = np.array([prompt.held_out for prompt in prompts], bool)
        rng = np.random.default_rng(seed)
        tasks: dict[str, NDArray] = {}
        for tag in dict.fromkeys(tags.tolist()):
            if images[tags == tag].any():
                tasks[tag] = (tags == tag) & (images > 0)

        def shares(counts: NDArray, kept: NDArray, names: Iterable[str]) -> dict[str, float]:
            return {name: float(counts[tasks[name] & kept].sum() / images[tasks[name] & kept].sum()) for name in names}

        resampled = []
        for rows in tasks.values():
            n = int(rows.sum())
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
            resampled.append((drawn @ correct[rows]) / (drawn @ images[rows]))
        split = [name for name, rows in tasks.items() if (rows & unseen).any() and (rows & ~unseen).any()]
        everything = np.ones(len(prompts), bool)
        return cls(
            correct=shares(correct, everything, tasks),
            strict=shares(strict, everything, tasks),
            images={name: int(images[rows].sum()) for name, rows in tasks.items()},
            standard_error=float(np.mean(resampled, axis=0).std(ddof=1)) if tasks else float("nan"),
            seen=shares(correct, ~unseen, split),
            held_out=shares(correct, unseen, split),
        )


class GenEvalScore(Metric):
    """Counts judged images prompt by prompt, summed over ranks; every score follows from these counts.

    ``compute`` gives ``TaskScores.values()`` as tensors, ready for ``log_dict``; ``scores`` gives the ``TaskScores``.

    Args:
        prompts: all prompts that may be judged, each text once.
    """

    full_state_update = False
    higher_is_better = True
    images: Tensor
    correct: Tensor
    strict: Tensor

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        super().__init__()
        self.prompts = tuple(prompts)
        self._row = {prompt.prompt: row for row, prompt in enumerate(self.prompts)}
        if len(self._row) < len(self.prompts):
            raise ValueError("prompts must differ: their texts tell them apart")
        for name in ("images", "correct", "strict"):
            self.add_state(name, torch.zeros(len(self.prompts), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prompts: Sequence[Prompt], judgements: Sequence[Judgement]) -> None:
        """Adds the judgements of images of ``prompts``, in the same order; a prompt may come again.

        Raises:
            ValueError: for a prompt that the metric was not made for, or when the lengths differ.
        """
        unknown = next((prompt.prompt for prompt in prompts if prompt.prompt not in self._row), None)
        if unknown is not None:
            raise ValueError(f"prompts: {unknown!r} is none of the {len(self.prompts)} this score was made for")
        for prompt, judgement in zip(prompts, judgements, strict=True):
            row = self._row[prompt.prompt]
            self.images[row] += 1
            self.correct[row] += judgement.correct
            self.strict[row] += judgement.strict

    def compute(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self._current().values().items()}

    def scores(self) -> TaskScores:
        """The scores of all ranks' images; every rank must call it."""
        with self.sync_context(should_sync=self._to_sync):
            return self._current()

    def _current(self) -> TaskScores:
        images, correct, strict = (count.cpu().numpy() for count in (self.images, self.correct, self.strict))
        return TaskScores.of_counts(self.prompts, images, correct, strict)


def score_table(rows: Mapping[str, TaskScores]) -> str:
    """A Markdown table: a row for each named score, a column for each task, the overall score ± its standard error."""
    tasks = list(dict.fromkeys(task for scores in rows.values() for task in scores.correct))
    lines = [
        "| | " + " | ".join(HEADINGS.get(task, task) for task in tasks) + " | overall | strict | held out |",
        "|---|" + "---|" * (len(tasks) + 3),
    ]
    for name, scores in rows.items():
        shares = [f"{scores.correct[task]:.3f}" if task in scores.correct else "" for task in tasks]
        overall = f"**{scores.overall:.3f}** ± {scores.standard_error:.3f}"
        held_out = f"{_mean(scores.held_out):.3f}" if scores.held_out else ""
        lines.append(f"| {name} | {' | '.join(shares)} | {overall} | {scores.overall_strict:.3f} | {held_out} |")
    return "\n".join(lines)


def _mean(shares: Mapping[str, float]) -> float:
    return sum(shares.values()) / len(shares) if shares else float("nan")
