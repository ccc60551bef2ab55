from __future__ import annotations

import dataclasses
import json
import math

import pytest

from emf_lightning.evaluation.reports.published import PUBLISHED
from emf_lightning.evaluation.reports.report import Report, ReportRow
from emf_lightning.evaluation.reports.report_figures import steps_figure, training_figure

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def row(metric: str = "geneval_hf", steps: int = 4, **changes) -> ReportRow:
    scores = {task: 0.5 + 0.05 * i for i, task in enumerate(TASKS)}
    values = {
        "run": "mine",
        "metric": metric,
        "title": {"geneval_hf": "GenEval (HF detector)", "shapes": "shapes world"}.get(metric, metric),
        "weights": "averaged",
        "step": 10,
        "steps": steps,
        "guidance_scale": 1.0,
        "nfe": steps,
        "images": 2212,
        "seeds": (0, 1),
        "scores": {**scores, "score": sum(scores.values()) / 6, "se": 0.012},
        "seed_spread": 0.004,
        "settings": {"prompts": 553},
    }
    return ReportRow(**{**values, **changes})


def cells(table: str, model: str, steps: int) -> dict[str, str]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    for line in lines[2:]:
        found = dict(zip(lines[0], line, strict=True))
        if found["model"] == model and found["steps"] == str(steps):
            return found
    raise AssertionError(f"no row {model} {steps}")


def section(report: Report, title: str) -> str:
    return report.markdown().split(f"## {title}\n")[1].split("\n## ")[0]


def test_published_means_of_tasks_agree_with_the_printed_overall():
    for known in PUBLISHED:
        scores = known.scores.get("geneval", {})
        if len(scores) > 1:
            assert sum(scores[task] for task in TASKS) / 6 == pytest.approx(scores["score"], abs=0.0101), known


def test_published_rows_of_another_detector_have_an_overall_of_their_own():
    table = section(Report((row(),)), "GenEval (HF detector)")
    ours, theirs = cells(table, "mine", 4), cells(table, "EMF", 4)

    assert ours["overall (this detector)"] == "**0.625**"
    assert (ours["± se"], ours["± seeds"], ours["NFE"]) == ("0.012", "0.004", "4")
    assert ours["overall (published, its own detector)"] == ""
    assert (theirs["overall (published, its own detector)"], theirs["overall (this detector)"]) == ("0.90", "")
    assert theirs["attribution"] == "(0.76)"
    assert "2,212 images each, noise seeds 0, 1, prompts 553." in table


def test_models_of_which_only_the_mean_is_published_stand_there_without_tasks():
    found = cells(section(Report((row(),)), "GenEval (HF detector)"), "Qwen-Image", 50)
    assert (found["overall (published, its own detector)"], found["attribution"]) == ("0.87", "")


def test_ceiling_chance_and_what_training_does_not_show_stand_beside_the_scores():
    shares = dict.fromkeys(TASKS, 0.25)
    levels = {"shapes": {"ceiling": {**shares, "score": 0.998}, "chance": {**shares, "score": 0.031, "held_out": 0.02}}}
    scores = {**row().scores, "seen": 0.71, "held_out": 0.33, "held_out_se": 0.04}
    report = Report((row("shapes", scores=scores),), levels=levels)
    table = section(report, "shapes world")

    assert cells(table, "mine", 4)["held out"] == "0.330 ± 0.040"
    chance = cells(table, "chance: of another prompt of its task", "")
    assert (chance["overall"], chance["held out"], chance["seen"]) == ("**0.031**", "0.020", "")
    heights = [line.get_ydata()[0] for line in steps_figure(report).axes[0].lines if len(set(line.get_ydata())) == 1]
    assert {0.998, 0.031} <= set(heights)


def test_the_shapes_world_never_stands_beside_published_rows():
    assert "EMF" not in section(Report((row("shapes"),)), "shapes world")


def test_table_4_has_a_line_for_each_model_and_step_count():
    hps = {"anime": 26.0, "concept-art": 25.0, "paintings": 24.0, "photo": 23.0, "score": 24.5, "se": 0.1}
    rows = (
        row("dpg_blip", title="DPG-Bench (blip as judge)", scores={"score": 70.0, "se": 0.5, "entity": 80.0}),
        row("hps", title="HPS v2.1", scores=hps),
    )
    rows = tuple(dataclasses.replace(known, seed_spread=math.nan) for known in rows)
    table = section(Report(rows), "DPG-Bench and HPS v2.1")
    ours, theirs = cells(table, "mine", 4), cells(table, "EMF", 4)

    assert (ours["DPG-Bench (blip as judge)"], ours["HPS anime"], ours["HPS average"]) == (
        "70.00 ± 0.50",
        "26.00",
        "24.50 ± 0.10",
    )
    assert (theirs["DPG-Bench (published, mPLUG)"], theirs["HPS average"]) == ("81.20", "29.25")
    assert theirs["DPG-Bench (blip as judge)"] == ""


