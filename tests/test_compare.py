"""`emf compare`: what it refuses, and the whole of it on two small runs."""

from __future__ import annotations

import json

import pytest
import yaml

from emf_lightning.cli import main
from emf_lightning.cli.compare import CALIBRATION, Training, _warmups
from emf_lightning.cli.parsing.experiment_files import config_files, without_base
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


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [("--seeds", "[0,-1]", "seeds must lie in 0"), ("--images_per_prompt", "1", "images_per_prompt must be 2 or more")],
)
def test_what_each_training_would_refuse_is_refused_before_the_first(tmp_path, capsys, root, option, value, complaint):
    emf = root / "experiments/shapes/emf.yaml"
    line = said(capsys, "--out", str(tmp_path), "--experiments", f"[{emf}]", option, value)
    assert complaint in line
    assert not any(tmp_path.iterdir())


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


def test_an_experiment_that_has_changed_is_not_taken_for_the_one_that_was_trained(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("model: {init_args: {nan_patience: 3}}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\ndata: {batch_size: 2}\n")
    (tmp_path / "top.yaml").write_text("trainer: {precision: 32-true}\n")
    training = Training(tmp_path / "own.yaml", (tmp_path / "top.yaml",), 5, 0, tmp_path / "out/own/steps5-seed0", 8)
    training.folder.mkdir(parents=True)
    training.file.write_text(training._config())
    training.check()  # of a version that kept no record
    training.record.write_text(training._contents())
    (training.folder / "summary.json").write_text("{}")
    training.check()
    for file in ("base.yaml", "own.yaml", "top.yaml"):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(f"{before}# only a comment\n")
        training.check()
        (tmp_path / file).write_text(f"{before}seed_everything: 7\n")
        options = ["--experiments", f"[{tmp_path}/own.yaml]", "--overlays", f"[{tmp_path}/top.yaml]", "--steps", "5"]
        line = said(capsys, "--out", str(tmp_path / "out"), *options)
        assert f"has changed since {training.folder} was trained" in line
        (tmp_path / file).write_text(before)
    training.check()


def test_a_short_run_has_no_warmup_whatever_the_schedules(root):
    def places(name, *more):
        settings = [
            yaml.safe_load(without_base(file.read_text())) for file in config_files(root / "experiments" / name)
        ]
        return _warmups([*settings, *more])

    network = "model.init_args.optimization.scheduler.init_args"
    assert places("shapes/emf.yaml") == [network]
    assert places("shapes/fgm.yaml") == [network, "model.init_args.online_optimization.scheduler.init_args"]
    none = {"model": {"init_args": {"optimization": {"scheduler": None}}}}
    assert places("shapes/emf.yaml", none) == []
    linear = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 5}}
    assert places("shapes/emf.yaml", {"model": {"init_args": {"optimization": {"scheduler": linear}}}}) == []
    unsaid = {"class_path": "emf_lightning.WarmupCosine", "init_args": {"total": 5}}  # 100 steps, by its default
    assert places("shapes/emf.yaml", {"model": {"init_args": {"optimization": {"scheduler": unsaid}}}}) == [network]


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
