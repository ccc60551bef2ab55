"""Each run has its own directory, and goes on from its own state alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from emf_lightning.cli import main
from emf_lightning.cli.parsing.own_state import OwnStateOnly
from emf_lightning.cli.run_directory import claim, job
from emf_lightning.cli.run_lock import lock, read
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