def test_the_published_vqa_model_shares_its_column():
    table = section(Report((row("dpg_official", title="DPG-Bench", scores={"score": 70.0}),)), "DPG-Bench and HPS v2.1")
    assert cells(table, "EMF", 8)["DPG-Bench"] == "81.94"


def test_categories_have_a_table_with_the_published_ones_in_brackets_unless_counted_alike():
    scores = {"score": 70.0, "se": 0.5, "global": 81.0, "entity": 82.0}
    rows = (row("dpg_blip", title="DPG-Bench (blip as judge)", scores=scores),)
    table = section(Report(rows), "DPG-Bench (blip as judge): categories")
    assert cells(table, "mine", 4)["entity"] == "82.00"
    assert cells(table, "EMF", 4) == {
        "model": "EMF",
        "steps": "4",
        "NFE": "",
        "global": "(88.01)",
        "entity": "(87.27)",
    }
    alike = (row("dpg_official", title="DPG-Bench", scores=scores),)
    assert cells(section(Report(alike), "DPG-Bench: categories"), "EMF", 1)["entity"] == "85.85"


def test_published_fids_stand_beside_those_of_the_same_protocol_alone():
    def table(**settings):
        return section(Report((row("fid", title="FID", scores={"score": 5.5}, settings=settings),)), "FID")

    assert cells(table(resolution=32, count=50_000), "FGM, CIFAR-10 (published)", 1)["score"] == "3.08"
    assert "published" not in table(resolution=32, count=10_000)


def test_the_spread_over_seeds_is_in_every_table():
    rows = (row("dpg", title="DPG-Bench", scores={"score": 70.0}, seed_spread=0.25),)
    assert cells(section(Report(rows), "DPG-Bench and HPS v2.1"), "mine", 4)["DPG-Bench"] == "70.00 (seeds ± 0.25)"
    rows = (row("clip", title="CLIP score", scores={"score": 27.0}, seed_spread=0.25),)
    assert cells(section(Report(rows), "CLIP score"), "mine", 4)["± seeds"] == "0.25"


def test_weights_and_guidance_are_in_the_models_name():
    assert row(weights="trained", guidance_scale=2.0).model == "mine, not averaged, guidance 2"


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    report = Report((row(), row(steps=1, seed_spread=math.nan)), {"checkpoint": "last.ckpt"})
    report.write(tmp_path)
    again = Report.read(tmp_path / "report.json")

    assert again.rows[0] == report.rows[0]
    assert again.about == report.about
    assert math.isnan(again.rows[1].seed_spread)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert (tmp_path / "report.md").read_text() == report.markdown()
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="is no report of `emf test`"):
        Report.read(tmp_path / "report.json")


def test_a_report_of_an_earlier_version_is_read(tmp_path):
    report = Report((row(guidance_scale=2.0),))
    report.write(tmp_path)
    file = tmp_path / "report.json"
    file.write_text(file.read_text().replace('"guidance_scale"', '"guidance"'))
    assert Report.read(file).rows == report.rows


def test_figures_have_a_line_for_each_run_and_weights():
    rows = [row(steps=n, run=run, weights=w) for n in (1, 4) for run in "ab" for w in ("averaged", "trained")]
    figure = steps_figure(Report(tuple(rows)))
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    note = "(published, its own detector)"
    assert labels == {f"EMF {note}", f"BLIP3o-NEXT 3B {note}", "a", "a, not averaged", "b", "b, not averaged"}

    curves = {"a": {1: [(0, 0.1), (10, 0.5)], 4: [(0, 0.8), (10, 0.9)]}, "b": {1: [(0, 0.0), (10, 0.2)]}}
    axes = training_figure(curves, "shapes").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "1 step", "4 steps"]


@pytest.mark.parametrize(("metric", "note"), [("dpg_official", ""), ("dpg", ", counted by its script")])
def test_published_scores_of_dpg_say_how_they_were_counted(metric, note):
    figure = steps_figure(Report((dataclasses.replace(row(metric), scores={"score": 80.0}),)))
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {f"EMF (published{note})", f"BLIP3o-NEXT 3B (published{note})", row().model}


def test_guidance_scales_of_a_run_look_different():
    rows = [row("shapes", steps=n, guidance_scale=g, run=run) for n in (1, 4) for g in (1.0, 2.0) for run in "ab"]
    lines = [bars.lines[0] for bars in steps_figure(Report(tuple(rows))).axes[0].containers]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(lines) == len(looks) == 4
    assert len({line.get_color() for line in lines}) == 2, "a run keeps its colour"


def test_every_number_of_another_metric_is_in_its_table():
    report = Report((dataclasses.replace(row("clip"), title="CLIP score", scores={"score": 27.25, "se": 0.03125}),))
    found = cells(section(report, "CLIP score"), "mine", 4)
    assert (found["score"], found["se"]) == ("27.25", "0.03125")


def test_numbers_of_images_are_whole():
    rows = (dataclasses.replace(row("kid"), scores={"score": 2.5, "images": 12345.0}),)
    assert cells(section(Report(rows), rows[0].title), "mine", 4)["images"] == "12345"
