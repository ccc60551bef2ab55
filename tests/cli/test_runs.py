"""A run by its name, and what a call leaves in the run directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emf_lightning.cli import main
from emf_lightning.cli.runs import find_run
from tests.cli.world import complaint

RUN = "runs/tiny/version_0"
LAST = f"{RUN}/checkpoints/last.ckpt"
VALIDATED = ("--data.validation_shards", "shards")


@pytest.fixture
def folders() -> set[Path]:
    return set(Path("runs").rglob("*"))


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.png"))


@pytest.mark.parametrize("run", [RUN, LAST, f"{RUN}/config.yaml", f"{RUN}/checkpoints", "runs/tiny"])
def test_a_run_is_named_by_any_of_its_paths(alone, run):
    found = find_run(run)
    assert (found.directory, found.checkpoint) == (Path(RUN), Path(LAST))


def test_prompts_are_sampled_with_the_runs_last_checkpoint(tmp_path, folders):
    (tmp_path / "prompts.txt").write_text("two squares\n\na blue circle\n")
    options = ["--steps", "1,3", "--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.txt")]
    main(["predict", "--run", LAST, "--prompt", "a red: circle", *options])

    rows = [json.loads(line) for line in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert names(tmp_path / "out") == [f"{index:05d}-{steps}step.png" for index in range(3) for steps in (1, 3)]
    assert [row["prompt"] for row in rows[::2]] == ["a red: circle", "two squares", "a blue circle"]
    assert {path.name for path in set(Path("runs").rglob("*")) - folders if path.is_dir()} == set()


def test_a_name_is_its_newest_version_and_the_scale_is_an_option(tmp_path):
    shutil.copytree(RUN, tmp_path / "runs/a/version_2")
    shutil.copytree(RUN, tmp_path / "runs/a/version_10")
    assert find_run(tmp_path / "runs/a").directory == tmp_path / "runs/a/version_10"

    main(["predict", "--run", str(tmp_path / "runs/a"), "--prompt", "a circle", "--steps=2", "--guidance_scale", "1,3"])

    found = tmp_path / "runs/a/version_10/samples"
    assert names(found) == ["00000-2step.png", "00000-2step_cfg3.png"]
    assert not (tmp_path / "runs/a/version_11").exists()


def test_a_home_that_the_shell_left_in_an_option_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(RUN, tmp_path / "run")
    main(["predict", "--run=~/run", "--prompt", "a circle", "--steps=1", "--out=~/pictures"])
    assert names(tmp_path / "pictures") == ["00000-1step.png"]


def test_a_run_is_planned_as_its_configuration_is(capsys):
    plans = []
    for arguments in ([RUN], ["--run", RUN], ["--config", f"{RUN}/config.yaml"]):
        main(["plan", *arguments])
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1] == plans[2]


def test_sampling_needs_no_callback_in_the_experiment(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    main(["predict", "--run", str(tmp_path / "run"), "--prompt", "a circle", "--trainer.callbacks", "null"])

    assert names(tmp_path / "run/samples") == [f"00000-{steps}step.png" for steps in (1, 2, 4)]


@pytest.fixture
def alone(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of the run."""
    shutil.copytree(world / RUN, tmp_path / RUN)
    shutil.copytree(world / "shards", tmp_path / "shards")
    shutil.copy(world / "base.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / RUN


@pytest.mark.parametrize("how", ["--run", "--ckpt_path", "last"])
def test_an_evaluation_writes_into_the_run_that_it_evaluates(alone, how):
    config = (alone / "config.yaml").read_text()
    given = {
        "--run": ["--run", "runs/tiny"],
        "--ckpt_path": ["--config", f"{RUN}/config.yaml", "--ckpt_path", LAST],
        "last": ["--config", f"{RUN}/config.yaml", "--ckpt_path", "last"],
    }[how]
    main(["validate", *given, *VALIDATED])

    assert (alone / "config.yaml").read_text() == config
    assert [path.name for path in alone.parent.iterdir()] == ["version_0"]
    events = EventAccumulator(str(max(alone.glob("events*"), key=lambda path: path.stat().st_mtime))).Reload()
    assert [scalar.step for scalar in events.Scalars("validation/mse_v_at_0.5")] == [2]


def test_a_run_that_lies_elsewhere_goes_on_in_its_own_directory(alone, tmp_path):
    moved = alone.rename(tmp_path / "kept")
    main(["fit", "--run", str(moved), "--trainer.max_steps", "3"])

    assert torch.load(moved / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert len(list((moved / "checkpoints").iterdir())) == 2  # the last one and the newest, as before
    assert list((tmp_path / "runs").rglob("version_*")) == []
    main(["fit", "--config", str(moved / "config.yaml"), "--trainer.max_steps", "1"])  # a repetition from the start
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 1


def test_the_newest_whole_checkpoint_is_taken(alone):
    saved = alone / "checkpoints"
    (saved / "epoch=0-step=2.ckpt").rename(saved / "first.ckpt")
    shutil.copy(saved / "first.ckpt", saved / "second.ckpt")
    (saved / "last.ckpt").write_bytes((saved / "last.ckpt").read_bytes()[:-100])
    assert find_run(alone).checkpoint == saved / "last.ckpt"  # replaced, with a warning, where it is read
    (saved / "last.ckpt").unlink()
    assert find_run(alone).checkpoint == saved / "second.ckpt"
    (saved / "second.ckpt").write_bytes(b"")
    assert find_run(alone).checkpoint == saved / "first.ckpt"


@pytest.mark.parametrize("verb", ["predict", "validate", "test"])
def test_an_untrained_network_is_refused_unless_it_is_meant(alone, capsys, verb):
    prompt = ["--prompt", "a circle", "--steps", "1"] if verb == "predict" else VALIDATED
    line = complaint(capsys, verb, "--config", "base.yaml", *prompt)
    assert "no checkpoint is given, and the network is not trained: add --run RUN" in line
    shutil.rmtree(alone / "checkpoints")
    assert f"{RUN} has no checkpoint; train it first" in complaint(capsys, verb, "--run", "runs/tiny", *prompt)
    (alone.parent / "version_1").mkdir()
    (alone / "config.yaml").rename(alone.parent / "version_1/config.yaml")
    (alone / "checkpoints").mkdir()
    (alone / "checkpoints/x.ckpt").touch()
    assert "version_1 has no checkpoint; runs/tiny/version_0 has one" in complaint(capsys, verb, "--run", "runs/tiny")

    main([verb, "--config", "base.yaml", "--ckpt_path", "none", *prompt])
    assert (alone.parent / "version_2/config.yaml").is_file()


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("nowhere", "run: nowhere is not there; give"),
        ("shards", "no config.yaml in shards"),
        ("base.yaml", "no config"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "predict", "export"])
def test_what_is_no_run_is_named(capsys, verb, run, said):
    assert said in complaint(capsys, verb, "--run", run, *(["--out", "out"] if verb == "export" else []))


FAILURES = {
    "no data": ["fit", "--config", "base.yaml", "--data.shards", "nowhere"],
    "no batch": ["fit", "--config", "base.yaml", "--data.shards", "shards", "--data.batch_size", "512"],
    "no length": ["fit", "--config", "base.yaml", "--trainer.max_steps", "-1"],
    "precision": ["fit", "--config", "base.yaml", "--trainer.precision", "bf16-true"],
    "option": ["fit", "--config", "base.yaml", "--trainer.max_stepz", "1"],
    "named": ["fit", "--config", "base.yaml", "--data.shards", "nowhere", "--trainer.logger.init_args.version", "x"],
    "csv": ["fit", "--config", "base.yaml", "--data.shards", "nowhere", "--trainer.logger.class_path", "CSVLogger"],
    "validate": ["validate", "--config", "base.yaml", "--ckpt_path", "none"],
    "predict": ["predict", "--config", "base.yaml", "--ckpt_path", "none", "--data.prompts", "nowhere"],
    "no prompts": ["predict", "--run", RUN],
    "evaluated": ["validate", "--run", RUN],
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_start_that_fails_leaves_no_directory(alone, tmp_path, capsys, case):
    before = sorted(tmp_path.rglob("*"))
    complaint(capsys, *FAILURES[case])
    assert {path for path in tmp_path.rglob("*") if path not in before and "events" not in path.name} == set()
    if alone.parent.is_dir() and case not in ("no prompts", "evaluated"):
        shutil.rmtree("runs")
        complaint(capsys, *FAILURES[case])
        assert not Path("runs").exists()
