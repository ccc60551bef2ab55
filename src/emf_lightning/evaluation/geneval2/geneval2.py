"""GenEval 2: prompts of three to ten atoms, each with questions whose answers a judge weighs (arXiv 2512.16853)."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.evaluation.geneval2.judges import AnswerJudge
from emf_lightning.evaluation.image_metric import PromptMeans

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SKILLS = ("object", "attribute", "count", "position", "verb")


@dataclass(frozen=True)
class Question:
    """One question about a prompt's image, its right answer in lower case, and the skill that it tests."""

    text: str
    answer: str
    skill: str

    @property
    def spellings(self) -> list[str]:
        """The answer as a judge may begin it; that of a question for a number also in digits."""
        forms = [self.answer, self.answer.capitalize()]
        forms += [f" {form}" for form in forms]
        if self.text.startswith("How many"):
            digits = str(NUMBERS.index(self.answer) + 1)
            forms += [digits, f" {digits}"]
        return forms


@dataclass(frozen=True)
class Item:
    """One prompt, its number of atoms (objects, attributes, counts, relations), and its questions."""

    prompt: str
    atoms: int
    questions: tuple[Question, ...]


class GenEval2(PromptMeans):
    """GenEval 2's Soft-TIFA on prompt level: the geometric mean of the right answers' probabilities, in per cent.

    A question's value is the sum of the probabilities of the first token of each spelling of its answer. ``score`` is
    the mean over prompts of the geometric mean over a prompt's questions, ``soft_tifa_am`` that of the arithmetic mean
    (atom level). ``3 atoms`` and so on are the means of the prompts with as many atoms; ``object questions`` and so on,
    of ``attribute``, ``count``, ``position`` and ``verb``, are the means over all questions of a skill.

    The score depends on the images' size, whose mean ``width`` and ``height`` are logged beside it, and on the tokens
    of the spellings, which ``settings`` lists.

    Args:
        benchmark: path of ``geneval2_data.jsonl``, which you download from facebookresearch/GenEval2. It is for
            non-commercial use (CC BY-NC 4.0) and not part of this package.
        judge: e.g. ``QwenJudge``; the published scores' is Qwen3-VL-8B-Instruct.
        spellings: ``official`` adds the first token of every spelling as the published script does: tokens that two
            spellings share count twice, and a space alone counts where a spelling begins with it. ``distinct`` counts
            each token once, without such a space.
        images_per_prompt: images of each prompt; the protocol's is one. The mean over several has another name.

    Raises:
        ValueError: for a missing or malformed file; before the first image, for another number of images a prompt.
    """

    unit = "Soft-TIFA, per cent"
    arithmetic: Tensor
    asked: Tensor
    found: Tensor
    sides: Tensor

    def __init__(
        self,
        benchmark: Path,
        judge: AnswerJudge,
        spellings: Literal["official", "distinct"] = "official",
        images_per_prompt: int = 1,
    ) -> None:
        if images_per_prompt < 1:
            raise ValueError(f"GenEval2: images_per_prompt must be at least 1, got {images_per_prompt}")
        items = read_items(benchmark)
        super().__init__([i.prompt for i in items], [f"{i.atoms} atoms" for i in items], scale=100.0)
        self._items = {item.prompt: item for item in items}
        self._digest = hashlib.sha256(Path(benchmark).read_bytes()).hexdigest()[:12]
        self.judge, self.spellings, self.images_per_prompt = judge, spellings, images_per_prompt
        remarks = {judge.name: f"{judge.name} as judge"} if judge.name else {}
        remarks |= {"distinct": "each token once"} if spellings == "distinct" else {}
        several = f"{images_per_prompt}_images"
        remarks |= {several: f"mean of {images_per_prompt} images a prompt"} if images_per_prompt > 1 else {}
        self.name = "_".join(["geneval2", *remarks])
        self.title = f"GenEval 2 ({', '.join(remarks.values())})" if remarks else "GenEval 2"
        questions = [question for item in items for question in item.questions]
        self._skills = tuple(dict.fromkeys([*SKILLS, *(question.skill for question in questions)]))
        self._tokens = {q.answer: self._tokens_of(q) for q in questions if not q.text.startswith("How many")}
        self._tokens |= {f"number {q.answer}": self._tokens_of(q) for q in questions if q.text.startswith("How many")}
        self._details: list[dict[str, Any]] = []  # further fields of ``rows``
        self.add_sum("arithmetic", len(self._texts))
        self.add_sum("asked", len(self._skills))
        self.add_sum("found", len(self._skills))
        self.add_sum("sides", 2)

    def check_requests(self, prompts: Sequence[str]) -> None:
        most = max(Counter(prompts).values(), default=0)
        if most != self.images_per_prompt:
            raise ValueError(
                f"{self.title}: {most} images of a prompt, but images_per_prompt is {self.images_per_prompt}; sample "
                "as many, or set GenEval2's images_per_prompt to your number, which is then part of the score's name"
            )

    def values(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[float]:
        self._details, means = [], []
        for image, prompt in zip(images, prompts, strict=True):
            item = self._items[prompt]
            scores = [self._score(image, question) for question in item.questions]
            arithmetic = float(np.mean(scores))
            self.arithmetic[self._index[prompt]] += arithmetic
            for question, score in zip(item.questions, scores, strict=True):
                self.asked[self._skills.index(question.skill)] += 1
                self.found[self._skills.index(question.skill)] += score
            height, width = image.shape[:2]
            for side, pixels in enumerate((width, height)):
                self.sides[side] += pixels
            self._details.append({"soft_tifa_am": arithmetic, "answers": scores, "width": width, "height": height})
            means.append(geometric_mean(scores))
        return means

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        super().update(images, prompts)
        self.rows = [row | details for row, details in zip(self.rows, self._details, strict=True)]

    def compute(self) -> dict[str, Tensor]:
        present = self.images > 0
        arithmetic = (self.arithmetic[present] / self.images[present]).mean()
        skills = {
            f"{name} questions": 100 * self.found[i] / self.asked[i]
            for i, name in enumerate(self._skills)
            if self.asked[i]
        }
        width, height = self.sides / self.images.sum()
        return super().compute() | {"soft_tifa_am": 100 * arithmetic} | skills | {"width": width, "height": height}

    def settings(self) -> dict[str, Any]:
        counting = {"prompts": len(self._texts), "spellings": self.spellings, "tokens": self._tokens}
        return {"benchmark": self._digest} | counting | self.judge.settings()

    def _score(self, image: NDArray[np.uint8], question: Question) -> float:
        score = float(self.judge.probabilities(image, question.text)[self._tokens_of(question)].sum(dtype=np.float64))
        if not math.isfinite(score):
            raise ValueError(
                f"{self.title}: the judge's probabilities of {question.text!r} are not finite; give it dtype bfloat16 "
                "or float32"
            )
        return score

    def _tokens_of(self, question: Question) -> list[int]:
        """First tokens of the answer's spellings, which add up."""
        first = [tokens[0] for spelling in question.spellings if (tokens := self.judge.tokens(spelling))]
        if self.spellings == "official":
            return first
        return [token for token in dict.fromkeys(first) if self.judge.text(token).strip()]


def geometric_mean(scores: Sequence[float]) -> float:
    """exp of the mean logarithm; 0 if any score is."""
    return float(np.exp(np.mean(np.log(scores)))) if min(scores) > 0 else 0.0


def read_items(path: Path) -> list[Item]:
    """The prompts and questions in ``geneval2_data.jsonl``.

    Raises:
        ValueError: for a missing file, or the first line that is not as it should be.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"GenEval2: cannot read benchmark {path} ({error}); download geneval2_data.jsonl from "
            "facebookresearch/GenEval2 yourself: its licence (CC BY-NC 4.0) allows non-commercial use alone, and it is "
            "not shipped here"
        ) from error
    items: dict[str, Item] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line))
            if item.prompt in items:
                raise ValueError(f"the prompt {item.prompt!r} is there twice")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"GenEval2: {path}, line {number}: {reason}; give geneval2_data.jsonl as it is") from error
        items[item.prompt] = item
    if not items:
        raise ValueError(f"GenEval2: {path} holds no prompt; give geneval2_data.jsonl as it is")
    return list(items.values())


def _item(row: dict[str, Any]) -> Item:
    prompt, asked, skills = row["prompt"], row["vqa_list"], row["skills"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt {prompt!r} is no text")
    if not asked or len(asked) != len(skills):
        raise ValueError(f"{len(asked)} questions and {len(skills)} skills")
    questions = tuple(
        Question(str(text), str(answer).lower(), str(skill))
        for (text, answer), skill in zip(asked, skills, strict=True)
    )
    for question in questions:
        known = NUMBERS if question.text.startswith("How many") else ("yes", "no")
        if question.answer not in known:
            raise ValueError(f"the answer to {question.text!r} is {question.answer!r}, none of {', '.join(known)}")
    return Item(prompt, int(row["atom_count"]), questions)
