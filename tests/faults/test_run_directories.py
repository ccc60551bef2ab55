"""Each run has its own directory, and goes on from its own state alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emf_lightning.cli import main
from emf_lightning.cli.run_directory import claim
from emf_lightning.cli.run_lock import lock
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
    assert [claim(tmp_path), claim(tmp_path)] == [0, 1]
