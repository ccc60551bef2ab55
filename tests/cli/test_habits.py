"""What people type by habit: words without --config, near names, classes of their own, one callback less."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from emf_lightning.cli import main
from emf_lightning.cli.parsing.function_verb import call
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.prediction import PredictVelocity
from tests import forked
from tests.cli.world import BASE, complaint


class Slow(LambdaLR):
    """A schedule of one's own with a warm-up."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int = 1) -> None:
        super().__init__(optimizer, lambda step: min(step / warmup_steps, 1.0))


class PixelNet(FlowMapNetwork):
    """A network without an embedding of t."""

    takes_interval = False

    def __init__(
        self, context_width: int | None = None, latent_channels: int | None = None, latent_size: int | None = None
    ) -> None:
        super().__init__()
        assert context_width and latent_channels and latent_size
        self.context_width, self.latent_channels, self.latent_size = context_width, latent_channels, latent_size
        self.prediction = PredictVelocity()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def backbone(self, z: Any, *_: Any, **__: Any) -> Any:
        return self.layer(z)

    def save_pretrained(self, directory: str | Path) -> None:
        torch.save(self.state_dict(), Path(directory) / "weights.pt")


def callbacks(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    with pytest.raises(SystemExit):
        main(["fit", *options, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"] or []
    return [callback["class_path"].rpartition(".")[2] for callback in found]


# -- one callback or logger less --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--config", "{trainer: {callbacks-: [SampleWriter]}}"], ["ModelCheckpoint"]),
        (["--config", "{trainer: {callbacks-: emf_lightning.callbacks.SampleWriter}}"], ["ModelCheckpoint"]),
        (
            ["--trainer.callbacks-", "ModelCheckpoint", "--trainer.callbacks+=TrainingLog"],
            ["SampleWriter", "TrainingLog"],
        ),
        (["--trainer.callbacks-=[ModelCheckpoint,SampleWriter]"], []),
    ],
)
def test_an_inherited_callback_is_taken_out_by_its_name(capsys, options, left) -> None:
    assert callbacks(capsys, "shapes/child.yaml", *options) == left


def test_a_file_takes_out_what_its_bases_have_and_adds_its_own(capsys, tmp_path, world) -> None:
    added = "callbacks+:\n    - class_path: ModelCheckpoint\n    - class_path: TrainingLog\n"
    lines = f"trainer:\n  callbacks-:\n    - ModelCheckpoint\n  max_steps: 3\n  {added}"
    (tmp_path / "less.yaml").write_text(f"base: {world}/shapes/child.yaml\n{lines}")
    assert callbacks(capsys, str(tmp_path / "less.yaml")) == ["SampleWriter", "ModelCheckpoint", "TrainingLog"]


def test_a_logger_is_taken_out_and_a_name_that_is_not_there_is_told(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "base.yaml", "--trainer.logger-", "TensorBoardLogger", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"] is None
    line = complaint(capsys, "fit", "shapes/child.yaml", "--trainer.callbacks-", "SampelWriter")
    assert "there is no 'SampelWriter' to take out; there are ModelCheckpoint, SampleWriter" in line
    assert "takes class names" in complaint(capsys, "fit", "base.yaml", "--config", "{trainer: {callbacks-: [[A]]}}")


# -- nothing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", ["null", "None", "~"])
def test_nothing_is_set_as_deep_as_a_setting_lies(capsys, nothing) -> None:
    names = ("pretrained", "finetuning", "time_scale")
    options = [f"--model.init_args.net.init_args.{name}={nothing}" for name in names]
    with pytest.raises(SystemExit):
        main(["fit", "base.yaml", *options, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["net"]["init_args"]
    assert [found[name] for name in names] == [None] * 3


# -- files ------------------------------------------------------------------------------------------------------------

ENCODERS = """
encoders:
  words: {class_path: WordEncoder, init_args: {length: 10}}
queries: 5
corpus: {class_path: ShapesPairs, init_args: {count: 40}}
"""


def test_a_file_of_another_verb_builds_on_its_base(capsys, tmp_path) -> None:
    (tmp_path / "base.yaml").write_text(ENCODERS)
    (tmp_path / "more.yaml").write_text(
        "base: base.yaml\nencoders: {words: {init_args: {length: 4}}, w: WordEncoder}\nk: 3\n"
    )
    with pytest.raises(SystemExit):
        main(["encoders", "--config", str(tmp_path / "more.yaml"), "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["queries"], found["k"], found["encoders"].keys()) == (5, 3, {"words", "w"})
    assert found["encoders"]["words"]["init_args"]["length"] == 4
    line = complaint(capsys, "encoders", "--config", "{queris: 3}")
    assert line == "emf encoders: there is no option 'queris'; did you mean 'queries'?"


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ("--trainer.max_stepz 1", "--trainer.max_steps"),
        ("--max_steps 1", "--trainer.max_steps"),
        ("--optimizer x", "--model.init_args.optimization.optimizer"),
        ("--lr 1", "--model.init_args.optimization.optimizer.init_args.lr"),
        ("--learning_rate=1", "--model.init_args.optimization.optimizer.init_args.lr"),
        ("--warmup 1", "--model.init_args.optimization.scheduler.init_args.warmup"),
        ("--data.batchsize 1", "--data.batch_size"),
        ("--objectiv.times.mu 1", "--model.init_args.objective.init_args.times.init_args.mu"),
        ("--guidance_scale 1", "--model.init_args.guidance_scale"),
        ("--data.image_limits.init_args.max_pixel 1", "--data.image_limits.max_pixels"),
        ("--model.init_args.optimization.optimiser Adam", "--model.init_args.optimization.optimizer"),
    ],
)
def test_an_unknown_option_gets_the_near_name(capsys, options, meant) -> None:
    line = complaint(capsys, "fit", "base.yaml", *options.split())
    assert line.endswith(f"did you mean {meant}?"), line


@pytest.mark.parametrize("option", ["optimization.init_args.x", "optimization.class_path", "optimization.x"])
def test_an_option_like_none_of_its_part_gets_all_of_the_part(capsys, option) -> None:
    line = complaint(capsys, "fit", "base.yaml", f"--model.init_args.{option}=1")
    inside = " --model.init_args.optimization."
    assert line == f"emf fit: there is no option --{option}; there are{inside}optimizer,{inside}scheduler"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("valdate", "no such verb; did you mean validate? the verbs are fit, "),
        ("predict --promt x", "did you mean --prompt?"),
        ("cache base.yaml --dryrun", "did you mean --dry_run?"),
        ("encoders --querys 3", "did you mean --queries?"),
        ("fit nowhere.yaml", "--config nowhere.yaml: no such file"),
        ("fit --seed_everything 1 base.yaml", "base.yaml is no option, nor the value of one; name experiments right"),
        ("predict garbage --prompt x", "run: no config.yaml in garbage"),
    ],
)
def test_a_wrong_word_is_told(capsys, words, said) -> None:
    assert said in complaint(capsys, *words.split())


# -- settings that cannot work ----------------------------------------------------------------------------------------

SCHEDULER = "{model: {init_args: {optimization: {scheduler: {class_path: %s, init_args: {%s}}}}}}"
CALLBACK = "{trainer: {callbacks: [{class_path: %s, init_args: {%s}}]}}"
LINEAR = "{class_path: torch.optim.lr_scheduler.LinearLR}"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SCHEDULER % ("WarmupCosine", "total: 50, warmup: 2"), "2 steps (warmup), but training ends after 2"),
        (SCHEDULER % ("torch.optim.lr_scheduler.LinearLR", "total_iters: 9"), "9 steps (total_iters), but"),
        (SCHEDULER % ("torch.optim.lr_scheduler.OneCycleLR", "max_lr: 1, total_steps: 40"), "steps (pct_start of"),
        (SCHEDULER % ("tests.cli.test_habits.Slow", "warmup_steps: 3"), "Slow raises the learning rate for 3 steps"),
        (
            SCHEDULER % ("WarmupCosine", "total: 1, warmup: 0, final: 0"),
            "falls to 0 of the rate within 1 steps, and training",
        ),
        (CALLBACK % ("SaveNetwork", "time_scale: 5"), "PixelNet has no time embedding to fit; leave it out"),
        (CALLBACK % ("SaveNetwork", "time_scale: -5"), "SaveNetwork: time_scale must be positive"),
        (CALLBACK % ("SaveEncoder", ""), "SaveEncoder: only EncoderTuning trains an encoder"),
        (CALLBACK % ("RunSummary", "suite: ShapesSuite"), "RunSummary: needs TrainingLog in trainer.callbacks"),
        (CALLBACK % ("BatchSizeFinder", ""), "BatchSizeFinder changes an attribute of the module or the data"),
        (CALLBACK % ("LearningRateFinder", ""), "compare learning rates with `emf compare`"),
        ("{data: {images: false}}", "data.images: false gives no images, and FlowMapModule learns from them"),
    ],
)
def test_what_would_fail_at_the_end_is_said_before_the_first_step(capsys, tmp_path, config, said, monkeypatch) -> None:
    text = BASE.replace('{total: "${trainer.max_steps}", warmup: 0}', "{total: 5, warmup: 0}")
    if "PixelNet" in said:
        head, _, _ = text.partition("    net:\n")
        text = f"{head}    net: {{class_path: tests.cli.test_habits.PixelNet}}\n"
    (tmp_path / "run.yaml").write_text(text.replace("name: tiny", f"name: {tmp_path.name}"))
    assert said in complaint(capsys, "fit", "--config", str(tmp_path / "run.yaml"), "--config", config)
    assert not Path("runs", tmp_path.name).exists()


