"""GenEval's own 553 prompts with a detector and a colour classifier (arXiv 2310.11513)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.geneval_prompts import PALETTE, Prompt, sample_prompts
from emf_lightning.evaluation.geneval.clip_colours import ClipColours, check_colours
from emf_lightning.evaluation.geneval.detector import CLASSES, ObjectDetector, check_detector
from emf_lightning.evaluation.geneval.prompt_suite import TITLES, PromptSuite
from emf_lightning.evaluation.geneval.verdict import COUNTING_THRESHOLD, THRESHOLD, Verdict, evaluate


class GenEvalSuite(PromptSuite):
    """GenEval. Its title is "GenEval (HF detector)": that scores agree with the original has not been shown.

    Args:
        detector: of the 80 classes.
        colours: classifies an object's colour.
        check: whether to test both on known images first.

    Raises:
        ValueError: if the check shows that one of them is broken.
    """

    name = "geneval_hf"
    title = TITLES[name]

    def __init__(self, detector: ObjectDetector, colours: ClipColours, check: bool = True) -> None:
        self.detector = detector
        self.colours = colours
        self._prompts = tuple(geneval_prompts())
        if check:
            check_detector(detector)
            check_colours(colours)

    def prompts(self) -> Sequence[Prompt]:
        return self._prompts

    def evaluate(self, image: NDArray[np.uint8], prompt: Prompt) -> Verdict:
        return evaluate(self.detector(image), prompt, partial(self.colours, image))

    def settings(self) -> dict[str, Any]:
        thresholds = {"threshold": THRESHOLD, "counting_threshold": COUNTING_THRESHOLD}
        return self.detector.settings() | self.colours.settings() | thresholds


def geneval_prompts() -> list[Prompt]:
    """The 553 records of GenEval's ``evaluation_metadata.jsonl``, in its order.

    The class "person" never gets a colour. The published scores use 4 images of each prompt, 2,212 in all.
    """
    prompts = sample_prompts(CLASSES, tuple(PALETTE), per_task=100, seed=43, colourless=1)
    return list({repr(prompt): prompt for prompt in prompts}.values())
