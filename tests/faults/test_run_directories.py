"""Each run has its own directory, and goes on from its own state alone."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import lr_scheduler

from emf_lightning.cli import main
from emf_lightning.cli.parsing.own_state import OwnStateOnly
from emf_lightning.cli.parsing.resumed_settings import ConfiguredSettings
from emf_lightning.cli.run_directory import claim, job
from emf_lightning.cli.run_lock import lock, read
from emf_lightning.modules.optimization import WarmupCosine
from tests.callbacks import tiny
from tests.cli.world import BASE, complaint

LAST = "checkpoints/last.ckpt"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        BASE.replace("init_args: {save_last: true}", "init_args: {save_last: true}\n    - class_path: SaveNetwork")
    )
    main(["shards", "--out", "shards", "--count", "32", "--samples_per_shard", "16"])
    return tmp_path


def step(run: str) -> int:
    return torch.load(Path(run) / LAST, weights_only=True)["global_step"]


def test_last_is_this_experiments_last_or_refused(here, capsys, monkeypatch):
    fit = ["fit", "--config", "run.yaml"]
    assert "no last checkpoint in runs/tiny" in complaint(capsys, *fit, "--ckpt_path", "last")
    main(fit)
    shutil.rmtree("runs/tiny/version_0/network")
    main([*fit, "--ckpt_path", "last"])  # at the end: what was left is done
    assert Path("runs/tiny/version_0/network/config.json").is_file()
    main([*fit, "--ckpt_path", "last", "--trainer.max_steps", "3"])
    assert step("runs/tiny/version_0") == 3
    other = [*fit, "--model.init_args.objective.class_path", "MeanFlow", "--ckpt_path", "last"]
    assert "another experiment" in complaint(capsys, *other)
    # Lightning would restore this one, which lies in the working directory
    shutil.copy(Path("runs/tiny/version_0") / LAST, "hpc_ckpt_1.ckpt")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fit"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    main([*fit, "--trainer.max_steps", "1"])
    assert step("runs/tiny/version_1") == 1
    # a requeued job keeps its directory
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main([*fit, "--trainer.max_steps", "1"])
    assert not Path("runs/tiny/version_2").exists()


def test_no_two_processes_train_in_one_directory(tmp_path):
    script = "import sys; from pathlib import Path; from emf_lightning.cli.run_lock import *; "
    held = [sys.executable, "-c", script + "f = lock(Path(sys.argv[1]), record_()); print(1, flush=True); input()"]
    held[2] = held[2].replace("record_()", "{'pid': os.getpid(), 'host': 'here'}")
    with subprocess.Popen([*held, str(tmp_path)], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on here works there"):
            lock(tmp_path, {})
        other.kill()
    lock(tmp_path, {}).close()
    assert read(tmp_path) == {}
    assert [claim(tmp_path), claim(tmp_path)] == [0, 1]


def test_other_ranks_never_read_an_empty_record(tmp_path, monkeypatch):
    for about in ({"job": "a long name"}, {"job": "b"}, {"job": "another long name"}):
        before, dumps, seen = read(tmp_path), json.dumps, []

        def looks(value, seen=seen, dumps=dumps):
            seen.append(read(tmp_path))
            return dumps(value)

        with monkeypatch.context() as patch:
            patch.setattr(json, "dumps", looks)
            lock(tmp_path, about).close()
        assert seen == [before]
        assert read(tmp_path) == about


def test_a_file_system_without_locks_is_worked_in_with_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=f"{tmp_path}: the file system has no locks .Function not implemented."):
        lock(tmp_path, {"pid": 7}).close()
    assert read(tmp_path) == {"pid": 7}


def test_a_job_keeps_its_name_where_it_is_started_again(monkeypatch):
    monkeypatch.setattr(os, "environ", given := {})
    assert job() is None
    given["SLURM_JOB_ID"] = "7"
    assert job() == "slurm 7"
    given["TORCHELASTIC_RUN_ID"] = "none"  # torchrun's, where the call names none
    assert job() == "slurm 7"
    given["TORCHELASTIC_RUN_ID"] = "mine"
    assert job() == "torchrun mine"
    del given["SLURM_JOB_ID"]
    given |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
    assert str(os.getppid()) in (job() or "")
    given["GROUP_WORLD_SIZE"] = "2"  # rank 0 may be on another machine
    assert job() == "torchrun on 2 machines"


class FirstRankFound(SingleDeviceStrategy):
    """That of a rank which has found no checkpoint where the first rank has found ``path``."""

    path: Path

    def broadcast(self, obj, src=0):
        return str(self.path) if obj is None else obj


def test_all_ranks_load_the_first_rank_s_checkpoint(tmp_path):
    folder, saved = tiny.shards(tmp_path / "shards"), ModelCheckpoint(tmp_path, "saved", every_n_train_steps=2)
    tiny.trainer(tmp_path / "one", saved, max_steps=2, enable_checkpointing=True).fit(
        tiny.flow_matching(), tiny.data(folder)
    )
    strategy = FirstRankFound("cpu")
    strategy.path = tmp_path / "saved.ckpt"
    trainer = tiny.trainer(tmp_path / "two", strategy=strategy, max_steps=3)
    trainer._checkpoint_connector = OwnStateOnly(trainer)
    steps = Steps()
    trainer.callbacks.append(steps)
    trainer.fit(tiny.flow_matching(), tiny.data(folder), weights_only=True)
    assert steps.seen == [2]


class Steps(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.global_step)


def rates(run: str) -> tuple[float, float]:
    """The base rate and the weight decay in the state of a run's optimiser."""
    (group,) = torch.load(Path(run) / LAST, weights_only=True)["optimizer_states"][0]["param_groups"]
    return group["initial_lr"], group["weight_decay"]