NESTED = """
model:
  init_args:
    objective:
      init_args: {times: {class_path: LogitNormalTimes, init_args: {mu: {start: "${trainer.max_steps}"}}}}
"""


@pytest.mark.parametrize(
    ("files", "keys"),
    [
        ([SCHEDULER % ("torch.optim.lr_scheduler.LinearLR", "")], ["total: ${trainer.max_steps}"]),
        ([NESTED, "{model: {class_path: FGM}}"], ["start: ${trainer.max_steps}", "total: ${trainer.max_steps}"]),
    ],
)
def test_an_interpolation_that_is_lost_is_named_by_its_key(capsys, files, keys) -> None:
    line = complaint(capsys, "fit", "base.yaml", *(part for file in files for part in ("--config", file)))
    assert "would be lost: values with ${...} do not survive a change of class" in line
    assert "Namespace" not in line
    assert any(key in line for key in keys), line


class Holding(Callback):
    def __init__(self, held: Any = object()) -> None:  # noqa: B008
        super().__init__()


class OnDevice(Callback):
    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        assert isinstance(device, torch.device)


def test_a_device_is_a_default_that_a_run_records(world) -> None:
    name = ["--trainer.logger.init_args.name", "with_device"]
    main(["fit", "base.yaml", *name, "--config", CALLBACK % ("tests.cli.test_habits.OnDevice", "")])
    assert "device: cpu" in Path("runs/with_device/version_0/config.yaml").read_text()
    main(["fit", "--config", "runs/with_device/version_0/config.yaml"])


