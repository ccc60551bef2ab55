"""The command line, called in this process; the experiment is tiny but real: shards, encoder, network, Trainer."""

from __future__ import annotations

import errno
import json
import os
import shutil
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


PARENT = str(Path(__file__).resolve().parent.parent / "experiments/shapes/parent")
CHECKPOINT = "runs/tiny/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with shards and two experiments, and a run of the child in runs/tiny/version_0."""
    path = tmp_path_factory.mktemp("world")
    (path / "shapes").mkdir()
    (path / "base.yaml").write_text(BASE)
    (path / "shapes/child.yaml").write_text(CHILD)
    (path / "meanflow.yaml").write_text(BASE.replace("FlowMatching", "MeanFlow"))
    (path / "file").write_text("")
    (path / "garbage").mkdir()
    shutil.copy(Path(PARENT) / "config.json", path / "garbage")
    (path / "garbage/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    (path / "garbage.ckpt").write_bytes(b"not a checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        main(["shards", "--out", "shards", "--count", "32", "--samples_per_shard", "16"])
        main(["fit", "--config", "shapes/child.yaml"])
    last = (path / CHECKPOINT).read_bytes()
    (path / "half.ckpt").write_bytes(last[: len(last) // 2])
    torch.save({"weight": torch.zeros(2)}, path / "weights.ckpt")
    for folder, size in (("cut", 1000), ("one_cut", 20_000)):
        shutil.copytree(path / "shards", path / folder)
        with (path / folder / "shapes-000000.tar").open("r+b") as shard:
            shard.truncate(size)
    (path / "cut/shapes-000001.tar").unlink()
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


NESTED_MISTAKE = """
trainer:
  callbacks:
    - class_path: FewStepSampling
      init_args: {suite: {class_path: ShapesSuite, init_args: {wrold: small}}}
"""


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (
            "{model: {init_args: {times: {class_path: LogitNormalTimes, init_args: {mu: {strat: 0}}}}}}",
            "model.times.mu: Schedule has no option 'strat'; did you mean 'start'?",
        ),
        (
            "{model: {init_args: {optimizer: {class_path: timm.optim.Muon, init_args: {momentun: 1}}}}}",
            "model.optimizer: Muon has no option 'momentun'; did you mean 'momentum'?",
        ),
        (
            NESTED_MISTAKE,
            "trainer.callbacks.suite: ShapesSuite has no option 'wrold'; did you mean 'world'?",
        ),
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
        ("{data: {text: Pixels}}", "data.text: Pixels is a class of another kind; --help lists those that fit"),
        ("{data: {text: WrodEncoder}}", "data.text: there is no class 'WrodEncoder'; did you mean 'WordEncoder'?"),
        (
            "{trainer: {callbacks+: [{class_path: SampleWriter, init_args: {stps: 1}}]}}",
            "trainer.callbacks: SampleWriter has no option 'stps'; did you mean 'steps'?",
        ),
        (
            "{trainer: {callbacks: [{class_path: FewStepSampling, init_args: {suite: {init_args: {world: small}}}}]}}",
            "trainer.callbacks.suite: names no class that fits here; write `class_path: NAME` beside its `init_args`",
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
        (["--config", "shards"], "--config shards: no such file"),
        (["--config", "base.yaml", "--ckpt_path", "best"], "give the path of a .ckpt"),
        (["--config", "base.yaml", "--trainer.devices", "0,9"], "trainer.devices is 0,9: on CPUs it is the number of"),
        ([], "arguments are required: data.text, data.autoencoder, data.shards, model; an experiment names them"),
        (["--config", "base.yaml", "--data.shards", "nowhere"], "shards: 'nowhere' matches no file"),
        (
            ["--config", "base.yaml", "--data.shards", "shards/shapes-{000000..000007}.tar"],
            "000002.tar' matches no file",
        ),
        (["--config", "base.yaml", "--data.shards", "cut"], "gave no batch of 8 samples (1 x truncated shard); check"),
        (["--config", "base.yaml", "--ckpt_path", "gone.ckpt"], "ckpt_path: no checkpoint at gone.ckpt"),
        (["--config", "base.yaml", "--model.init_args.caption_dropout", "2"], "caption_dropout must lie in [0, 1)"),
    ],
)
def test_what_is_not_there_is_named(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert said in complaint(capsys, "fit", *options)


def pretrained(path: str, **arguments: Any) -> dict[str, Any]:
    """A configuration whose network starts from ``path``."""
    return {"model": {"init_args": {"net": {"init_args": {"architecture": None, "pretrained": path, **arguments}}}}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"trainer": {"logger": {"init_args": {"save_dir": "file/runs"}}}},
            "file/runs: not a directory; check the path",
        ),
        ({"data": {"cache": {"path": "file/cache"}}}, "cannot write to the folder"),
        ({"trainer": {"check_val_every_n_epoch": None, "val_check_interval": 3}}, "val_check_interval 2 or less"),
        (pretrained("nowhere"), "SanaFlowMap: cannot load pretrained='nowhere' ("),
        (pretrained("garbage"), "SanaFlowMap: cannot load pretrained='garbage' ("),
        (pretrained(PARENT, time_scale=5, prediction="PredictData"), "was trained with text feature width 128"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], said: str
) -> None:
    assert said in complaint(capsys, "fit", "--config", "base.yaml", "--config", json.dumps(config))


def test_a_truncated_shard_is_skipped_and_counted(recwarn: pytest.WarningsRecorder) -> None:
    options = ("--data.shards", "one_cut", "--trainer.max_steps", "3", "--trainer.logger.init_args.version", "skipping")
    main(["fit", "--config", "base.yaml", *options])

    assert "shapes-000000.tar: truncated shard; left out" in " ".join(str(warning.message) for warning in recwarn)
    state = torch.load("runs/tiny/skipping/checkpoints/last.ckpt", weights_only=True)["CaptionImageData"]
    assert state["train"]["ranks"][0]["skipped"].keys() == {"truncated shard"}


def test_a_file_without_prompts_is_an_error(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "empty.txt").write_text("\n\n")
    run = "runs/tiny/version_0/config.yaml"

    assert "'empty.txt' holds no prompt; give one a line" in complaint(
        capsys, "predict", "--config", run, "--ckpt_path", CHECKPOINT, "--data.prompts", "empty.txt"
    )
    assert "prompts is not set" in complaint(capsys, "predict", "--config", run, "--ckpt_path", CHECKPOINT)


@pytest.mark.skipif(torch.accelerator.device_count() > 0, reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", "base.yaml", "--trainer.accelerator", "gpu", "--trainer.devices", "8")

    assert "trainer.accelerator is gpu, but torch sees no GPU" in complaint(capsys, "fit", *options)


@pytest.mark.skipif(torch.accelerator.device_count() > 7, reason="this machine has the devices")
def test_devices_that_are_not_there_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", "base.yaml", "--trainer.accelerator", "auto", "--trainer.devices", "8")

    assert "trainer.devices is 8, but this machine has" in complaint(capsys, "fit", *options)
    assert "trainer.devices is 0,9, but this machine has" in complaint(capsys, "fit", *options[:-1], "0,9")


LAYERS = "--model.init_args.net.init_args.architecture.num_layers"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["base.yaml", "--data.text.init_args.width", "24"], "net.transformer.caption_projection.linear_1.weight is"),
        (["base.yaml", LAYERS, "2"], "net.transformer.transformer_blocks.1.scale_shift_table is not there but here"),
        (["base.yaml", "--model.init_args.net.init_args.time_scale", "5"], "its time_scale is 1000.0, not 5"),
        (["meanflow.yaml"], "its model is FlowMatching, not MeanFlow"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_an_error(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    line = complaint(capsys, "fit", "--ckpt_path", CHECKPOINT, "--config", *options)

    assert f"checkpoint belongs to another configuration: {said}" in line
    assert "config.yaml" in line
    assert len(line) < 400


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize(
    ("file", "said"),
    [("file", "cannot"), ("garbage.ckpt", "cannot"), ("half.ckpt", "cannot"), ("weights.ckpt", "holds no")],
)
def test_a_file_that_is_no_checkpoint_is_an_error(
    capsys: pytest.CaptureFixture[str], verb: str, file: str, said: str
) -> None:
    line = complaint(capsys, verb, "--config", "base.yaml", "--ckpt_path", file)

    assert f"emf {verb}: ckpt_path: {file} {said}" in line
    assert "give the path of a .ckpt file" in line


def test_an_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, "fti").startswith("emf fti: no such verb; the verbs are fit, validate, test, predict, ")


def test_debugging_shows_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMF_DEBUG", "1")

    with pytest.raises(ValueError, match="no such verb"):
        main(["fti"])


def test_an_error_that_is_not_ours_is_a_defect() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")

    assert sentence(caught.value) is None


def test_a_full_disk_is_told_with_its_path_where_that_is_known() -> None:
    full = errno.ENOSPC, os.strerror(errno.ENOSPC)

    said = "no space left on device; make room, or write elsewhere"
    assert sentence(OSError(*full, "runs/x")) == f"runs/x: {said}"
    assert sentence(OSError(*full)) == f"a disk that is written to: {said}"


def test_validation_without_shards_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "validation_shards is not set" in complaint(
        capsys, "validate", "--config", "base.yaml", "--ckpt_path", CHECKPOINT
    )


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
