"""`emf claim`, on trainings that are there: what it measures and reports of them."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml

from emf_lightning.cli import main
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.evaluation.score_history import ScoreHistory, ScoreRecord

COUNTS = (1, 2, 4, 30)


def finished(folder, noise: float, scores: dict[int, float]) -> None:
    """A run directory as training leaves it: what it was trained on, and its final scores."""
    words = {"class_path": "WordEncoder", "init_args": {"length": 10, "width": 64}}
    text = {"class_path": "DegradedEncoder", "init_args": {"noise": noise, "encoder": words}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"text": text}}))
    records = []
    for steps, score in scores.items():
        tasks = TaskScores({"colors": score}, {"colors": score}, {"colors": 9}, 0.1, {}, {})
        records.append(ScoreRecord("shapes", "final", 10, SamplingConfig(steps, 1.0), steps, 2.0, tasks))
    ScoreHistory(records).write(folder / "shapes/scores.jsonl")


@pytest.fixture
def out(tmp_path):
    for seed in (0, 1):
        for noise, few in ((0, 0.8), (4, 0.2 + 0.01 * seed)):
            parent = dict.fromkeys(COUNTS, 0.9)
            finished(tmp_path / f"noise={noise}-seed{seed}-flow_matching", noise, parent)
            finished(tmp_path / f"noise={noise}-seed{seed}-meanflow", noise, {1: few, 2: few, 4: 0.9, 30: 0.9})
    return tmp_path


def call(out, *options: str) -> None:
    main(
        ["claim", "--out", str(out), "--grades", "[noise=0, noise=4]", "--seeds", "[0, 1]", "--pairs", "300", *options]
    )


def test_finished_trainings_are_measured_and_not_repeated(out, capsys):
    call(out)

    content = json.loads((out / "claim.json").read_text())
    assert [(run["grade"], run["seed"]) for run in content["runs"]] == [
        ("noise=0", 0),
        ("noise=4", 0),
        ("noise=0", 1),
        ("noise=4", 1),
    ]
    good, poor = (run["discriminability"]["mean"] for run in content["runs"][:2])
    assert good > poor + 0.1
    assert content["slopes"][0]["verdict"].startswith("for the claim")
    assert "for the claim" in capsys.readouterr().out
    assert (out / "claim.png").stat().st_size > 5000


def test_unfinished_trainings_are_left_out_where_none_is_wanted(out):
    (out / "noise=4-seed1-meanflow/shapes/scores.jsonl").unlink()
    call(out, "--train", "false")
    assert len(json.loads((out / "claim.json").read_text())["runs"]) == 3


def test_a_grades_own_settings_win_over_further_options(tmp_path, monkeypatch):
    asked = []

    def fit(arguments, folder, jobs):
        asked.append(arguments)
        finished(folder, 0.0, dict.fromkeys(COUNTS, 0.9))

    monkeypatch.setattr("emf_lightning.cli.claim.fit", fit)
    options = ["--options", '["--trainer.max_steps", "1500"]']
    main(["claim", "--out", str(tmp_path), "--grades", "[steps=1200]", "--seeds", "[0]", "--pairs", "300", *options])
    parent, meanflow = asked
    assert [value for key, value in itertools.pairwise(parent) if key == "--trainer.max_steps"][-1] == "1200"
    assert [value for key, value in itertools.pairwise(meanflow) if key == "--trainer.max_steps"] == ["1500"]


def test_another_objective_starts_from_the_same_parents(out, capsys):
    call(out)
    for seed in (0, 1):
        for noise in (0, 4):
            finished(out / f"noise={noise}-seed{seed}-refined", noise, {1: 0.6, 2: 0.7, 4: 0.8, 30: 0.9})
    capsys.readouterr()
    call(out, "--meanflow", "claim/refined")

    said = capsys.readouterr().out
    assert "| RefinedMeanFlow, 1 step" in said and "Shares that RefinedMeanFlow keeps" in said
    assert "| MeanFlow" not in said
    of_refined, of_meanflow = (json.loads((out / f"{name}.json").read_text()) for name in ("claim-refined", "claim"))
    for one, other in zip(of_refined["runs"], of_meanflow["runs"], strict=True):
        assert one["flow_matching"] == other["flow_matching"] and one["meanflow"]["1"] == 0.6 != other["meanflow"]["1"]


def test_trainings_of_other_settings_do_not_come_into_one_table(out, capsys):
    call(out)
    with pytest.raises(SystemExit) as end:
        call(out, "--options", '["--trainer.max_steps", "100"]')
    assert end.value.code == 2
    assert "are of other settings, see" in capsys.readouterr().err


def test_an_earlier_versions_record_of_other_settings_is_refused(out, capsys):
    (out / "trained.yaml").write_text("[{trainer: {max_steps: 3}}, []]\n")
    with pytest.raises(SystemExit):
        call(out)
    assert "are of other settings, see" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--grades", "[loud=3]"], "grades: 'loud=3' is none; give noise=NUMBER"),
        (["--grades", "[noise=much]"], "grades: 'noise=much' is none"),
        (["--grades", "[noise=0,noise=-1]"], "grades: 'noise=-1' is none"),
        (["--seeds", "[0,-1]"], "seeds must lie in 0 .. 4,294,967,295, got -1"),
        (["--pairs", "2"], "pairs: 2 are too few"),
        (["--grades", "[steps=1.5]"], "grades: 'steps=1.5' is none"),
        (["--meanflow", "nowhere.yaml"], "meanflow: no file nowhere.yaml, and no experiment"),
        (["--meanflow", "claim/flow_matching"], "meanflow: flow_matching.yaml has the name of flow_matching's file"),
        (["--train", "false", "--seeds", "[7]"], "no finished trainings"),
    ],
)
def test_mistakes_end_in_one_sentence(out, capsys, options, said):
    with pytest.raises(SystemExit) as end:
        call(out, *options)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
