"""A directory with shards, experiments and a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from emf_lightning.cli import main
from tests.cli.world import BASE, CHECKPOINT, CHILD, PARENT


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with shards and two experiments, and a run of the child in runs/tiny/version_0."""
    path = tmp_path_factory.mktemp("world")
    (path / "shapes").mkdir()
    (path / "base.yaml").write_text(BASE)
    (path / "shapes/child.yaml").write_text(CHILD)
    (path / "meanflow.yaml").write_text(BASE.replace("FlowMatching", "MeanFlow"))
    (path / "file").write_text("")
    (path / "garbage").mkdir()
    shutil.copy(Path(PARENT) / "config.json", path / "garbage")
    (path / "garbage/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    (path / "garbage.ckpt").write_bytes(b"not a checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        main(["shards", "--out", "shards", "--count", "32", "--samples_per_shard", "16"])
        main(["fit", "--config", "shapes/child.yaml"])
    last = (path / CHECKPOINT).read_bytes()
    (path / "half.ckpt").write_bytes(last[: len(last) // 2])
    torch.save({"weight": torch.zeros(2)}, path / "weights.ckpt")
    for folder, size in (("cut", 1000), ("one_cut", 20_000)):
        shutil.copytree(path / "shards", path / folder)
        with (path / folder / "shapes-000000.tar").open("r+b") as shard:
            shard.truncate(size)
    (path / "cut/shapes-000001.tar").unlink()
    return path


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
