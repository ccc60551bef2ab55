"""The command line, called in this process; the experiment is tiny but real: shards, encoder, network, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from emf_lightning.cli import main
from emf_lightning.cli.errors import sentence

BASE = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_steps: 2
  max_epochs: -1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: tiny}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {save_last: true}
data:
  text: {class_path: WordEncoder, init_args: {width: 16}}
  autoencoder: Pixels
  shards: shards
  batch_size: 8
  num_workers: 0
model:
  class_path: FlowMatching
  init_args:
    scheduler:
      class_path: WarmupCosine
      init_args: {total: "${trainer.max_steps}", warmup: 0}
    net:
      class_path: SanaFlowMap
      init_args:
        architecture:
          num_layers: 1
          num_attention_heads: 2
          attention_head_dim: 8
          num_cross_attention_heads: 2
          cross_attention_head_dim: 8
"""

CHILD = """
base: ../base.yaml
trainer:
  callbacks+:
    - class_path: SampleWriter
      init_args: {steps: [1, 2]}
model:
  init_args:
    caption_dropout: 0.25
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with shards and two experiments, and a run of the child in runs/tiny/version_0."""
    path = tmp_path_factory.mktemp("world")
    (path / "shapes").mkdir()
    (path / "base.yaml").write_text(BASE)
    (path / "shapes/child.yaml").write_text(CHILD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        main(["shards", "--out", "shards", "--count", "32", "--samples_per_shard", "16"])
        main(["fit", "--config", "shapes/child.yaml"])
    return path


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The configuration that `emf fit` would run."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *options, "--print_config"])
    assert end.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(config, dict)
    return config


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says before it ends with status 2, which has to be one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emf ")]
    assert len(lines) == 1
    return lines[0]


def weights(run: str) -> dict[str, torch.Tensor]:
    state = torch.load(f"runs/tiny/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert isinstance(state, dict)
    return state


# -- configuration ----------------------------------------------------------------------------------------------------


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

    assert config["model"]["init_args"]["scheduler"]["init_args"]["total"] == 7


def test_an_interpolation_that_a_change_of_class_would_drop_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "fit", "--config", "base.yaml", "--config", "{model: {class_path: MeanFlow}}")

    assert "scheduler" in line
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


def test_predict_draws_a_file_of_prompts(world: Path) -> None:
    (world / "prompts.txt").write_text("a photo of a red circle\n\na photo of two squares\n")
    run = "runs/tiny/version_0"
    options = ("--data.prompts", "prompts.txt", "--trainer.logger.init_args.version", "drawn")
    main(["predict", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt", *options])

    names = sorted(path.name for path in (world / "runs/tiny/drawn/samples").glob("*.png"))
    assert names == [f"{prompt:05d}-{steps}step.png" for prompt in (0, 1) for steps in (1, 2)]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("{modle: {class_path: MeanFlow}}", "there is no option 'modle'; did you mean 'model'?"),
        ("{trainer: {max_stpes: 3}}", "trainer: Trainer has no option 'max_stpes'; did you mean 'max_steps'?"),
        (
            "{model: {init_args: {caption_dropuot: 0}}}",
            "model: FlowMatching has no option 'caption_dropuot'; did you mean 'caption_dropout'?",
        ),
        (
            "{model: {init_args: {net: {init_args: {pedriction: 1}}}}}",
            "model.net: SanaFlowMap has no option 'pedriction'; did you mean 'prediction'?",
        ),
        (
            "{model: {init_args: {net: {init_args: {architecture: {num_layer: 1}}}}}}",
            "model.net.architecture: SanaArchitecture has no option 'num_layer'; did you mean 'num_layers'?",
        ),
        (
            "{model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {momentun: 1}}}}}",
            "model.optimizer: SGD has no option 'momentun'; did you mean 'momentum'?",
        ),
        (
            "{data: {text: {init_args: {widht: 8}}}}",
            "data.text: WordEncoder has no option 'widht'; did you mean 'width'?",
        ),
        ("{data: {text: WrodEncoder}}", "data.text: there is no class 'WrodEncoder'; did you mean 'WordEncoder'?"),
        (
            "{trainer: {callbacks+: [{class_path: SampleWriter, init_args: {stps: 1}}]}}",
            "trainer.callbacks: SampleWriter has no option 'stps'; did you mean 'steps'?",
        ),
        ("{trainer: {max_steps: many}}", "trainer.max_steps: must be int, got many"),
        ("{data: {batch_size: '${data.bacth}'}}", "data.batch_size: there is no value ${data.bacth}"),
    ],
)
def test_a_mistake_in_yaml_names_the_key(capsys: pytest.CaptureFixture[str], mistake: str, said: str) -> None:
    line = complaint(capsys, "fit", "--config", "shapes/child.yaml", "--config", mistake)

    assert line.startswith(f"emf fit: {said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "shapes/none.yaml"], "--config shapes/none.yaml: no such file"),
        ([], "arguments are required: data.text, data.autoencoder, data.shards, model; an experiment names them"),
        (["--config", "base.yaml", "--data.shards", "nowhere"], "shards: 'nowhere' matches no file"),
        (["--config", "base.yaml", "--ckpt_path", "gone.ckpt"], "ckpt_path: no checkpoint at gone.ckpt"),
        (["--config", "base.yaml", "--model.init_args.caption_dropout", "2"], "caption_dropout must lie in [0, 1)"),
    ],
)
def test_what_is_not_there_is_named(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert said in complaint(capsys, "fit", *options)


@pytest.mark.skipif(torch.accelerator.device_count() > 7, reason="this machine has the devices")
def test_devices_that_are_not_there_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", "base.yaml", "--trainer.accelerator", "auto", "--trainer.devices", "8")

    assert "trainer.devices is 8, but this machine has" in complaint(capsys, "fit", *options)


def test_a_checkpoint_of_another_configuration_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ckpt_path", "runs/tiny/version_0/checkpoints/last.ckpt", "--data.text.init_args.width", "24")

    line = complaint(capsys, "fit", "--config", "base.yaml", *options)

    assert "checkpoint belongs to another configuration: net.transformer.caption_projection" in line
    assert "config.yaml" in line


def test_an_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, "fti") == "emf fti: no such verb; the verbs are fit, validate, test, predict, shards"


