"""Evaluated images as lines that GenEval's own summary script reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.geneval.prompt_suite import PromptImage
from emf_lightning.evaluation.geneval.suite_score import result_row, sample_path
from emf_lightning.evaluation.geneval.verdict import Verdict
from emf_lightning.files import write_atomic


@dataclass(frozen=True)
class EvaluatedImage:
    """A generated image and its verdict.

    Attributes:
        requested: the prompt and the number of the image.
        verdict: whether the image shows the prompt.
        image: 8-bit RGB ``[H, W, 3]``; None unless it is kept for the contact sheet.
    """

    requested: PromptImage
    verdict: Verdict
    image: NDArray[np.uint8] | None = None


def write_results(
    path: Path, evaluated: Sequence[EvaluatedImage], sampling: dict[str, float], prompts: Sequence[Prompt]
) -> None:
    """Writes a line for each image: the fields of GenEval's ``results.jsonl``, and whether it is strictly correct.

    Args:
        path: the file, which is replaced.
        evaluated: images in the order of the lines; they get GenEval's names, ``00012/samples/0003.png``.
        sampling: checkpoint step, network steps, NFE and guidance scale, repeated in every line.
        prompts: all prompts of the suite, whose order numbers them; ``evaluated`` may hold some of them only.
    """
    numbers = {prompt.prompt: number for number, prompt in enumerate(prompts)}
    rows: list[dict[str, Any]] = []
    for image in evaluated:
        prompt = image.requested.prompt
        name = sample_path(numbers[prompt.prompt], image.requested.index)
        rows.append({"filename": name, **result_row(prompt, image.verdict), "sampling": json.dumps(sampling)})
    write_json_lines(path, rows)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object a line, atomically; creates the folder of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
