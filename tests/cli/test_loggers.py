"""A run's directory, curves, pictures and settings with any of Lightning's loggers, several of them, and none."""

from __future__ import annotations

import csv
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emf_lightning.cli import main
from tests.callbacks import tiny
from tests.cli.world import BASE, complaint

SCORED = """
base: {world}/base.yaml
trainer:
  default_root_dir: runs/shapes/scored
  max_steps: 4
  log_every_n_steps: 1
  callbacks+:
    - class_path: LearningRateMonitor
    - class_path: SaveNetwork
    - class_path: FewStepSampling
      init_args:
        suite: {{class_path: ShapesSuite, init_args: {{world: small, per_task: 2, scenes_per_task: 1}}}}
        steps: [1, 2]
        every_n_steps: 2
        images_per_task: 1
        final_images_per_task: 1
        shown_per_task: 1
        guidance_scale: [1.0, 2.0]
"""
FILES = {"config.yaml", "run.lock", "checkpoints/last.ckpt", "network/config.json", "shapes/scores.jsonl"}
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


class Recorder(Logger):
    """A user's logger, which keeps what it is given in a file."""

    def __init__(self, file: str = "recorded.jsonl", name: str | None = None) -> None:
        super().__init__()
        self._file, self._name = Path(file), name

    @property
    def name(self) -> str | None:
        return self._name

    @property
    def version(self) -> str:
        return "abc"

    def _write(self, **row: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:
        self._write(settings=params, name=self._name)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._write(metrics=metrics, step=step)

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self._write(picture=key, shape=images[0].shape, step=step)


class Interrupts(Callback):
    """Ends the training like a crash after a step."""

    def __init__(self, step: int = -1) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = BASE.replace("shards: shards", f"shards: {world}/shards").replace("name: tiny", "default_hp_metric: false")
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "scored.yaml").write_text(SCORED.format(world=tmp_path))
    return tmp_path


def fit(*options: str) -> None:
    main(["fit", "--config", "scored.yaml", *options])


def with_loggers(*loggers: Any) -> tuple[str, str]:
    """Options that set the trainer's loggers to this list."""
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": list(loggers)}}))
    return "--config", "loggers.yaml"


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("recorded.jsonl").read_text().splitlines()]


def tensorboard(run: Path) -> tuple[Counter[str], Counter[str]]:
    """Number of points of each curve of the evaluations, and of each picture, in all of a run's event files."""
    curves: Counter[str] = Counter()
    pictures: Counter[str] = Counter()
    for folder in {file.parent for file in run.rglob("events.out.tfevents.*")}:
        found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
        for tag in found.Tags()["scalars"]:
            if tag.startswith("eval"):
                steps = [event.step for event in found.Scalars(tag)]
                assert len(set(steps)) == len(steps), f"a point of {tag} of {folder} is doubled"
                curves[f"{tag}/{folder.name}"] = len(steps)
        for tag in found.Tags()["images"]:
            pictures[tag.replace("/pictures/", "/")] = len(found.Images(tag))
    return curves, pictures


def run_of(version: int) -> Path:
    return Path(f"runs/shapes/scored/version_{version}")


# -- the run's directory ----------------------------------------------------------------------------------------------

