from __future__ import annotations

import re

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from emf_lightning.callbacks import ExperimentProgressBar, FewStepSampling, TrainingLog
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from tests.callbacks import tiny
from tests.callbacks.test_own_prompts import Brightness


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


def sampling(every_n_steps: int = 100, figures: bool = False) -> FewStepSampling:
    suite = ShapesSuite(per_task=2, scenes_per_task=1)
    return FewStepSampling(suite, [1, 2], every_n_steps, 1, 1, at_start=False, shown_per_task=1, figures=figures)


def fit(shards, run, capsys, *callbacks, **arguments) -> list[str]:
    """What a training of four steps writes to standard output, line by line."""
    bar = ExperimentProgressBar(refresh_rate=1, seconds_between_lines=0)
    trainer = tiny.trainer(run, bar, TrainingLog(), *callbacks, enable_progress_bar=True, **arguments)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards))
    return capsys.readouterr().out.splitlines()


def test_a_log_file_gets_lines_with_steps_speed_and_both_errors(shards, tmp_path, capsys):
    lines = [line for line in fit(shards, tmp_path / "run", capsys) if line.startswith("step ")]

    assert [line.split(",")[0] for line in lines] == [f"step {n}/4 ({25 * n} %)" for n in (1, 2, 3, 4)]
    for part in ("left", "img/s", "mse r=t", "mse r<t"):
        assert part in lines[-1]


def test_lines_come_no_oftener_than_asked_but_the_last_one_does(shards, tmp_path, capsys):
    bar = ExperimentProgressBar(refresh_rate=1, seconds_between_lines=1e6)
    trainer = tiny.trainer(tmp_path / "run", bar, enable_progress_bar=True)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards))

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(" ")[1] for line in lines] == ["1/4", "4/4"]


def test_the_end_is_a_table_and_a_line_for_each_path(shards, tmp_path, capsys):
    run = tmp_path / "run"
    saver = ModelCheckpoint(run / "checkpoints", save_last=True, every_n_train_steps=4)
    lines = fit(shards, run, capsys, sampling(figures=True), saver, enable_checkpointing=True)

    assert lines[-4:] == [
        f"run: {run}",
        f"curves: tensorboard --logdir {run}",
        f"pictures: {run}/shapes",
        f"checkpoint: {run}/checkpoints/last.ckpt",
    ]
    heads = [line.split("  ")[0] for line in lines[-10:-4]]
    assert heads == ["shapes, step 4", "", "1 step, 1 NFE", "2 steps, 2 NFE", "ceiling", "chance"]
    assert len({len(line) for line in lines[-9:-4]}) == 1, "the columns are not aligned"
    assert any(line.startswith("step 4: 1/2 network steps score") for line in lines)


def test_the_checkpoint_of_the_best_score_is_named_beside_the_newest(shards, tmp_path, capsys):
    run = tmp_path / "run"
    score = "eval/shapes/overall/1step"
    best = ModelCheckpoint(run / "best", "best", monitor=score, mode="max", every_n_train_steps=2)
    newest = ModelCheckpoint(run / "checkpoints", save_last=True, every_n_train_steps=4)
    lines = fit(shards, run, capsys, sampling(every_n_steps=2), best, newest, enable_checkpointing=True)

    named = [line.removeprefix("checkpoint: ") for line in lines if line.startswith("checkpoint: ")]
    assert named == [f"{run}/best/best.ckpt", f"{run}/checkpoints/last.ckpt"]


def test_a_terminal_gets_one_bar_in_optimiser_steps_over_all_epochs(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = ExperimentProgressBar(refresh_rate=1)
    trainer = tiny.trainer(tmp_path / "run", bar, enable_progress_bar=True, max_steps=10, accumulate_grad_batches=2)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards))

    out = capsys.readouterr().out
    assert trainer.current_epoch > 1
    assert "10/10" in out
    assert "Epoch" not in out
    assert "step 10" not in out


def test_validate_shows_its_progress_and_its_table(shards, tmp_path, capsys):
    bar = ExperimentProgressBar(refresh_rate=1, seconds_between_lines=0)
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=16)
    trainer = tiny.trainer(tmp_path / "run", bar, sampling(), enable_progress_bar=True)
    trainer.validate(tiny.meanflow(), datamodule=data, verbose=False)

    out = capsys.readouterr().out
    assert "validation: 1 batches" in out
    assert "ceiling" in out
    assert f"curves: tensorboard --logdir {tmp_path / 'run'}" in out.splitlines()
    assert "inf" not in out


def test_refresh_rate_0_is_silent(shards, tmp_path, capsys):
    bar = ExperimentProgressBar(refresh_rate=0, seconds_between_lines=0)
    trainer = tiny.trainer(tmp_path / "run", bar, enable_progress_bar=True, max_steps=1)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards))

    assert capsys.readouterr().out == ""


def test_each_benchmark_of_several_callbacks_keeps_its_scores(shards, tmp_path, capsys):
    settings = {"at_start": False, "every_n_steps": 2, "figures": False}
    prompts = FewStepSampling(steps=[1], prompts=["one", "two"], extra_metrics=[Brightness()], **settings)
    lines = fit(shards, tmp_path / "run", capsys, sampling(every_n_steps=2), prompts)

    last = next(line for line in lines if line.startswith("step 4/4"))
    assert re.search(r", shapes scores 1/2 \.?\d+ \.?\d+, prompts brightness 1 ", last), last