def test_a_resumed_run_takes_the_rate_of_its_configuration(here):
    optimizer = "--model.init_args.optimization.optimizer"
    main(["fit", "--config", "run.yaml", optimizer, "torch.optim.AdamW", f"{optimizer}.init_args.lr", "0.001"])
    settings = [f"{optimizer}.init_args.lr", "0.0001", f"{optimizer}.init_args.weight_decay", "0.5"]
    with pytest.warns(UserWarning, match=r"its configuration: weight_decay 0\.01 -> 0\.5, lr 0\.001 -> 0\.0001"):
        main(["fit", "--run", "runs/tiny", "--trainer.max_steps", "4", *settings])
    assert rates("runs/tiny/version_0") == (0.0001, 0.5)


def cosine(optimizer, steps):
    return lr_scheduler.CosineAnnealingLR(optimizer, steps)


def sequence(optimizer, steps):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(optimizer, steps)]
    return lr_scheduler.SequentialLR(optimizer, parts, [5])


def one_cycle(optimizer, steps):
    return lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=steps)


def to_zero(optimizer, steps):
    return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)


def lambdas(optimizer, steps):
    return WarmupCosine(optimizer, steps, warmup=2)


SCHEDULES = [cosine, sequence, one_cycle, to_zero, lambdas, None]


class Trained:
    """An optimiser and a schedule, as a trainer has them."""

    def __init__(self, schedule, rate, steps):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], rate, betas=(0.8, 0.9))
        self.optimizers = [optimizer]
        schedulers = [] if schedule is None else [schedule(optimizer, steps)]
        self.lr_scheduler_configs = [SimpleNamespace(scheduler=each) for each in schedulers]

    def step(self):
        self.optimizers[0].step()
        for config in self.lr_scheduler_configs:
            config.scheduler.step()
        return {name: self.optimizers[0].param_groups[0][name] for name in ("lr", "betas", "weight_decay")}

    def resumed_from(self, other):
        configured = ConfiguredSettings(self)
        self.optimizers[0].load_state_dict(other.optimizers[0].state_dict())
        for ours, theirs in zip(self.lr_scheduler_configs, other.lr_scheduler_configs, strict=False):
            ours.scheduler.load_state_dict(copy.deepcopy(theirs.scheduler.state_dict()))
        return configured.put_back(self)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_schedule_goes_on_as_an_uninterrupted_one_with_its_settings(schedule):
    interrupted, whole = Trained(schedule, 1e-3, 20), Trained(schedule, 1e-3, 20)
    for _ in range(10):
        assert interrupted.step() == whole.step()
    same, changed = Trained(schedule, 1e-3, 20), Trained(schedule, 1e-4, 40)
    assert not same.resumed_from(interrupted)
    assert [same.step() for _ in range(8)] == [whole.step() for _ in range(8)]

    assert "lr 0.001 -> 0.0001" in changed.resumed_from(interrupted) or schedule is one_cycle
    wanted = Trained(schedule, 1e-4, 40)
    for _ in range(10):
        wanted.step()
    for _ in range(20):
        assert changed.step()["lr"] == pytest.approx(wanted.step()["lr"], rel=1e-6, abs=1e-12)


def test_a_schedule_that_has_ended_at_0_does_not_hold_the_next_one_there():
    ended = Trained(to_zero, 1e-3, 5)
    for _ in range(6):
        ended.step()
    longer, constant, another = Trained(to_zero, 1e-3, 20), Trained(None, 1e-3, 0), Trained(cosine, 1e-3, 20)
    assert "total_iters 5 -> 20" in longer.resumed_from(ended)
    assert longer.step()["lr"] == pytest.approx(1e-3 * 13 / 20)
    assert "lr 0 -> 0.001" in constant.resumed_from(ended)
    assert constant.step()["lr"] == 1e-3
    assert "scheduler CosineAnnealingLR" in another.resumed_from(ended)
    assert another.step()["lr"] == pytest.approx(5e-4 * (1 + math.cos(math.pi * 7 / 20)))


class Halved(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of one's own: after ``after`` steps the rate is a half."""

    def __init__(self, optimizer, after, last_epoch=-1):
        self.after = after
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        return [rate / (1 + (self.last_epoch >= self.after)) for rate in self.base_lrs]


def test_every_argument_of_an_optimiser_or_a_schedule_is_the_configurations():
    def trained(alpha, after):
        made = Trained(lambda optimizer, steps: Halved(optimizer, steps), 1e-3, after)
        made.optimizers = [torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(1))], 1e-3, alpha=alpha)]
        made.lr_scheduler_configs = [SimpleNamespace(scheduler=Halved(made.optimizers[0], after))]
        return made

    earlier, now = trained(0.9, 100), trained(0.5, 2)
    for _ in range(3):
        earlier.optimizers[0].step()
        earlier.lr_scheduler_configs[0].scheduler.step()
    assert {"alpha 0.9 -> 0.5", "after 100 -> 2"} == set(now.resumed_from(earlier))
    assert now.optimizers[0].param_groups[0]["alpha"] == 0.5
    assert now.optimizers[0].param_groups[0]["lr"] == 5e-4
    assert not trained(0.9, 100).resumed_from(earlier)
    centered = trained(0.9, 100)
    centered.optimizers[0].param_groups[0]["centered"] = True  # whose state the checkpoint does not have
    assert not centered.resumed_from(earlier)
    assert not centered.optimizers[0].param_groups[0]["centered"]
