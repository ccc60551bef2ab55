"""`emf score`, called in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from emf_lightning.cli import main
from emf_lightning.cli.score import score
from tests.evaluation.folders.test_image_folder import write_listed

ROOT = Path(__file__).resolve().parent.parent
SUITE = """
metric:
  class_path: SuiteScore
  init_args:
    suite:
      class_path: ShapesSuite
      init_args: {per_task: 3, scenes_per_task: 3}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    write_listed(tmp_path / "images")
    (tmp_path / "shapes.yaml").write_text(SUITE)
    return tmp_path / "images"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["score", *arguments])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emf ")]
    assert len(lines) == 1
    return lines[0]


def test_a_folder_is_scored_with_a_suite_from_a_file(folder, capsys):
    main(["score", str(folder), "--config", str(folder.parent / "shapes.yaml")])

    printed = capsys.readouterr().out
    assert "shapes world, " in printed
    scores = json.loads((folder.parent / "images-scores/shapes/scores.json").read_text())
    assert scores["scores"]["score"] == 1
    assert f"score          {scores['scores']['score']:.4f}" in printed


@pytest.mark.parametrize("inside", [".", "../images"])
def test_scores_of_this_folder_lie_beside_it(folder, monkeypatch, inside):
    monkeypatch.chdir(folder)
    main(["score", inside, "--config", str(folder.parent / "shapes.yaml")])
    assert (folder.parent / "images-scores/shapes/scores.json").is_file()
    assert not list(folder.rglob("scores.json"))


def test_images_of_each_step_count_have_scores_of_their_own(folder):
    rows = [json.loads(line) | {"steps": 1} for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for row in list(rows):
        file = row["file"].replace("1step", "4step")
        (folder / file).write_bytes((folder / row["file"]).read_bytes())
        rows.append(row | {"file": file, "steps": 4})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for files in ("*-1step[-.]*", "*-4step[-.]*"):
        main(["score", str(folder), "--files", files, "--config", str(folder.parent / "shapes.yaml")])

    found = {
        path.parent.name: json.loads(path.read_text()) for path in folder.parent.glob("images-scores/*/scores.json")
    }
    assert {name: scores["images"] for name, scores in found.items()} == dict.fromkeys(
        ("shapes-1step", "shapes-4step"), len(rows) // 2
    )


def test_a_distance_needs_no_prompts_and_is_set_by_short_names(folder, capsys):
    (folder / "prompts.jsonl").unlink()
    options = ["--metric", "FrechetDistance", "--metric.features", "RandomFeatures", "--metric.reference", str(folder)]
    main(["score", str(folder), *options, "--out", str(folder.parent / "out")])

    scores = json.loads((folder.parent / "out/scores.json").read_text())
    assert scores["metric"] == "fid_random"
    assert scores["scores"]["score"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere", "--config", "{config}"], "folder: no folder nowhere"),
        (["{folder}", "--config", "{config}", "--files", "*.jpg"], r"no image in .* matches files='\*.jpg'"),
        (["{folder}", "--config", "{config}", "--batch_size", "0"], "batch_size must be at least 1"),
        (
            ["{folder}", "--metric", "ClipScore", "--metric.model", "no-model", "--metric.pretrained", "x"],
            "ClipScore: cannot load model='no-model'",
        ),
        (
            ["{folder}", "--metric", "DpgBench", "--metric.benchmark", "no.csv", "--metric.vqa_model", "BlipVqa"],
            "BlipVqa: cannot load|cannot read benchmark",
        ),
        (["{folder}"], "metric"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, capsys, options, said):
    words = [word.format(folder=folder, config=folder.parent / "shapes.yaml") for word in options]
    assert re.search(said, complaint(capsys, *words))


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/scores").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_metrics_are_understood(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(score, as_group=False)
    parsed = parser.parse_args(["--folder", "images", "--config", str(path)])
    assert parsed.metric.class_path.startswith("emf_lightning.evaluation.")
    assert path.read_text().startswith(f"# `emf score IMAGES --config experiments/scores/{path.name}`: ")
