"""`emf compare`: what it refuses, and the whole of it on two small runs."""

from __future__ import annotations

import json

import pytest

from emf_lightning.cli import main
from emf_lightning.cli.compare import CALIBRATION
from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL

EXPERIMENT = """
base: {root}/experiments/parts/shapes_adaptation.yaml
trainer: {{accelerator: cpu, precision: 32-true{trainer}}}
data: {{shards: {shards}, validation_shards: null, batch_size: 4, num_workers: 0, cache: null}}
model:
  class_path: {model}
  init_args:
    {settings}
    optimization:
      scheduler:
        class_path: WarmupCosine
        init_args: {{total: "${{trainer.max_steps}}", warmup: 30}}
    net:
      class_path: SanaFlowMap
      init_args:
        architecture:
          num_layers: 1
          num_attention_heads: 1
          attention_head_dim: 8
          num_cross_attention_heads: 1
          cross_attention_head_dim: 8
"""


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(["compare", *arguments])
    return capsys.readouterr().err


def test_an_experiment_that_is_not_there_is_named(tmp_path, capsys):
    assert "no file nowhere.yaml" in said(capsys, "--out", str(tmp_path), "--experiments", "[nowhere.yaml]")


def test_no_time_is_refused(tmp_path, capsys, root):
    emf = root / "experiments/shapes/emf.yaml"
    line = said(capsys, "--out", str(tmp_path), "--experiments", f"[{emf}]", "--minutes", "0")
    assert "minutes must be positive" in line
    assert "steps must be positive" in said(capsys, "--out", str(tmp_path), "--experiments", f"[{emf}]", "--steps", "0")


def test_an_overlay_that_is_not_there_is_named(tmp_path, capsys, root):
    emf = root / "experiments/shapes/emf.yaml"
    line = said(capsys, "--out", str(tmp_path), "--experiments", f"[{emf}]", "--overlays", "[nowhere.yaml]")
    assert "overlays: no file nowhere.yaml" in line


def test_a_folder_of_other_runs_is_not_taken_for_these(tmp_path, capsys, root):
    emf = root / "experiments/shapes/emf.yaml"
    run = tmp_path / "emf/steps5-seed0"
    run.mkdir(parents=True)
    (run / "compared.yaml").write_text("base: another.yaml\n")
    (run / "summary.json").write_text("{}")
    line = said(capsys, "--out", str(tmp_path), "--experiments", f"[{emf}]", "--steps", "5")
    assert f"{run} holds a run of other files or settings" in line


@pytest.mark.slow
def test_two_methods_become_tables_and_a_figure(tmp_path, monkeypatch, capsys, root):
    monkeypatch.chdir(root)
    shards = tmp_path / "shards"
    write_shards(SMALL, shards, 64, samples_per_shard=32)
    files = []
    for name, model, settings, trainer in (
        ("meanflow", "FlowMapModule", "caption_dropout: 0.0", ""),
        ("fgm", "FGM", "alternation: {auxiliary_updates: 1}", ", gradient_clip_val: null"),
    ):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(
            EXPERIMENT.format(root=root, shards=shards, model=model, settings=settings, trainer=trainer)
        )
    out = tmp_path / "out"
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {batch_size: 2}")
    names = ",".join(map(str, files))
    arguments = ["compare", "--out", str(out), "--experiments", f"[{names}]", "--overlays", f"[{overlay}]"]
    arguments += ["--steps", "2", "--images_per_prompt", "2"]
    main([*arguments, "--seeds", "[3]", "--jobs", "2"])
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/steps2-seed3/summary.json")}
    assert [json.loads(path.read_text())["seed"] for path in made] == [3, 3]
    assert "batch_size: 2" in (out / "fgm/steps2-seed3/config.yaml").read_text()
    main([*arguments, "--seeds", "[3]", "--jobs", "2", "--minutes", "0.0001"])  # at least as many as a trial has
    assert all(path.stat().st_mtime_ns == when for path, when in made.items()), "what is there is not trained again"
    steps, time = (out / "comparison.md").read_text().split("## ")[1:]
    for group, count in ((steps, 2), (time, CALIBRATION)):
        rows = [[cell.strip() for cell in row.split("|")] for row in group.splitlines()]
        scored = [(row[1], *row[-4:-1:2]) for row in rows if len(row) == 10]
        assert scored[2:] == [("meanflow", str(count), "1"), ("fgm", str(count), "1")]
    assert (out / "comparison.png").stat().st_size > 10_000
