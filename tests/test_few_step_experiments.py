"""Few-step experiments of the shapes world, trained for two steps from their own files, from the shipped parent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emf_lightning.cli import main

pytestmark = pytest.mark.slow

SHORT = """
trainer:
  max_steps: 2
  val_check_interval: 2
  limit_val_batches: 0
  precision: 32-true
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks: [{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_last: true}}]
data: {validation_shards: null, batch_size: 8, num_workers: 0, cache: null}
model: {init_args: {optimization: {scheduler: {init_args: {warmup: 0}}}}}
"""

SAVE = "trainer: {callbacks+: [{class_path: SaveNetwork, init_args: {time_scale: 5}}]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shapes")
    main(["shards", "--world", "small", "--count", "32", "--seed", "0", "--out", str(place / "shards")])
    (place / "short.yaml").write_text(SHORT)
    return place


def fit(experiment: str, place: Path, *options: str) -> Path:
    """Trains two steps and returns the checkpoint."""
    files = [f"experiments/shapes/{experiment}.yaml", str(place / "short.yaml")]
    run = place / experiment
    main(
        [
            "fit",
            *(part for file in files for part in ("--config", file)),
            *("--data.shards", str(place / "shards"), "--trainer.default_root_dir", str(run), *options),
        ]
    )
    return run / "version_0/checkpoints/last.ckpt"


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    assert state["global_step"] == 2
    assert all(value.isfinite().all() for value in state["state_dict"].values() if value.is_floating_point())
    return state["state_dict"]


@pytest.mark.parametrize("experiment", ["rcgm", "twin_flow", "cmt"])
def test_an_objective_trains_from_its_file(experiment: str, place: Path, root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    weights = trained(fit(experiment, place))
    assert any("time_embed.negative" in name for name in weights) == (experiment == "twin_flow")


@pytest.mark.parametrize("backbone", ["unet", "flux"])
def test_meanflow_adapts_another_backbone_from_its_flow(backbone: str, place: Path, root: Path, monkeypatch) -> None:
    """``SaveNetwork`` writes the network that the second file starts from, its time embedding fitted anew."""
    monkeypatch.chdir(root)
    (place / "save.yaml").write_text(SAVE)
    flow = fit(f"{backbone}_flow_matching", place, "--config", str(place / "save.yaml"))
    network = flow.parents[1] / "network"
    weights = trained(fit(backbone, place, "--model.init_args.net.init_args.pretrained", str(network)))
    assert not any(".interval." in name for name in trained(flow))
    assert any(".interval." in name for name in weights)


@pytest.mark.parametrize(
    ("stage", "next_stage"), [("anyflow", "anyflow_on_policy"), ("refined_all_captions", "refined_matched")]
)
def test_a_second_stage_starts_where_the_first_ended(
    stage: str, next_stage: str, place: Path, root: Path, monkeypatch
) -> None:
    monkeypatch.chdir(root)
    captions = ["--data.sampling_captions", "null"]  # of the batch
    first = fit(stage, place, *captions)
    start = trained(first)
    second = trained(fit(next_stage, place, *captions, "--model.init_args.init_from", str(first)))
    assert {name.partition(".")[0] for name in second} == {"net", "auxiliaries"}
    assert not torch.equal(second["net.transformer.proj_out.weight"], start["net.transformer.proj_out.weight"])
