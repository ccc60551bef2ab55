"""Errors of the command line: one line that names the key, the value and the remedy."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from emf_lightning.cli import main
from emf_lightning.cli.parsing.errors import user_message
from emf_lightning.cli.parsing.setting_checks import check_sharding
from tests.cli.world import CHECKPOINT, PARENT, complaint

NESTED_MISTAKE = """
trainer:
  callbacks:
    - class_path: FewStepSampling
      init_args: {suite: {class_path: ShapesSuite, init_args: {wrold: small}}}
"""


OBJECTIVE = "{model: {init_args: {objective: {init_args: {%s}}}}}"
OPTIMIZER = "{model: {init_args: {optimization: {optimizer: {class_path: %s, init_args: {momentun: 1}}}}}}"


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (
            OBJECTIVE % "times: {class_path: UniformTimes, init_args: {flow_matching_ratio: {strat: 0}}}",
            "model.objective.times.flow_matching_ratio: Schedule has no option 'strat'; did you mean 'start'?",
        ),
        (
            OPTIMIZER % "timm.optim.Muon",
            "model.optimization.optimizer: Muon has no option 'momentun'; did you mean 'momentum'?",
        ),
        (
            NESTED_MISTAKE,
            "trainer.callbacks.suite: ShapesSuite has no option 'wrold'; did you mean 'world'?",
        ),
        ("{modle: {class_path: MeanFlow}}", "there is no option 'modle'; did you mean 'model'?"),
        ("{trainer: {max_stpes: 3}}", "trainer: Trainer has no option 'max_stpes'; did you mean 'max_steps'?"),
        (
            "{model: {init_args: {caption_dropuot: 0}}}",
            "model: FlowMapModule has no option 'caption_dropuot'; did you mean 'caption_dropout'?",
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
            OPTIMIZER % "torch.optim.SGD",
            "model.optimization.optimizer: SGD has no option 'momentun'; did you mean 'momentum'?",
        ),
        (
            "{data: {text: {init_args: {widht: 8}}}}",
            "data.text: WordEncoder has no option 'widht'; did you mean 'width'?",
        ),
        (
            "{model: {init_args: {optimization: {init_args: {optimizer: x}}}}}",
            "model.optimization: Optimization has no option 'init_args'; there are optimizer, scheduler",
        ),
        (
            "{data: {image_limits: {init_args: {max_pixels: 3}}}}",
            "data.image_limits: ImageLimits has no option 'init_args'; there are max_aspect_ratio, max_pixels",
        ),
        (
            "{data: {image_limits: {max_pixel: 3}}}",
            "data.image_limits: ImageLimits has no option 'max_pixel'; did you mean 'max_pixels'?",
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
        (
            ["--config", "base.yaml", "--data.shards", "cut"],
            "gave no batch of 8 samples (1 x missing caption, 1 x truncated shard); check",
        ),
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
            "file/runs/tiny: not a directory; check the path",
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

    assert "to the end: truncated shard; left out" in " ".join(str(warning.message) for warning in recwarn)
    state = torch.load("runs/tiny/skipping/checkpoints/last.ckpt", weights_only=True)["CaptionImageData"]
    assert state["train"]["ranks"][0]["skipped"].keys() == {"missing caption", "truncated shard"}


def test_a_file_without_prompts_is_an_error(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "empty.txt").write_text("\n\n")
    run = "runs/tiny/version_0/config.yaml"

    assert "'empty.txt' holds no prompt; give one a line" in complaint(
        capsys, "predict", "--config", run, "--ckpt_path", CHECKPOINT, "--data.prompts", "empty.txt"
    )
    assert "prompts: none are given; add --prompt" in complaint(
        capsys, "predict", "--config", run, "--ckpt_path", CHECKPOINT
    )


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
        (["meanflow.yaml"], "its objective is FlowMatching, not MeanFlow"),
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
    assert complaint(capsys, "fti").startswith("emf fti: no such verb; did you mean fit? the verbs are fit, validate, ")


def test_debugging_shows_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMF_DEBUG", "1")

    with pytest.raises(ValueError, match="no such verb"):
        main(["fti"])


def test_an_error_that_is_not_ours_is_a_defect() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")

    assert user_message(caught.value) is None


def test_a_full_disk_is_told_with_its_path_where_that_is_known() -> None:
    full = errno.ENOSPC, os.strerror(errno.ENOSPC)

    said = "no space left on device; make room, or write elsewhere"
    assert user_message(OSError(*full, "runs/x")) == f"runs/x: {said}"
    assert user_message(OSError(*full)) == f"a disk that is written to: {said}"


def test_validation_without_shards_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "validation_shards is not set" in complaint(
        capsys, "validate", "--config", "base.yaml", "--ckpt_path", CHECKPOINT
    )


def test_an_error_in_a_data_worker_is_told_without_its_traceback() -> None:
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "worker.py", line 1, in fetch\nValueError: shards: give\n  at least one'
    )

    assert user_message(ValueError(text)) == "shards: give at least one"


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


@pytest.mark.parametrize("devices", [3, "3", "0,1,2", [0, 1, 2]])
def test_sharding_is_checked_however_devices_are_given(devices: int | str | list[int]) -> None:
    sizes = Namespace(data_parallel_size=2, tensor_parallel_size=1)
    strategy = Namespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy", init_args=sizes)
    with pytest.raises(ValueError, match="set them to 6 and 1"):
        check_sharding(strategy, devices, num_nodes=2)


def test_a_sharded_checkpoint_names_the_strategy_that_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sharded.ckpt").mkdir(exist_ok=True)

    line = complaint(capsys, "validate", "--config", "shapes/child.yaml", "--ckpt_path", "sharded.ckpt")

    assert "sharded.ckpt is a sharded checkpoint: add --config experiments/devices/fsdp2.yaml" in line


def test_an_error_that_ends_a_librarys_thread_is_one_line(monkeypatch, capfd):
    """TensorBoard's writer meets a full disk in a thread of its own, whose traceback stood before the sentence."""

    def write(verb, arguments, alone):
        def fail() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    monkeypatch.setattr("emf_lightning.cli._run", write)
    before = threading.excepthook
    main(["validate"])
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("emf validate: ") and "no space left" in said
    assert threading.excepthook is before
