"""Signals to a training with data workers, to all its processes or twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from emf_lightning.cli import main
from tests.cli.world import BASE

LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
STEPS = 400
EXPERIMENT = (
    BASE.replace("max_steps: 2", f"max_steps: {STEPS}")
    .replace("num_workers: 0", "num_workers: 2")
    .replace("{save_last: true}", "{save_last: true, every_n_train_steps: 2, save_top_k: 1}")
)


class Slow(Callback):
    """Takes long over each step but the first two."""

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step >= 2:
            time.sleep(5)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(EXPERIMENT)
    main(["shards", "--out", "shards", "--count", "64", "--samples_per_shard", "16"])
    return tmp_path


def started(*options: str, launcher: tuple[str, ...] = ("-m", "emf_lightning"), **environment: str) -> subprocess.Popen:
    """`emf fit` in a process group of its own, whose output goes to out.txt."""
    command = [sys.executable, *launcher, "fit", "--config", "run.yaml", *options]
    with Path("out.txt").open("a") as output:
        return subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )


def reached(process: subprocess.Popen, path: str = LAST) -> None:
    """Waits for a file of a running process."""
    while not Path(path).exists():
        assert process.poll() is None, said()
        time.sleep(0.02)


def said() -> str:
    return Path("out.txt").read_text()


def step() -> int:
    return torch.load(LAST, weights_only=True)["global_step"]


def whole() -> bool:
    return not list(Path("runs").rglob("*.partial")) and 0 < step() < STEPS


def test_a_signal_to_the_whole_group_spares_the_data_workers_until_the_state_is_saved(here):
    process = started()
    reached(process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(600) == 128 + signal.SIGTERM, said()
    assert "to go on: emf fit" in said() and "Traceback" not in said()
    assert whole()


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_tears_nothing(here):
    slow = "init_args: {save_last: true, every_n_train_steps: 2, save_top_k: 1}"
    text = Path("run.yaml").read_text()
    Path("run.yaml").write_text(text.replace(slow, f"{slow}\n    - class_path: tests.faults.test_process_groups.Slow"))
    process = started()
    reached(process)
    before = step()
    for _ in range(2):
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) in (-signal.SIGINT, 130)
    assert "press Ctrl-C again" in said() and whole() and step() == before
