"""A suite of prompts as a metric."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from emf_lightning.data.geneval_prompts import TASKS, single_object
from emf_lightning.evaluation.geneval.prompt_suite import PromptSuite
from emf_lightning.evaluation.geneval.suite_score import SuiteScore, result_row, sample_path
from emf_lightning.evaluation.geneval.verdict import Verdict
from tests.evaluation.geneval.test_task_scores import PROMPTS, RIGHT, evaluated


class Fixed(PromptSuite):
    """The given prompts; black images do not show theirs."""

    name = title = "fixed"

    def __init__(self, prompts):
        self._prompts = prompts

    def prompts(self):
        return self._prompts

    def evaluate(self, image, prompt):
        return replace(RIGHT, correct=bool(image.any()))

    def settings(self):
        return {}


def counted(rows) -> SuiteScore:
    metric = SuiteScore(Fixed(PROMPTS))
    metric.count([prompt for prompt, _ in rows], [verdict for _, verdict in rows])
    return metric


def test_images_are_evaluated_counted_and_have_a_row_each():
    metric = SuiteScore(Fixed(PROMPTS))
    metric.update([np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)], [PROMPTS[0].prompt] * 2)
    assert [row["correct"] for row in metric.rows] == [False, True]
    assert metric.rows[0]["prompt"] == PROMPTS[0].prompt
    assert metric.compute()["score"] == 0.5
    with pytest.raises(ValueError, match="'a whale' is none of the"):
        metric.update([np.zeros((2, 2, 3), np.uint8)], ["a whale"])


def test_two_metrics_added_up_equal_one_that_saw_everything():
    rows = evaluated(0.6)
    whole, first, second = counted(rows), counted(rows[::2]), counted(rows[1::2])
    for name in ("images", "correct", "strict"):
        assert whole._reductions[name] is not None  # summed over ranks
        setattr(first, name, getattr(first, name) + getattr(second, name))
    assert first.task_scores() == whole.task_scores()


def test_the_metric_starts_anew_after_a_reset():
    metric = counted(evaluated(0.5))
    metric.reset()
    assert metric.images.sum() == 0
    assert math.isnan(metric.task_scores().overall)


def test_computed_values_are_tensors_by_tag():
    metric = counted(evaluated(0.7))
    values = metric.compute()
    assert set(values) == {*TASKS, "score", "strict", "se", "seen", "held_out", "held_out_se"}
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in values.values())
    values["overall"] = values.pop("score")
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        metric.task_scores().values(), rel=1e-6
    )


def test_strange_prompts_are_errors():
    metric = SuiteScore(Fixed(PROMPTS[:3]))
    with pytest.raises(ValueError, match=f"'{PROMPTS[5].prompt}' is none of the 3"):
        metric.count([PROMPTS[5]], [RIGHT])
    with pytest.raises(ValueError, match="fixed has different prompts of the text"):
        SuiteScore(Fixed([PROMPTS[0], replace(PROMPTS[0], tag="another")]))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        metric.count(PROMPTS[:2], [RIGHT])


def test_a_row_has_the_fields_of_genevals_results():
    row = result_row(single_object("dog"), Verdict(True, False, "", {"dog": [[0.0, 1.0, 2.0, 3.0, 0.9]]}))
    assert list(row) == ["tag", "prompt", "correct", "strict", "reason", "metadata", "details"]
    assert json.loads(row["metadata"])["include"] == [{"class": "dog", "count": 1}]
    assert json.loads(row["details"]) == {"dog": [[0.0, 1.0, 2.0, 3.0, 0.9]]}


def test_files_are_numbered_by_prompt_and_image():
    assert sample_path(12, 3) == "00012/samples/0003.png"
