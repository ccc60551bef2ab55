"""DPG-Bench: long prompts, each with a graph of questions about its image (arXiv 2403.05135)."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.evaluation.dpg.vqa_models import VqaModel
from emf_lightning.evaluation.image_metric import PromptMeans

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """One question about a prompt's image.

    Attributes:
        number: within the prompt, from 1.
        parents: numbers of the questions that must be answered with yes for this one to count.
        category: e.g. ``entity - whole``: the coarse category, a dash, the fine one.
    """

    number: int
    parents: tuple[int, ...]
    category: str
    text: str

    @property
    def coarse(self) -> str:
        """The coarse category, the one of published tables."""
        return self.category.split("-")[0].strip()


@dataclass(frozen=True)
class Item:
    """One prompt and its questions, in the order of their numbers."""

    name: str
    text: str
    questions: tuple[Question, ...]

    @property
    def is_complete(self) -> bool:
        """True if there are questions, and all of their parents are among them."""
        numbers = {question.number for question in self.questions}
        return bool(numbers) and all(numbers.issuperset(question.parents) for question in self.questions)


class DpgBench(PromptMeans):
    """DPG-Bench: the share of a prompt's questions that its image answers with yes, in per cent, averaged over prompts.

    A question whose parent was answered with no counts as no, and so do the questions that depend on it. An image may
    be a 2 x 2 grid of four, as the benchmark stores it; image files do not say so. Only mPLUG gives DPG-Bench scores:
    the names of other models are part of the score's name. ``compute`` also returns the share of each coarse and fine
    category.

    Args:
        benchmark: path of ``dpg_bench.csv``.
        vqa_model: answers the questions.
        tile: side in pixels of one of the four images of a grid; None if each file holds one image: a grid would be
            scored as one image.
        official: count as the published script does. It drops the table's first question, and the prompt of that
            question if others depend on it: images of that prompt are not scored. Categories count the last of a
            grid's four images, or each image where there is no grid, and ignore the parents' answers.

    Raises:
        ValueError: for a missing or malformed table.
    """

    asked: Tensor
    yes: Tensor

    def __init__(self, benchmark: Path, vqa_model: VqaModel, tile: int | None = None, official: bool = False) -> None:
        items = read_items(benchmark, official)
        self._all = tuple(dict.fromkeys(item.text for item in items))
        self._of_name = {item.name: item.text for item in items}
        items = [item for item in items if item.is_complete]
        super().__init__([item.text for item in items], scale=100.0)
        self._items = {text: [item for item in items if item.text == text] for text in self._texts}
        questions = [question for item in items for question in item.questions]
        self._categories = tuple(dict.fromkeys([q.coarse for q in questions] + [q.category for q in questions]))
        self.vqa_model, self.tile, self.official = vqa_model, tile, official
        remarks = {vqa_model.name: f"{vqa_model.name} as judge"} if vqa_model.name else {}
        remarks |= {"official": "counted as the published script does"} if official else {}
        self.name = "_".join(["dpg", *remarks])
        self.title = f"DPG-Bench ({', '.join(remarks.values())})" if remarks else "DPG-Bench"
        self._benchmark = hashlib.sha256(Path(benchmark).read_bytes()).hexdigest()[:12]
        for name in ("asked", "yes"):
            self.add_sum(name, len(self._categories))

    def prompts(self) -> Sequence[str]:
        """All prompts of the table, including the one that ``official`` drops: folders have an image of it."""
        return self._all

    def tasks(self) -> Mapping[str, Sequence[int]]:
        return {"": [place for place, text in enumerate(self._all) if text in self._items]}

    def prompt_of(self, path: PurePath) -> str | None:
        return self._of_name.get(path.stem)

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        left_out = set(self._all).difference(self._items)
        scored = [i for i, text in enumerate(prompts) if text not in left_out]
        super().update([images[i] for i in scored], [prompts[i] for i in scored])
        rows = dict(zip(scored, self.rows, strict=True))
        self.rows = [rows.get(i, {"prompt": text, self.name: None}) for i, text in enumerate(prompts)]

    def values(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[float]:
        return [self._value(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _value(self, image: NDArray[np.uint8], prompt: str) -> float:
        """Share of questions answered with yes, averaged over the image's tiles and the prompt's items."""
        shares = []
        for item in self._items[prompt]:
            tiles = tiles_of(image, self.tile)
            for number, tile in enumerate(tiles):
                answers = self.vqa_model.answer(tile, [question.text for question in item.questions])
                raw = {q.number: answer == "yes" for q, answer in zip(item.questions, answers, strict=True)}
                gated = gate(item.questions, raw)
                shares.append(sum(gated.values()) / len(gated))
                if not self.official:
                    self._count(item, gated)
                elif number == len(tiles) - 1:
                    self._count(item, raw)
        return float(np.mean(shares))

    def _count(self, item: Item, answers: dict[int, bool]) -> None:
        for question in item.questions:
            for name in {question.coarse, question.category}:
                category = self._categories.index(name)
                self.asked[category] += 1
                self.yes[category] += answers[question.number]

    def compute(self) -> dict[str, Tensor]:
        shares = 100 * self.yes / self.asked
        return super().compute() | {name: shares[i] for i, name in enumerate(self._categories) if self.asked[i]}

    def settings(self) -> dict[str, Any]:
        counting = {"prompts": len(self._texts), "tile": self.tile, "official": self.official}
        return {"benchmark": self._benchmark} | counting | self.vqa_model.settings()


def gate(questions: Sequence[Question], answers: dict[int, bool]) -> dict[int, bool]:
    """Answers with a no wherever a parent's gated answer is no; questions are taken in the order of their numbers."""
    gated = dict(answers)
    for question in sorted(questions, key=lambda question: question.number):
        gated[question.number] &= all(gated[parent] for parent in question.parents)
    return gated


