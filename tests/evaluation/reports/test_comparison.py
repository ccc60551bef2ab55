from __future__ import annotations

import json
from pathlib import Path

import pytest

from emf_lightning.evaluation.reports.comparison import (
    Run,
    comparison,
    comparison_figure,
    distances_table,
    methods_table,
)

REAL = {"kid": 0.01, "kid_error": 0.1, "fid": 0.05, "diversity": 1.0, "nfe": 0}


def run(folder: Path, scores: dict[str, float], seconds: float = 600.0, kid: float = 2.0) -> Path:
    """A run directory as ``emf fit`` with ``RunSummary`` leaves it."""
    (folder / "shapes").mkdir(parents=True)
    sampled = {label: REAL | {"kid": kid, "diversity": 0.8, "nfe": int(label[0])} for label in scores}
    summary = {"seconds": seconds, "steps": 300, "step_seconds": seconds / 300, "memory_gb": 1.5}
    (folder / "summary.json").write_text(json.dumps(summary | {"distribution": {"real": REAL} | sampled}))
    lines = [
        {"label": label, "stage": stage, "step": step, "overall": score * share, "scores": {"standard_error": 0.02}}
        for label, score in scores.items()
        for stage, step, share in (("fit", 0, 0.1), ("fit", 150, 0.5), ("final", 300, 1.0))
    ]
    (folder / "shapes/scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_seed_has_the_scores_own_error(tmp_path):
    runs = [Run.read("emf", run(tmp_path / "a", {"1step": 0.75, "4step": 0.9}))]
    assert methods_table(runs) == [
        ["method", "1 step", "4 steps", "minutes", "training steps", "GB", "seeds"],
        ["emf", "0.750 ± 0.020", "0.900 ± 0.020", "10.0", "300", "1.50", "1"],
    ]
    assert distances_table(runs)[1:] == [
        ["emf", "1 step", "1", "2.00", "0.05", "0.80"],
        ["emf", "4 steps", "4", "2.00", "0.05", "0.80"],
        ["real images", "", "", "0.01", "0.05", "1.00"],
    ]


def test_several_seeds_have_the_error_of_their_mean(tmp_path):
    runs = [Run.read("fgm", run(tmp_path / str(k), {"1step": score}, kid=k)) for k, score in enumerate((0.6, 0.7, 0.8))]
    row = methods_table(runs)[1]
    assert (row[1], row[-1]) == (f"0.700 ± {0.1 / 3**0.5:.3f}", "3")
    assert distances_table(runs)[1][3] == "1.00"


def test_a_method_that_was_not_sampled_in_some_way_leaves_its_cell_empty(tmp_path):
    runs = [Run.read(name, run(tmp_path / name, {label: 0.5})) for name, label in (("a", "1step"), ("b", "4step_cfg2"))]
    head, first, second = methods_table(runs)
    assert head[1:3] == ["1 step", "4 steps, cfg2"]
    assert (first[1:3], second[1:3]) == (["0.500 ± 0.020", ""], ["", "0.500 ± 0.020"])


def test_each_group_has_its_tables(tmp_path):
    both = [Run.read(name, run(tmp_path / name, {"1step": 0.5})) for name in ("a", "b")]
    del both[1].summary["distribution"]
    page = comparison({"The same steps": both[:1], "The same time": both[1:]})
    steps, time = page.split("## ")[1:]
    assert "| a | 0.500 ± 0.020 |" in steps and "KID" in steps
    assert "| b | 0.500 ± 0.020 |" in time and "KID" not in time


def test_the_figure_shows_each_method_at_its_own_time(tmp_path):
    runs = [
        Run.read(method, run(tmp_path / method, {"1step": 0.5, "2step": 0.6}, seconds))
        for method, seconds in (("emf", 600.0), ("fgm", 1200.0))
    ]
    panels = comparison_figure(runs).axes
    assert [panel.get_title() for panel in panels] == ["1 step", "2 steps"]
    lines = {line.get_label(): line.get_xydata() for line in panels[0].lines}
    assert lines["emf"].ravel().tolist() == pytest.approx([0, 0.05, 5, 0.25, 10, 0.5])
    assert lines["fgm"][:, 0].tolist() == pytest.approx([0, 10, 20])


def test_a_run_that_is_not_complete_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no complete run"):
        Run.read("emf", tmp_path)


def test_runs_of_other_metrics_are_compared_by_these(tmp_path):
    folder = run(tmp_path / "a", {"1step": 0.5})
    (folder / "shapes/scores.jsonl").unlink()
    (folder / "shapes").rename(folder / "prompts")
    clip, kid = ({"title": t, "unit": t, "higher_is_better": t == "CLIP score"} for t in ("CLIP score", "KID x 1000"))
    lines = [
        {
            "label": "1step",
            "stage": stage,
            "step": step,
            "scores": None,
            "metrics": {
                "clip": clip | {"values": {"score": 20.0 + step, "se": 0.5}},
                "kid": kid | {"values": {"score": 90.0, "spread": 4.0}},
            },
        }
        for stage, step in (("fit", 0), ("final", 3))
    ]
    (folder / "prompts/scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Run.read("own", folder)
    head, row = methods_table([found])
    assert head[1:3] == ["prompts: clip, 1 step", "prompts: kid, 1 step"]
    assert row[1:3] == ["23.000 ± 0.500", "90.000"]
    panels = comparison_figure([found]).axes
    assert [panel.get_ylabel() for panel in panels] == ["CLIP score", "KID x 1000"]
    assert panels[1].get_ylim()[1] > 80


def test_a_run_without_a_metric_says_what_it_needs(tmp_path):
    folder = run(tmp_path / "a", {})
    with pytest.raises(ValueError, match="no metric to compare; give the experiments' FewStepSampling"):
        Run.read("own", folder)
