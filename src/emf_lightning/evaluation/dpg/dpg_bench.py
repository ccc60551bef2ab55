"""DPG-Bench: long prompts as graphs of questions (arXiv 2403.05135)."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.evaluation.dpg.vqa_judge import VqaJudge
from emf_lightning.evaluation.image_metric import PromptMeans

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """One question about a prompt's image.

    Attributes:
        number: within the prompt, from 1.
        parents: questions that must be answered with yes for this one to count.
        category: its kind, e.g. ``entity``, ``attribute``; behind a dash the finer kind.
        text: the question.
    """

    number: int
    parents: tuple[int, ...]
    category: str
    text: str

    @property
    def kind(self) -> str:
        """The coarse category, which published tables show."""
        return self.category.split("-")[0].strip()


@dataclass(frozen=True)
class Item:
    """One prompt and its questions, in the order of their numbers."""

    name: str
    text: str
    questions: tuple[Question, ...]

    @property
    def is_whole(self) -> bool:
        """Whether there are questions, and all those that they depend on."""
        numbers = {question.number for question in self.questions}
        return bool(numbers) and all(numbers.issuperset(question.parents) for question in self.questions)


class DpgBench(PromptMeans):
    """DPG-Bench: the share of a prompt's questions that its image answers with yes, in per cent, averaged over prompts.

    A question whose parent was answered with no counts as no, down the whole graph. An image may be a 2 x 2 grid of
    four, as the benchmark stores it; no file says that it is one. Scores of another judge than mPLUG are no DPG-Bench
    scores, and bear its name. Beside the score stand the shares of the coarse and the fine kinds of questions.

    Args:
        benchmark: path of ``dpg_bench.csv``.
        judge: answers the questions.
        tile: side in pixels of one of the four images of a grid; None where files hold one image each: a grid would be
            judged as one image.
        official: count as the published script does: the table's first question is dropped, and its prompt with it
            where others depend on it: images of that prompt are not judged; kinds of questions take the last of a
            grid's four images, or each image where it comes alone, and questions without their parents' say.

    Raises:
        ValueError: for a table that is not there or something else.
    """

    asked: Tensor
    yes: Tensor

    def __init__(self, benchmark: Path, judge: VqaJudge, tile: int | None = None, official: bool = False) -> None:
        items = read_items(benchmark, official)
        self._all = tuple(dict.fromkeys(item.text for item in items))
        self._of_name = {item.name: item.text for item in items}
        items = [item for item in items if item.is_whole]
        super().__init__([item.text for item in items], scale=100.0)
        self._items: dict[str, list[Item]] = {}
        for item in items:
            self._items.setdefault(item.text, []).append(item)
        questions = [question for item in items for question in item.questions]
        self._kinds = tuple(dict.fromkeys([q.kind for q in questions] + [q.category for q in questions]))
        self.judge, self.tile, self.official = judge, tile, official
        self.name = "_".join(["dpg", *([judge.name] if judge.name else []), *(["official"] if official else [])])
        remarks = [f"{judge.name} as judge"] if judge.name else []
        remarks += ["counted as the published script does"] if official else []
        self.title = f"DPG-Bench ({', '.join(remarks)})" if remarks else "DPG-Bench"
        self._benchmark = hashlib.sha256(Path(benchmark).read_bytes()).hexdigest()[:12]
        for name in ("asked", "yes"):
            self.add_state(name, torch.zeros(len(self._kinds), dtype=torch.float64), dist_reduce_fx="sum")

    def prompts(self) -> Sequence[str]:
        """All of the table's, also one that ``official`` leaves out: folders have an image of it."""
        return self._all

    def prompt_of(self, path: PurePath) -> str | None:
        return self._of_name.get(path.stem)

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        left_out = set(self._all).difference(self._items)
        judged = [(image, text) for image, text in zip(images, prompts, strict=True) if text not in left_out]
        super().update([image for image, _ in judged], [text for _, text in judged])
        rows = iter(self.rows)
        self.rows = [{"prompt": text, self.name: None} if text in left_out else next(rows) for text in prompts]

    def values(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[float]:
        return [self._value(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _value(self, image: NDArray[np.uint8], prompt: str) -> float:
        """The share of questions answered with yes, averaged over the image's tiles and the prompt's items."""
        shares = []
        for item in self._items[prompt]:
            tiles = tiles_of(image, self.tile)
            for number, picture in enumerate(tiles):
                answers = self.judge.answer(picture, [question.text for question in item.questions])
                plain = {q.number: answer == "yes" for q, answer in zip(item.questions, answers, strict=True)}
                gated = gate(item.questions, plain)
                shares.append(sum(gated.values()) / len(gated))
                if not self.official:
                    self._count(item, gated)
                elif number == len(tiles) - 1:
                    self._count(item, plain)
        return float(np.mean(shares))

    def _count(self, item: Item, answers: dict[int, bool]) -> None:
        for question in item.questions:
            for name in {question.kind, question.category}:
                kind = self._kinds.index(name)
                self.asked[kind] += 1
                self.yes[kind] += answers[question.number]

    def compute(self) -> dict[str, Tensor]:
        shares = 100 * self.yes / self.asked
        return super().compute() | {kind: shares[i] for i, kind in enumerate(self._kinds) if self.asked[i]}

    def settings(self) -> dict[str, Any]:
        counting = {"prompts": len(self._texts), "tile": self.tile, "official": self.official}
        return {"benchmark": self._benchmark} | counting | self.judge.settings()


def gate(questions: Sequence[Question], answers: dict[int, bool]) -> dict[int, bool]:
    """Answers that are yes and whose parents' are: in the order of the numbers, so that a no goes down the graph."""
    gated = dict(answers)
    for question in sorted(questions, key=lambda question: question.number):
        if not all(gated[parent] for parent in question.parents):
            gated[question.number] = False
    return gated


def tiles_of(image: NDArray[np.uint8], tile: int | None) -> list[NDArray[np.uint8]]:
    """The four images of a 2 x 2 grid, row by row; the image itself where ``tile`` is None.

    Raises:
        ValueError: for a grid of another size.
    """
    if tile is None:
        return [image]
    if image.shape[:2] != (2 * tile, 2 * tile):
        height, width = image.shape[:2]
        raise ValueError(
            f"DpgBench: an image of {width} x {height} is no grid of four of side tile={tile}; set tile to half the "
            "grid's side, or leave it out where each file holds one image"
        )
    return [image[y : y + tile, x : x + tile] for y in (0, tile) for x in (0, tile)]


def read_items(path: Path, official: bool = False) -> list[Item]:
    """The benchmark's prompts with their questions.

    Args:
        path: of ``dpg_bench.csv``.
        official: leave out the first question of the table as the published script does; its prompt stays, and is not
            whole where another question depends on it.

    Raises:
        ValueError: for a file that is not there, lacks columns, or has questions whose parents do not exist.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"DpgBench: cannot read benchmark {path} ({error.strerror}); give dpg_bench.csv") from error
    absent = [column for column in COLUMNS if not rows or column not in rows[0]]
    if absent:
        raise ValueError(f"DpgBench: {path} has no column {absent[0]!r}; give DPG-Bench's own dpg_bench.csv")
    found: dict[str, list[Question]] = {}
    texts: dict[str, str] = {}
    for line, row in enumerate(rows):
        try:
            number, parents = int(row["proposition_id"]), [int(number) for number in row["dependency"].split(",")]
        except ValueError as error:
            raise ValueError(
                f"DpgBench: {path}: a question of {row['item_id']} has no whole numbers ({error})"
            ) from error
        category = row["tuple"].split("(")[0].strip()
        question = Question(number, tuple(n for n in parents if n), category, row["question_natural_language"])
        texts.setdefault(row["item_id"], row["text"])
        questions = found.setdefault(row["item_id"], [])
        if line > 0 or not official:
            questions.append(question)
    items = [Item(n, texts[n], tuple(sorted(q, key=lambda question: question.number))) for n, q in found.items()]
    orphans = [] if official else [item for item in items if not item.is_whole]
    if orphans:
        raise ValueError(f"DpgBench: {path}: a question of {orphans[0].name} depends on one that is not there")
    return items
