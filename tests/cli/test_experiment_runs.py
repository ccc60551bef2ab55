"""Configurations from experiment files and options, and the runs they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from emf_lightning.cli import main
from tests.cli.world import complaint


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The configuration that `emf fit` would run."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *options, "--print_config"])
    assert end.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(config, dict)
    return config


def weights(run: str) -> dict[str, torch.Tensor]:
    state = torch.load(f"runs/tiny/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert isinstance(state, dict)
    return state


def test_a_child_keeps_what_its_base_says(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "--config", "shapes/child.yaml")

    assert config["model"]["init_args"]["caption_dropout"] == 0.25
    assert config["model"]["init_args"]["net"]["init_args"]["architecture"]["num_layers"] == 1
    assert "base" not in config


def test_callbacks_of_a_child_are_appended_to_its_bases(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = printed(capsys, "--config", "shapes/child.yaml")["trainer"]["callbacks"]

    assert [c["class_path"].rpartition(".")[2] for c in callbacks] == ["ModelCheckpoint", "SampleWriter"]


def test_the_command_line_wins_over_base_and_child(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--trainer.max_steps", "7", "--model.init_args.caption_dropout", "0.5")
    config = printed(capsys, "--config", "shapes/child.yaml", *options)

    assert config["trainer"]["max_steps"] == 7
    assert config["model"]["init_args"]["caption_dropout"] == 0.5


def test_an_interpolation_in_the_base_follows_a_later_override(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "--config", "shapes/child.yaml", "--trainer.max_steps", "7")

    assert config["model"]["init_args"]["optimization"]["scheduler"]["init_args"]["total"] == 7


CHANGE_OF_CLASS = "{model: {init_args: {optimization: {scheduler: {class_path: torch.optim.lr_scheduler.LinearLR}}}}}"


def test_an_interpolation_that_a_change_of_class_would_drop_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "fit", "--config", "base.yaml", "--config", CHANGE_OF_CLASS)

    assert "total: ${trainer.max_steps} of WarmupCosine would be lost" in line
    assert "values with ${...} do not survive a change of class" in line


# -- runs -------------------------------------------------------------------------------------------------------------


def test_the_network_takes_its_sizes_from_the_data(world: Path) -> None:
    state = weights("version_0")

    assert state["net.transformer.caption_projection.linear_1.weight"].shape[1] == 16
    assert state["net.transformer.patch_embed.proj.weight"].shape[1:] == (3, 12, 12)


def test_a_run_replays_from_the_config_in_its_directory(world: Path) -> None:
    main(["fit", "--config", "runs/tiny/version_0/config.yaml", "--trainer.logger.init_args.version", "replay"])

    first, again = weights("version_0"), weights("replay")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    configs = [yaml.safe_load((world / f"runs/tiny/{run}/config.yaml").read_text()) for run in ("version_0", "replay")]
    configs[1]["trainer"]["logger"]["init_args"]["version"] = None
    assert configs[0] == configs[1]


def test_the_configuration_wins_over_what_a_checkpoint_was_trained_with() -> None:
    checkpoint = "runs/tiny/version_0/checkpoints/last.ckpt"
    options = ("--ckpt_path", checkpoint, "--trainer.max_steps", "3", "--model.init_args.caption_dropout", "0.75")
    main(["fit", "--config", "shapes/child.yaml", *options, "--trainer.logger.init_args.version", "resumed"])

    config = yaml.safe_load(Path("runs/tiny/resumed/config.yaml").read_text())
    assert config["model"]["init_args"]["caption_dropout"] == 0.75
    assert torch.load("runs/tiny/resumed/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_checkpoint_is_scored(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = "runs/tiny/version_0"
    options = ("--ckpt_path", f"{run}/checkpoints/last.ckpt", "--data.validation_shards", "shards")
    main([verb, "--config", f"{run}/config.yaml", *options])

    assert "mse_v_at_0.5" in capsys.readouterr().out


def test_predict_generates_images_for_a_file_of_prompts(world: Path) -> None:
    (world / "prompts.txt").write_text("a photo of a red circle\n\na photo of two squares\n")
    run = "runs/tiny/version_0"
    options = ("--data.prompts", "prompts.txt", "--trainer.logger.init_args.version", "predicted")
    main(["predict", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt", *options])

    names = sorted(path.name for path in (world / "runs/tiny/predicted/samples").glob("*.png"))
    assert names == [f"{prompt:05d}-{steps}step.png" for prompt in (0, 1) for steps in (1, 2)]


# -- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_said_to_be_there_and_are(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shards", "--out", "more", "--count", "5", "--samples_per_shard", "3"])

    assert capsys.readouterr().out == "5 samples in 2 shards: more\n"
    assert len(list((world / "more").glob("*.tar"))) == 2


def test_a_world_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "shards", "--out", "more", "--world", "large")

    assert line == "emf shards: world: must be Literal['small', 'full'], got large"
