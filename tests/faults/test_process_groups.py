"""Signals to several processes of one training: data workers, ranks, a restart by torchrun, a requeued job."""

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
from tests.forked import Forked, emf

HERE = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
"""Lets processes of their own find the callbacks of this file."""

LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
STEPS = 400
EXPERIMENT = (
    BASE.replace("max_steps: 2", f"max_steps: {STEPS}")
    .replace("num_workers: 0", "num_workers: 2")
    .replace("{save_last: true}", "{save_last: true, every_n_train_steps: 2, save_top_k: 1}")
)
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.num_workers", "1", "--trainer.max_steps", "40"]


class Slow(Callback):
    """Takes long over each step but the first two."""

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step >= 2:
            time.sleep(5)


class Raises(Callback):
    """Ends the training by an error that is none of the user's."""

    def on_train_batch_end(self, trainer, *_):
        raise RuntimeError("out of memory")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(EXPERIMENT)
    main(["shards", "--out", "shards", "--count", "64", "--samples_per_shard", "16"])
    return tmp_path


def add(callback: str) -> None:
    """Adds one of the callbacks above to the experiment."""
    text, last = Path("run.yaml").read_text(), "init_args: {save_last: true, every_n_train_steps: 2, save_top_k: 1}"
    Path("run.yaml").write_text(text.replace(last, f"{last}\n    - class_path: {__name__}.{callback}"))


def started(*options: str, launcher: tuple[str, ...] = ("-m", "emf_lightning"), **environment: str) -> subprocess.Popen:
    """`emf fit` in a process group of its own, whose output goes to out.txt."""
    command = [sys.executable, *launcher, "fit", "--config", "run.yaml", *options]
    with Path("out.txt").open("a") as output:
        return subprocess.Popen(
            command, env=os.environ | HERE | environment, stdout=output, stderr=output, start_new_session=True
        )


def reached(process: subprocess.Popen | Forked, path: str = LAST) -> None:
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
    process = Forked(emf, "fit", "--config", "run.yaml", output=(Path("out.txt"), Path("out.txt")))
    reached(process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(600) == 128 + signal.SIGTERM, said()
    assert "to go on: emf fit" in said() and "Traceback" not in said()
    assert whole()


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_tears_nothing(here):
    add("Slow")
    process = started()
    reached(process)
    before = step()
    for _ in range(2):
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) in (-signal.SIGINT, 130)
    assert "press Ctrl-C again" in said() and whole() and step() == before


@pytest.mark.slow
def test_an_error_ends_the_data_workers_too(here):
    add("Raises")
    process = started()
    assert process.wait(500) == 1, said()  # workers outlive a SIGTERM by 600 seconds
    assert "RuntimeError: out of memory" in said()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_a_signal_to_both_ranks_saves_one_state(here):
    process = started(*TWO)
    reached(process)
    ranks = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    other = next(pid for pid in ranks if b"emf_lightning" in Path(f"/proc/{pid}/cmdline").read_bytes())
    for pid in (other, process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(600) == 128 + signal.SIGTERM, said()
    assert "to go on: emf fit" in said() and whole()
    saved = step()
    again = started(*TWO, "--trainer.max_steps", str(saved + 1), "--ckpt_path", "last")
    assert again.wait(600) == 0, said()
    assert step() == saved + 1


def _children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


@pytest.mark.slow
def test_torchrun_restarts_a_lost_rank_from_the_last_checkpoint(here):
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max_restarts",
        "1",
        "-m",
        "emf_lightning",
    )
    process = started(*TWO, launcher=launcher)
    reached(process)
    ranks = _children(process.pid).split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert process.wait(600) == 0, said()
    assert step() == 40 and [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert "Restored all states from the checkpoint" in said() or "Restoring states from the checkpoint" in said()


@pytest.mark.slow
def test_a_requeued_job_keeps_its_directory_and_its_curve(here):
    tools = here / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued.txt\n')
    (tools / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fit", "PATH": f"{tools}:{os.environ['PATH']}"}
    job |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    process = started(**job)
    reached(process)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(600) == 128 + signal.SIGUSR1, said()
    assert Path("requeued.txt").read_text().split() == ["requeue", "7"]
    saved = step()
    again = started("--trainer.max_steps", str(STEPS), **job, SLURM_RESTART_COUNT="1")
    reached(again)
    while step() <= saved:
        assert again.poll() is None, said()
        time.sleep(0.1)
    (tools / "scontrol").unlink()  # as in a container
    os.kill(again.pid, signal.SIGUSR1)
    assert again.wait(600) == 128 + signal.SIGUSR1, said()
    assert "SLURM did not requeue job 7" in said() and "Traceback" not in said()
    assert step() > saved and [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
