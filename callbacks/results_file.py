"""Every judged image as a line that GenEval's own summary script reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.geneval.result_rows import result_row, sample_path
from emf_lightning.evaluation.geneval.verdict import Verdict
from emf_lightning.evaluation.prompt_suite import PromptImage


@dataclass(frozen=True)
class JudgedImage:
    """An image that was asked for, and whether it shows its prompt.

    Attributes:
        asked: its prompt and number.
        judgement: of it.
        image: 8-bit RGB ``[H, W, 3]``, where it is kept to be looked at.
    """

    asked: PromptImage
    judgement: Verdict
    image: NDArray[np.uint8] | None = None


def write_results(
    path: Path, judged: Sequence[JudgedImage], drawing: dict[str, float], prompts: Sequence[Prompt]
) -> None:
    """Writes one line for each image: the fields of GenEval's ``results.jsonl``, and whether it is strictly correct.

    Args:
        path: of the file, which is replaced; its folder is made.
        judged: in the order of the lines; images of a prompt bear GenEval's names, ``00012/samples/0003.png``.
        drawing: how the images were drawn, repeated in every line.
        prompts: all of the suite, whose order numbers them; ``judged`` may show some of them only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {prompt.prompt: number for number, prompt in enumerate(prompts)}
    with path.open("w") as file:
        for image in judged:
            prompt = image.asked.prompt
            name = sample_path(numbers[prompt.prompt], image.asked.index)
            row = {"filename": name, **result_row(prompt, image.judgement), "drawing": json.dumps(drawing)}
            file.write(json.dumps(row) + "\n")