def test_debugging_shows_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMF_DEBUG", "1")

    with pytest.raises(ValueError, match="no such verb"):
        main(["fti"])


def test_an_error_that_is_not_ours_is_a_defect() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")

    assert sentence(caught.value) is None


def test_an_error_in_a_data_worker_is_told_without_its_traceback() -> None:
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "worker.py", line 1, in fetch\nValueError: shards: give\n  at least one'
    )

    assert sentence(ValueError(text)) == "shards: give at least one"


# -- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_said_to_be_there_and_are(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shards", "--out", "more", "--count", "5", "--samples_per_shard", "3"])

    assert capsys.readouterr().out == "5 samples in 2 shards: more\n"
    assert len(list((world / "more").glob("*.tar"))) == 2


def test_a_world_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "shards", "--out", "more", "--world", "large")

    assert line == "emf shards: world: must be Literal['small', 'full'], got large"


# -- devices ----------------------------------------------------------------------------------------------------------

FSDP2 = "{trainer: {strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: %s}}}"


@pytest.mark.parametrize(
    ("sizes", "devices", "wanted"),
    [
        ("{}", "2", "set them to 2 and 1"),
        ("{data_parallel_size: 2}", "2", "set them to 2 and 1"),
        ("{data_parallel_size: 1, tensor_parallel_size: 2}", "2", "set them to 2 and 1"),
        ("{data_parallel_size: 2, tensor_parallel_size: 1}", "4", "set them to 4 and 1"),
    ],
)
def test_sharding_that_would_train_wrongly_is_refused(
    capsys: pytest.CaptureFixture[str], sizes: str, devices: str, wanted: str
) -> None:
    line = complaint(
        capsys, "fit", "--config", "shapes/child.yaml", "--config", FSDP2 % sizes, "--trainer.devices", devices
    )

    assert line.startswith("emf fit: trainer.strategy: data_parallel_size is ")
    assert wanted in line


def test_a_sharded_checkpoint_names_the_strategy_that_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sharded.ckpt").mkdir(exist_ok=True)

    line = complaint(capsys, "validate", "--config", "shapes/child.yaml", "--ckpt_path", "sharded.ckpt")

    assert "sharded.ckpt is a sharded checkpoint: add --config experiments/devices/fsdp2.yaml" in line