LOGGERS = {
    "none": ("--trainer.logger", "false"),
    "csv": ("--trainer.logger", "CSVLogger"),
    "a user's": ("--trainer.logger", "tests.cli.test_loggers.Recorder"),
    "the default": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("logger", LOGGERS)
def test_all_files_of_a_run_lie_in_its_own_directory_with_any_logger(logger: str, here: Path) -> None:
    for version in (0, 1):
        fit(*LOGGERS[logger])
        found = {str(path.relative_to(run_of(version))) for path in run_of(version).rglob("*") if path.is_file()}
        assert found >= FILES | {"shapes/contact_sheet.png"}, logger
    assert {path.name for path in Path("runs").iterdir()} == {"shapes"}
    assert [path.name for path in sorted(Path("runs/shapes/scored").iterdir())] == ["version_0", "version_1"]
    assert run_of(0).joinpath("checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_a_named_logger_gives_the_directory_as_in_earlier_versions(here: Path) -> None:
    fit("--trainer.logger.init_args.name", "earlier")
    fit("--trainer.logger.init_args.version", "chosen")

    assert Path("runs/earlier/version_0/checkpoints/last.ckpt").is_file()
    assert Path("runs/shapes/scored/chosen/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["none", "a user's"])
def test_the_last_checkpoint_is_found_with_any_logger(logger: str, here: Path) -> None:
    fit(*LOGGERS[logger], "--trainer.max_steps", "2")
    fit(*LOGGERS[logger], "--ckpt_path", "last")

    assert [path.name for path in Path("runs/shapes/scored").iterdir()] == ["version_0"]
    assert torch.load(run_of(0) / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    trust = ["--trust_remote_code"] if logger == "a user's" else []
    main(["predict", "--run", str(run_of(0)), *LOGGERS[logger], "--prompt", "a photo of a red circle", *trust])
    assert list(run_of(0).glob("samples/*.png"))


# -- curves, pictures and settings ------------------------------------------------------------------------------------


def test_every_logger_of_several_gets_the_same_curves_pictures_and_settings(here: Path) -> None:
    user = {"class_path": "tests.cli.test_loggers.Recorder"}
    csv_logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}
    fit(*with_loggers(user, {"class_path": TENSORBOARD, "init_args": {"save_dir": "elsewhere"}}, csv_logger))

    curves, pictures = tensorboard(run_of(0))
    rows = recorded()
    keys = Counter(key for row in rows for key in row.get("metrics", {}) if key.startswith("eval"))
    with (run_of(0) / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    in_csv = {key: sum(bool(row[key]) for row in table) for key in table[0] if key.startswith("eval")}
    assert len(keys) == len(curves) > 50
    assert sorted(keys.values()) == sorted(curves.values())
    assert dict(keys) == in_csv
    assert {"eval/shapes/overall/1step", "eval/shapes/overall/2step_cfg2", "eval/shapes/overall/ceiling"} <= set(keys)
    assert curves["eval/shapes/overall/1 step"] == 3
    assert Counter(row["picture"] for row in rows if "picture" in row) == pictures
    assert set(pictures) == {f"eval/shapes/{name}" for name in ("contact_sheet", "step_counts", "training_curves")}
    (settings,) = (row for row in rows if "settings" in row)
    assert settings["settings"]["trainer"]["max_steps"] == 4
    assert settings["name"] == "shapes/scored"
    assert yaml.safe_load((run_of(0) / "hparams.yaml").read_text())["trainer"]["max_steps"] == 4
    assert not any("epoch" in row.get("metrics", {}) for row in rows) and "epoch" not in table[0]
    assert "epoch" not in tiny.events(run_of(0)).Tags()["scalars"]
    assert not Path("elsewhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loggers", [("CSVLogger",), (TENSORBOARD, "CSVLogger")])
def test_an_interrupted_run_goes_on_in_its_directory_without_doubled_points(loggers: Any, here: Path) -> None:
    options = with_loggers(*({"class_path": name, "init_args": {"save_dir": "runs"}} for name in loggers))
    crash = ("--trainer.callbacks+", "tests.cli.test_loggers.Interrupts", "--trainer.callbacks.step")
    Path("scored.yaml").write_text(Path("scored.yaml").read_text().replace("max_steps: 4", "max_steps: 6"))
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(*options, *crash, "5", "--config", _every_second_step())
    fit(*options, *crash, "-1", "--config", _every_second_step(), "--ckpt_path", "last")

    with (run_of(0) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["eval/shapes/overall/1step"]] == [0, 2, 4, 6]
    of_training = [int(row["step"]) for row in rows if row["train/loss"]]  # as Lightning counts them after a resume
    assert len(of_training) == 6 and of_training == sorted(set(of_training))
    if TENSORBOARD in loggers:
        curves, _ = tensorboard(run_of(0))
        assert curves["eval/shapes/overall/1 step"] == 4


def _every_second_step() -> str:
    """A file that saves a checkpoint every second step."""
    Path("often.yaml").write_text("trainer: {val_check_interval: 2}\n")
    return "often.yaml"


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_has_the_whole_curves(here: Path) -> None:
    fit("--trainer.max_steps", "2")
    user = ("--trainer.logger", "tests.cli.test_loggers.Recorder")
    fit("--ckpt_path", str(run_of(0) / "checkpoints/last.ckpt"), *user)

    points = [row["step"] for row in recorded() if "eval/shapes/overall/1step" in row.get("metrics", {})]
    assert points == [0, 2, 4]  # the first run's last evaluation came after its checkpoint


# -- other loggers ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("comet_ml") is not None, reason="the package is there")
def test_a_logger_without_its_package_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "fit", "--config", "scored.yaml", "--trainer.logger", "CometLogger")

    assert line.startswith("emf fit: CometLogger needs a package that is not installed: pip install -U 'comet-ml")


@pytest.mark.slow
def test_weights_and_biases_gets_as_many_curves_and_pictures_as_tensorboard(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = {"class_path": "WandbLogger", "init_args": {"save_dir": str(here)}}
    fit(*with_loggers({"class_path": TENSORBOARD, "init_args": {"save_dir": "runs"}}, logger))
    run = wandb.run
    summary, name, config = dict(run.summary), run.name, dict(run.config)
    wandb.finish()

    curves, pictures = tensorboard(run_of(0))
    shown = {key for key in pictures if key in summary}
    assert len([key for key in summary if key.startswith("eval") and key not in shown]) == len(curves)
    assert shown == set(pictures)
    assert len(list(here.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == sum(pictures.values())
    assert (name, config["trainer"]["max_steps"]) == ("shapes/scored", 4)


@pytest.mark.slow
def test_mlflow_gets_as_many_curves_and_pictures_as_tensorboard(here: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{here}/mlflow.db"
    settings = {"tracking_uri": uri, "artifact_location": str(here / "artifacts")}
    logger = {"class_path": "MLFlowLogger", "init_args": settings}
    fit(*with_loggers({"class_path": TENSORBOARD, "init_args": {"save_dir": "runs"}}, logger))

    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    curves, pictures = tensorboard(run_of(0))
    assert len([key for key in run.data.metrics if key.startswith("eval")]) == len(curves)
    assert run.data.params["trainer/max_steps"] == "4"
    assert run.info.run_name == "shapes/scored"
    assert len(list((here / "artifacts").rglob("*.png"))) == sum(pictures.values())