def tiles_of(image: NDArray[np.uint8], tile: int | None) -> list[NDArray[np.uint8]]:
    """The four images of a 2 x 2 grid, row by row; the whole image if ``tile`` is None.

    Raises:
        ValueError: for an image that is not ``2 * tile`` pixels wide and high.
    """
    if tile is None:
        return [image]
    if image.shape[:2] != (2 * tile, 2 * tile):
        height, width = image.shape[:2]
        raise ValueError(
            f"DpgBench: an image of {width} x {height} is no grid of four of side tile={tile}; set tile to half the "
            "grid's side, or leave it out if each file holds one image"
        )
    return [image[y : y + tile, x : x + tile] for y in (0, tile) for x in (0, tile)]


def read_items(path: Path, official: bool = False) -> list[Item]:
    """The benchmark's prompts with their questions, from ``dpg_bench.csv``.

    ``official`` drops the first question of the table as the published script does; its prompt stays, but is not
    complete if another question depends on it.

    Raises:
        ValueError: for a missing file, missing columns, or questions whose parents do not exist.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"DpgBench: cannot read benchmark {path} ({error.strerror}); give dpg_bench.csv") from error
    if absent := [column for column in COLUMNS if not rows or column not in rows[0]]:
        raise ValueError(f"DpgBench: {path} has no column {absent[0]!r}; give DPG-Bench's own dpg_bench.csv")
    found: dict[str, list[Question]] = {}
    texts: dict[str, str] = {}
    for line, row in enumerate(rows):
        try:
            number, parents = int(row["proposition_id"]), [int(number) for number in row["dependency"].split(",")]
        except ValueError as error:
            name = row["item_id"]
            raise ValueError(f"DpgBench: {path}: a question of {name} has no whole numbers ({error})") from error
        category = row["tuple"].split("(")[0].strip()
        question = Question(number, tuple(n for n in parents if n), category, row["question_natural_language"])
        texts.setdefault(row["item_id"], row["text"])
        questions = found.setdefault(row["item_id"], [])
        if line > 0 or not official:
            questions.append(question)
    items = [Item(n, texts[n], tuple(sorted(q, key=lambda question: question.number))) for n, q in found.items()]
    if not official and (orphans := [item.name for item in items if not item.is_complete]):
        raise ValueError(f"DpgBench: {path}: a question of {orphans[0]} depends on one that is not there")
    return items
