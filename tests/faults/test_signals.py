"""A signal ends a training at a step boundary: the resumed run ends with the weights of an uninterrupted one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from emf_lightning.cli import main
from tests.cli.world import BASE

PLACES = {
    "data loading": "on_train_batch_start",
    "backward": "on_before_backward",
    "after backward": "on_after_backward",
    "optimiser step": "on_before_optimizer_step",
    "clearing gradients": "on_before_zero_grad",
    "sampling": "on_train_batch_end",
    "checkpoint writing": "on_save_checkpoint",
    "validation": "on_validation_batch_start",  # the averages are in the network's place
}
EXPERIMENT = (
    BASE.replace("max_steps: 2", "max_steps: 9\n  val_check_interval: 2\n  limit_val_batches: 1")
    .replace(
        "init_args: {save_last: true}",
        """init_args: {save_last: true, every_n_train_steps: 3}
    - class_path: WeightEMA
      init_args: {decay: 0.5}
    - class_path: tests.faults.test_signals.Sends""",
    )
    .replace("  shards: shards", "  shards: shards\n  validation_shards: shards\n  validation_samples: 8")
)


class Sends(Callback):
    """Sends this process a signal in one hook at step 4, or in the first such hook after it."""

    def __init__(self, hook: str = "none", number: int = int(signal.SIGUSR1), step: int = 4) -> None:
        def send(trainer: Any, *_: Any, **__: Any) -> None:
            if trainer.global_step >= step and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        self.sent = False
        if hook != "none":
            setattr(self, hook, send)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(EXPERIMENT)
    main(["shards", "--out", "shards", "--count", "32", "--samples_per_shard", "16"])
    return tmp_path


def fit(name: str, *options: str) -> Path:
    """Trains in this process; returns the newest checkpoint."""
    main(["fit", "--config", "run.yaml", "--trainer.logger.init_args.name", name, *options])
    return Path("runs") / name / "version_0/checkpoints/last.ckpt"


def stopped(name: str, hook: str, number: int = signal.SIGUSR1) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        fit(name, f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.number={int(number)}")
    assert end.value.code == 128 + number
    return torch.load(Path("runs") / name / "version_0/checkpoints/last.ckpt", weights_only=True)


def assert_same(first: Path, second: Path) -> None:
    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    assert one["global_step"] == other["global_step"] == 9
    for part in ("state_dict", "current_model_state"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), (part, name)


@pytest.mark.parametrize(
    "places",
    [["sampling"], pytest.param([place for place in PLACES if place != "sampling"], marks=pytest.mark.slow)],
)
def test_a_signal_anywhere_in_a_step_loses_nothing(here, places):
    whole = fit("whole")
    for place in places:
        name = place.replace(" ", "_")
        saved = stopped(name, PLACES[place])
        assert 4 <= saved["global_step"] < 9, place
        assert_same(whole, fit(name, "--ckpt_path", "last"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_line_that_goes_on_is_printed(here, capsys, number):
    saved = stopped("run", "on_after_backward", number)
    line = capsys.readouterr().out.partition("to go on: emf ")[2].strip()
    assert saved["global_step"] == 5 and "--ckpt_path runs/run/version_0/checkpoints/last.ckpt" in line
    assert line.endswith("--trainer.logger.init_args.version 0")


TERM = f"--trainer.callbacks.number={int(signal.SIGTERM)}"


@pytest.mark.parametrize(
    "length",
    [[], ["--trainer.max_time", "{seconds: 1}", "--trainer.max_steps", "100000"], ["--trainer.max_epochs", "1"]],
)
def test_a_signal_in_the_final_sampling_ends_the_run_and_its_state_is_named(here, capsys, length):
    with pytest.raises(SystemExit) as end:
        fit("run", "--trainer.callbacks.hook=on_train_end", "--trainer.callbacks.step=1", TERM, *length)
    assert end.value.code == 128 + signal.SIGTERM
    assert "--ckpt_path runs/run/version_0/checkpoints/last.ckpt" in capsys.readouterr().out


def test_a_resumed_run_that_takes_no_step_goes_on_from_where_it_would_have(here, capsys):
    saved = fit("run", "--trainer.max_steps", "6")
    with pytest.raises(SystemExit):
        fit("other", "--ckpt_path", str(saved), "--trainer.callbacks.hook=on_train_start", TERM)
    assert capsys.readouterr().out.strip().endswith(f"{TERM} --ckpt_path {saved}")
