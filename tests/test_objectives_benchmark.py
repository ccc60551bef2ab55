"""The table of all objectives: what it plans, and what it makes of scores."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from benchmarks.objectives import OBJECTIVES, REFERENCE, ROOT, SETTINGS, STEPS, Run, equal_time, row, table
from emf_lightning.callbacks.score_history import ScoreHistory, ScoreRecord
from emf_lightning.evaluation.score import TaskScores


def leave(run: Run, overall: float, stage: str = "final", step: int | None = None, steps=STEPS) -> None:
    scores = TaskScores({"colors": overall}, {"colors": overall}, {"colors": 100}, 0.03, {}, {})
    step = run.steps if step is None else step
    records = [ScoreRecord("shapes", stage, step, f"{n}step", n, 1.0, n, 1.0, scores) for n in steps]
    ScoreHistory(records).write(run.folder / "shapes" / "scores.jsonl")


def test_equal_time_gives_the_faster_more_steps():
    seconds = {REFERENCE: 1.0, "alpha_flow": 0.8, "transition": 1.02, "decoupled": 2.0}
    assert equal_time(list(seconds), seconds, 600) == {
        REFERENCE: 600,
        "alpha_flow": 750,
        "transition": 600,
        "decoupled": 300,
    }


def test_scores_are_means_over_seeds_with_their_standard_error(tmp_path):
    runs = [Run("emf", seed, 10, tmp_path) for seed in range(3)]
    assert row(runs) is None
    leave(runs[0], 0.7)
    assert row(runs) == ["10", "1", *["0.700 ± 0.030"] * 4], "of the prompts where there is one seed"
    leave(runs[1], 0.9)
    assert row(runs) == ["10", "2", *["0.800 ± 0.100"] * 4]


@pytest.mark.parametrize("arguments", [{"stage": "fit"}, {"step": 9}, {"steps": STEPS[:3]}])
def test_a_run_that_is_not_done_counts_for_nothing(tmp_path, arguments):
    run = Run("emf", 0, 10, tmp_path)
    leave(run, 0.7, **arguments)
    assert row([run]) is None
    assert "| 10 | 0 | - | - | - | - |" in table({"emf": [run]}, {})[2]


def test_each_objective_is_an_experiment_and_all_are_there():
    names = {path.stem for path in (ROOT / "experiments" / "shapes").glob("*.yaml")}
    assert set(OBJECTIVES) <= names
    suite = OmegaConf.load(SETTINGS).trainer.callbacks[-1]
    assert tuple(suite.init_args.steps) == STEPS
