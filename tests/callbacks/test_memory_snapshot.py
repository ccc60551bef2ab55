from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from emf_lightning.callbacks import MemorySnapshot
from tests.callbacks import tiny


@pytest.mark.parametrize("settings", [{"steps": 0}, {"max_entries": -1}])
def test_settings_must_be_positive(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="MemorySnapshot: steps and max_entries must be at least 1, got"):
        MemorySnapshot(**settings)


def test_a_run_without_cuda_goes_on_with_a_warning(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "run", MemorySnapshot(), max_steps=1, accelerator="cpu")
    with pytest.warns(UserWarning, match="MemorySnapshot records CUDA's memory, and this run is on cpu"):
        trainer.fit(tiny.flow_matching(), datamodule=tiny.data(tiny.shards(tmp_path / "shards")))

    assert trainer.global_step == 1
    assert [*tmp_path.rglob("memory-rank*")] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's memory")
def test_the_allocations_of_the_first_steps_are_written(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "run", MemorySnapshot(steps=2), max_steps=3, accelerator="gpu")
    trainer.fit(tiny.flow_matching(), datamodule=tiny.data(tiny.shards(tmp_path / "shards")))

    (file,) = tmp_path.rglob("memory-rank0.pickle")
    assert any(event["frames"] for trace in pickle.loads(file.read_bytes())["device_traces"] for event in trace)
