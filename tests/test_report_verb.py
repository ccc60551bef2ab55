"""`emf report`, called in this process."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from emf_lightning.cli import main
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.reports.report import Report
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.evaluation.score_history import ScoreHistory, ScoreRecord
from tests.evaluation.reports.test_report import row


def trained(folder, overall: float, suite: str = "shapes"):
    """A run directory whose training reached ``overall``."""
    records = [
        ScoreRecord(
            suite,
            "fit",
            step,
            SamplingConfig(1, 1.0),
            1,
            2.0,
            TaskScores({"colors": s}, {"colors": s}, {"colors": 9}, 0.1, {}, {}),
        )
        for step, s in ((10, overall / 2), (20, overall))
    ]
    ScoreHistory(records).write(folder / suite / "scores.jsonl")
    return folder


def test_runs_stand_in_one_table_with_the_names_that_tell_them_apart(tmp_path, capsys):
    first, second = trained(tmp_path / "runs/emf/version_0", 0.5), tmp_path / "runs/scflow/version_0"
    Report((row("shapes", steps=1), row("shapes", steps=4))).write(second)
    main(["report", str(first), str(second), "--out", str(tmp_path / "out")])

    report = Report.read(tmp_path / "out/report.json")
    assert [(r.run, r.steps, r.scores["score"]) for r in report.rows] == [
        ("emf/version_0", 1, 0.5),
        ("scflow/version_0", 1, pytest.approx(0.625)),
        ("scflow/version_0", 4, pytest.approx(0.625)),
    ]
    assert "| emf/version_0 | 1 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.md",
        "steps.png",
        "training-shapes.png",
    }


def test_a_run_may_be_named_by_its_name_alone_or_by_a_checkpoint(tmp_path):
    runs = [trained(tmp_path / f"runs/{name}/version_0", 0.5) for name in ("emf", "fgm")]
    for run in runs:
        (run / "config.yaml").touch()
    (checkpoint := runs[1] / "checkpoints/last.ckpt").parent.mkdir()
    checkpoint.touch()
    main(["report", str(tmp_path / "runs/emf"), str(checkpoint), "--out", str(tmp_path / "out")])
    report = Report.read(tmp_path / "out/report.json")
    assert [r.run for r in report.rows] == ["emf/version_0", "fgm/version_0"]


def test_a_training_alone_bears_the_title_that_says_which_detector_scored(tmp_path, capsys):
    main(["report", str(trained(tmp_path / "run", 0.5, "geneval_hf")), "--out", str(tmp_path / "out")])
    assert "## GenEval (HF detector)\n" in capsys.readouterr().out


def test_levels_stand_beside_several_runs_where_these_agree(tmp_path):
    level = {"ceiling": {"score": 0.99}}
    for name, levels in (("a", {"shapes": level, "other": level}), ("b", {"shapes": level, "other": {}})):
        Report((row("shapes"),), levels=levels).write(tmp_path / name)
    main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    assert Report.read(tmp_path / "out/report.json").levels == {"shapes": level}


@pytest.mark.parametrize(
    ("words", "said"), [(["nowhere"], "runs: no directory nowhere"), (["."], "has no scores; `emf fit` and `emf test`")]
)
def test_what_is_not_there_is_named(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["report", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_broken_history_is_named(tmp_path, capsys):
    run = trained(tmp_path / "run", 0.5)
    (run / "shapes/scores.jsonl").write_text(json.dumps({"suite": "x"}) + "\n")
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    assert "holds no scores" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["scores.correct.colors", "scores.standard_error", "seconds", "step", "nfe", "steps"])
def test_a_text_in_place_of_a_score_is_named(tmp_path, capsys, place):
    file = trained(tmp_path / "run", 0.5) / "shapes/scores.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    *parents, name = place.split(".")
    entry = rows[0]
    for parent in parents:
        entry = entry[parent]
    entry[name] = "many"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "holds no scores" in (said := capsys.readouterr().err) and "'many'" in said


@pytest.mark.parametrize("out", ["run", "other"])
def test_the_report_of_a_run_is_not_replaced(tmp_path, capsys, monkeypatch, out):
    trained(tmp_path / "run", 0.5)
    (trained(tmp_path / "other", 0.5) / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", "run", "--out", out])
    assert f"out: {out} is a run's directory" in capsys.readouterr().err
    assert not (tmp_path / out / "report.json").exists()


def test_one_run_named_twice_is_refused(tmp_path, capsys, monkeypatch):
    trained(tmp_path / "run", 0.5)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", "run", str(tmp_path / "run"), "--out", "out"])
    assert "runs: run is given more than once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_test_of_an_earlier_step_or_a_part_of_it_says_so(tmp_path):
    run = trained(tmp_path / "runs/emf/version_0", 0.5)
    (history,) = run.glob("*/scores.jsonl")
    records = ScoreHistory.read(history, "runs").records
    kid = MetricScores("KID", "KID", {"score": 3.0}, False)
    ScoreHistory([replace(record, metrics={"kid": kid}) for record in records]).write(history)
    Report((row("shapes", steps=1, step=10),), {"so far": "1 of 10 ways"}).write(run)
    main(["report", str(run), "--out", str(tmp_path / "out")])

    report = Report.read(tmp_path / "out/report.json")
    said = "1 of 10 ways so far; step 10, before the training's last scores at step 20"
    assert report.about["`emf test` of emf/version_0"] == said
    assert [(r.metric, r.step) for r in report.rows] == [("shapes", 10), ("kid", 20)]


def test_a_run_with_one_evaluation_has_no_curve(tmp_path):
    run = trained(tmp_path / "runs/emf/version_0", 0.5)
    (history,) = run.glob("*/scores.jsonl")
    ScoreHistory(ScoreHistory.read(history, "runs").records[:1]).write(history)
    main(["report", str(run), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("training-*.png"))
