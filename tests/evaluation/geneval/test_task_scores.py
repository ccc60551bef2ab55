from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed as dist

from emf_lightning.data.geneval_prompts import TASKS
from emf_lightning.data.shapes.prompts import evaluation_prompts
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Verdict

PROMPTS = evaluation_prompts(SMALL, per_task=20)
RIGHT, LOOSE, WRONG = Verdict(True, True, ""), Verdict(True, False, ""), Verdict(False, False, "missing")


def evaluated(probability: float, images: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [(prompt, RIGHT if rng.random() < probability else WRONG) for prompt in PROMPTS for _ in range(images)]


def test_overall_is_the_mean_of_the_task_means_not_of_the_images():
    rows = [(prompt, RIGHT if prompt.tag == "single_object" else WRONG) for prompt in PROMPTS]
    singles = sum(prompt.tag == "single_object" for prompt in PROMPTS)
    scores = TaskScores.of(rows)
    assert list(scores.correct) == list(TASKS)
    assert scores.correct["single_object"] == 1
    assert scores.overall == pytest.approx(1 / 6)
    assert singles / len(PROMPTS) < 0.1  # what the mean of the images would be


def test_strict_and_correct_are_counted_apart():
    scores = TaskScores.of((prompt, LOOSE) for prompt in PROMPTS)
    assert (scores.overall, scores.overall_strict) == (1.0, 0.0)


def first_of_two_ranks_scores_alone(rank, store, ended, answers):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == 0:
        answers.put(TaskScores.of(evaluated(0.6)))
    ended.wait(600)  # the other rank is there and never asks for a score


def test_scores_of_single_images_ask_no_other_rank(tmp_path):
    ranks = torch.multiprocessing.get_context("fork")
    answers, ended = ranks.Queue(), ranks.Event()
    arguments = (tmp_path / "store", ended, answers)
    processes = [ranks.Process(target=first_of_two_ranks_scores_alone, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert answers.get(timeout=600) == TaskScores.of(evaluated(0.6))
    finally:
        ended.set()
        for process in processes:
            process.join(10)
            process.kill()


def test_seen_and_held_out_compositions_are_told_apart():
    scores = TaskScores.of((prompt, WRONG if prompt.held_out else RIGHT) for prompt in PROMPTS)
    split = {prompt.tag for prompt in PROMPTS if prompt.held_out}
    assert set(scores.held_out) == set(scores.seen) == split
    assert set(scores.held_out.values()) == {0.0}
    assert set(scores.seen.values()) == {1.0}
    assert scores.values()["held_out"] == 0.0


def test_the_error_of_held_out_compositions_is_that_of_their_few_images():
    def error(per_prompt: int) -> float:
        draws = [TaskScores.of(evaluated(0.7, per_prompt, seed)) for seed in range(100)]
        spread = np.std([found.values()["held_out"] for found in draws])
        mean = float(np.mean([found.held_out_error for found in draws]))
        assert mean == pytest.approx(spread, rel=0.2)
        return mean

    assert error(20) < error(5) / 1.7


def test_a_share_of_all_or_none_of_few_images_is_not_certain():
    certain = TaskScores.of((prompt, WRONG if prompt.held_out else RIGHT) for prompt in PROMPTS)
    counts = [sum(prompt.held_out for prompt in PROMPTS if prompt.tag == tag) + 4 for tag in certain.held_out]
    expected = math.sqrt(sum(2 / n * (1 - 2 / n) / n for n in counts)) / len(counts)
    assert certain.held_out_error == pytest.approx(expected)
    assert TaskScores.of((p, RIGHT) for p in PROMPTS if not p.held_out).held_out_error is None


def test_a_row_of_an_earlier_version_has_no_error_of_held_out_compositions():
    row = asdict(TaskScores.of((prompt, RIGHT) for prompt in PROMPTS))
    assert TaskScores.from_row(row).held_out_error > 0
    del row["held_out_error"]
    assert TaskScores.from_row(row).held_out_error is None
    assert "held_out_se" not in TaskScores.from_row(row).values()


def test_the_standard_error_is_that_of_prompts_not_of_images():
    rng = np.random.default_rng(1)
    by_prompt = {prompt.prompt: rng.random() < 0.5 for prompt in PROMPTS}  # images of a prompt all alike
    few, many = (
        TaskScores.of((p, RIGHT if by_prompt[p.prompt] else WRONG) for p in PROMPTS for _ in range(images))
        for images in (1, 16)
    )
    assert many.standard_error == pytest.approx(few.standard_error, rel=0.1)
    shares = [[by_prompt[p.prompt] for p in PROMPTS if p.tag == task] for task in TASKS]
    closed_form = math.sqrt(sum(np.var(share) / len(share) for share in shares)) / len(TASKS)
    assert many.standard_error == pytest.approx(closed_form, rel=0.1)


def test_a_model_that_is_right_with_probability_p_scores_p():
    scores = TaskScores.of(evaluated(0.7, images=20))
    assert abs(scores.overall - 0.7) < 3 * scores.standard_error
    assert 0 < scores.standard_error < 0.05


def test_tasks_without_images_are_left_out():
    scores = TaskScores.of(row for row in evaluated(0.5) if row[0].tag == "colors")
    assert list(scores.correct) == ["colors"]
    assert scores.overall == scores.correct["colors"]


def test_one_prompt_a_task_has_no_standard_error():
    first = {prompt.tag: prompt for prompt in reversed(PROMPTS)}
    scores = TaskScores.of((prompt, RIGHT if tag == "colors" else WRONG) for tag, prompt in first.items())
    assert scores.overall == pytest.approx(1 / 6)
    assert math.isnan(scores.standard_error)
