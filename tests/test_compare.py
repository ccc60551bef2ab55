"""`emf compare`: what it refuses, and the whole of it on two small runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emf_lightning.cli import main
from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL

EXPERIMENT = """
base: {root}/experiments/small_adaptation.yaml
trainer: {{accelerator: cpu, precision: 32-true{trainer}}}
data: {{shards: {shards}, validation_shards: null, batch_size: 4, num_workers: 0, cache: null}}
model:
  class_path: {model}
  init_args:
    {settings}
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


@pytest.mark.slow
def test_two_methods_and_two_seeds_become_a_table_and_a_figure(tmp_path, monkeypatch, capsys, root):
    monkeypatch.chdir(root)
    shards = tmp_path / "shards"
    write_shards(SMALL, shards, 64, samples_per_shard=32)
    files = []
    for name, model, settings, trainer in (
        ("meanflow", "MeanFlow", "caption_dropout: 0.0", ""),
        ("fgm", "FGM", "critic_updates: 1", ", gradient_clip_val: null"),
    ):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(
            EXPERIMENT.format(root=root, shards=shards, model=model, settings=settings, trainer=trainer)
        )
    out = tmp_path / "out"
    names = ",".join(map(str, files))
    arguments = ["compare", "--out", str(out), "--experiments", f"[{names}]", "--steps", "2"]
    main([*arguments, "--seeds", "[0]", "--images_per_prompt", "2"])
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/seed0/summary.json")}
    assert len(made) == 2
    main([*arguments, "--seeds", "[0,1]", "--images_per_prompt", "2"])
    assert all(path.stat().st_mtime_ns == when for path, when in made.items()), "what is there is not trained again"
    seeds = {json.loads(path.read_text())["seed"] for path in Path(out).glob("*/seed*/summary.json")}
    assert seeds == {0, 1}
    rows = (out / "comparison.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["meanflow"] * 3 + ["fgm"] * 3 + ["real pictures"]
    assert (out / "comparison.png").stat().st_size > 10_000
