from __future__ import annotations

import json
import math

import pytest

from emf_lightning.evaluation.bootstrap import Estimate
from emf_lightning.evaluation.encoders.claim import Claim, ClaimRun

QUALITY = {"noise=0": 0.4, "noise=1": 0.3, "noise=2": 0.2}


def run(grade: str, seed: int, kept: dict[int, float], parent: float = 0.9, graded: bool = True) -> ClaimRun:
    d = QUALITY.get(grade, 0.4)
    few = {steps: share * parent for steps, share in kept.items()}
    return ClaimRun(
        grade, graded, seed, Estimate(d, d - 0.01, d + 0.01), {1: 0.0, 2: 0.1, 4: 0.5, 30: parent}, {**few, 30: parent}
    )


def claim(slope: float, seeds: int = 3, wobble: float = 0.1) -> Claim:
    """Runs whose share kept at one step rises by ``slope`` per unit of discriminability, and at four not at all."""
    runs = []
    for seed in range(seeds):
        of_seed = slope + wobble * (seed - (seeds - 1) / 2)
        for grade, d in QUALITY.items():
            runs.append(run(grade, seed, {1: 0.8 + of_seed * (d - 0.4), 2: 0.9 + 0.1 * (seed - 1) * d, 4: 1.0}))
    return Claim(tuple(runs))


def test_slopes_are_those_of_the_shares_kept_and_their_error_that_over_seeds():
    one, two, four, *own = claim(1.0).slopes()
    assert [(slope.steps, slope.relative_to) for slope in (one, two, four)] == [
        (1, "parent"),
        (2, "parent"),
        (4, "parent"),
    ]
    assert [(slope.steps, slope.relative_to) for slope in own] == [(1, "own"), (2, "own"), (4, "own")]
    assert one.mean == pytest.approx(1.0)
    assert one.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert one.margin == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)  # Student's t, two degrees of freedom
    assert two.mean == pytest.approx(0, abs=1e-9)
    assert four.mean == pytest.approx(0, abs=1e-9)


def test_the_verdict_says_which_way_it_came_out():
    verdicts = [claim(slope).slopes()[0].verdict for slope in (1.0, -1.0, 0.01)]
    assert verdicts[0].startswith("for the claim")
    assert verdicts[1].startswith("against the claim")
    assert verdicts[2].startswith("undecided: the 95 % interval holds 0")
    assert claim(1.0, seeds=1).slopes()[0].verdict.startswith("undecided, for it takes two seeds")


def test_controls_and_unfinished_seeds_have_no_say_in_the_slope():
    whole = claim(1.0)
    control = run("shared=3", 0, {1: 0.1, 2: 0.1, 4: 0.1}, graded=False)
    unfinished = run("noise=0", 9, {1: 0.0, 2: 0.0, 4: 0.0})
    assert Claim((*whole.runs, control, unfinished)).slopes() == whole.slopes()
    row = "| shared=3 (control) | 0.400 [0.390, 0.410] | 1 | 0.000 | 0.100 | 0.500 | 0.900 | 0.090 |"
    assert row in Claim((*whole.runs, control)).markdown()


def test_a_share_is_of_the_parents_or_of_the_models_own_many_steps():
    weakened = ClaimRun("noise=0", True, 0, Estimate(0.4, 0.3, 0.5), {30: 0.9}, {1: 0.3, 2: 0.5, 4: 0.6, 30: 0.6})
    assert weakened.kept(1) == pytest.approx(0.3 / 0.9)
    assert weakened.kept(1, relative_to="own") == pytest.approx(0.5)


def test_a_parent_that_generates_nothing_keeps_nothing_known():
    dead = Claim((run("noise=0", 0, {1: 0.5, 2: 0.5, 4: 0.5}), run("noise=1", 0, {1: 0, 2: 0, 4: 0}, parent=0.0)))
    assert all(math.isnan(slope.mean) for slope in dead.slopes())
    assert dead.slopes()[0].verdict == "undecided: no seed has its whole scale yet, with parents that score above 0"
    assert "not known" in dead.markdown()


def test_files_hold_runs_slopes_and_both_panels(tmp_path):
    found = claim(1.0)
    found.write(tmp_path)
    content = json.loads((tmp_path / "claim.json").read_text())
    assert len(content["runs"]) == 9
    assert content["slopes"][0]["mean"] == pytest.approx(1.0)
    assert "for the claim" in (tmp_path / "claim.md").read_text()
    parents, models, kept = found.figure().axes
    assert (parents.get_ylabel(), kept.get_ylabel()) == ("score", "share of the parent's 30-step score")
    assert [text.get_text() for text in models.get_legend().get_texts()] == ["1 step", "2 steps", "4 steps", "30 steps"]
    assert [len(axes.containers) for axes in (parents, models, kept)] == [4, 4, 3]