def test_a_default_that_no_file_can_hold_is_named(world, capsys) -> None:
    line = complaint(capsys, "fit", "base.yaml", "--config", CALLBACK % ("tests.cli.test_habits.Holding", ""))
    assert "trainer.callbacks.init_args.held: its default is an object that a configuration cannot hold" in line


def test_a_trial_run_leaves_nothing_to_go_on_from(world, capsys) -> None:
    name = ["--trainer.logger.init_args.name", "trial"]
    main(["fit", "base.yaml", *name, "--trainer.fast_dev_run", "true", "--config", CALLBACK % ("SaveNetwork", "")])
    assert not Path("runs/trial").exists()
    assert "no last checkpoint" in complaint(capsys, "fit", "base.yaml", *name, "--ckpt_path", "last")


# -- classes of one's own ---------------------------------------------------------------------------------------------

OWN = """
import my_layers
from pathlib import Path
from emf_lightning.networks.sana import SanaFlowMap

Path("ran").touch()

class MyNet(SanaFlowMap):
    pass
"""


def emf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command's way in: its own folder, not the current one, is on the import path."""
    call = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; from emf_lightning.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", call, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    (tmp_path / "my_network.py").write_text(OWN)
    (tmp_path / "my_layers.py").write_text("")
    (tmp_path / "wandb.py").write_text('from pathlib import Path; Path("stranger").touch()')
    text = BASE.replace("class_path: SanaFlowMap", "class_path: my_network.MyNet").replace(
        "shards: ", f"shards: {world}/"
    )
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path


def test_a_class_of_the_current_folder_is_trained_and_other_verbs_ask_for_trust(own) -> None:
    done = emf(own, "fit", "run.yaml", "--trainer.max_steps", "1")
    assert done.returncode == 0, done.stderr[-600:]
    assert "leaked" not in done.stderr  # triton's words on what Python has not freed at the end
    assert (own / "ran").is_file()
    (own / "ran").unlink()
    predict = ["predict", "--run", "runs/tiny", "--prompt", "a circle", "--steps", "1"]
    refused = forked.run(forked.emf, *predict, folder=own)
    assert refused.returncode == 2 and "my_network.MyNet is no class of emf_lightning" in refused.stderr
    assert not (own / "ran").exists() and not (own / "stranger").exists()
    assert forked.run(forked.emf, *predict, "--trust_remote_code", folder=own).returncode == 0
    assert len(list((own / "runs/tiny/version_0/samples").glob("*.png"))) == 1
    # the run's own config.yaml names the class, and no file among the arguments
    export = ["export", "--run", "runs/tiny", "--out", "exported"]
    assert "is no class of emf_lightning" in forked.run(installed, *export, folder=own).stderr
    done = forked.run(without_folder, *export, "--trust_remote_code", folder=own)
    assert done.returncode == 0, done.stderr[-600:]
    assert (own / "exported/model_index.json").is_file()


def without_folder(*arguments: str) -> None:
    """As ``emf`` above, in a process that has imported the libraries already."""
    sys.path[:] = [path for path in sys.path if path]
    forked.emf(*arguments)


def installed(*arguments: str) -> None:
    without_folder(*arguments)
    assert find_spec("my_network") is None, "the folder is on the import path"


def test_a_folder_whose_modules_nobody_names_runs_nothing(own) -> None:
    (own / "run.yaml").write_text((own / "run.yaml").read_text().replace("my_network.MyNet", "SanaFlowMap"))
    done = forked.run(installed, "fit", "run.yaml", "--trainer.max_steps", "1", folder=own)
    assert done.returncode == 0, done.stderr[-600:]
    assert not (own / "ran").exists() and not (own / "stranger").exists()


def test_words_of_any_alphabet_are_paths() -> None:
    def report(runs: list[Path], out: Path = Path()) -> list[Path]:
        """Report.

        Args:
            runs: folders.
            out: a folder.
        """
        return runs

    assert call(report, ["report", "runs/\N{SLIGHTLY SMILING FACE}", "runs/\xf6"]) == [
        Path("runs/\N{SLIGHTLY SMILING FACE}"),
        Path("runs/\xf6"),
    ]
