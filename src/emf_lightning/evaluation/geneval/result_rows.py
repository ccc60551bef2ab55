"""Lines of GenEval's ``results.jsonl``, which its own summary script reads."""

from __future__ import annotations

import json
from typing import Any

from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.geneval.verdict import Verdict


def result_row(prompt: Prompt, verdict: Verdict) -> dict[str, Any]:
    """GenEval's fields for one image except ``filename``, and whether it is strictly correct."""
    return {
        "tag": prompt.tag,
        "prompt": prompt.prompt,
        "correct": verdict.correct,
        "strict": verdict.strict,
        "reason": verdict.reason,
        "metadata": json.dumps(prompt.metadata()),
        "details": json.dumps(verdict.boxes),
    }


def sample_path(prompt: int, image: int) -> str:
    """GenEval's file name for the ``image``-th image of the ``prompt``-th prompt: ``00012/samples/0003.png``."""
    return f"{prompt:05d}/samples/{image:04d}.png"
