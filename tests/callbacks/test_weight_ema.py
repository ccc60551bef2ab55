from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from emf_lightning.callbacks import WeightEMA
from emf_lightning.flow.target_velocity import TeacherVelocity
from tests.callbacks import tiny

ELSEWHERE = torch.device("meta")
"""A device that every machine has and no module is built on."""


@pytest.mark.parametrize(("asked", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_averages_lie_where_the_module_trains_unless_a_device_is_given(asked, expected):
    strategy = SingleDeviceStrategy(ELSEWHERE, accelerator=CPUAccelerator())
    trainer = Trainer(strategy=strategy, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = tiny.meanflow(velocity=TeacherVelocity())
    average = WeightEMA(device=asked)
    average.setup(trainer, module, "fit")

    assert {tensor.device.type for tensor in average._average_model.state_dict().values()} == {expected}
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_a_stage_that_does_not_train_has_no_averages(tmp_path):
    average = WeightEMA()
    average.setup(tiny.trainer(tmp_path), tiny.meanflow(), "validate")
    assert average._average_model is None


def test_warmup_averages_over_a_share_of_the_training(tmp_path):
    """The n-th average has decay min(decay, (1 + n) / (10 + n)); the first is the live weight."""
    lives: list[torch.Tensor] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            lives.append(next(pl_module.net.parameters()).detach().clone())

    average = WeightEMA(decay=0.3, warmup=True)
    trainer = tiny.trainer(tmp_path / "run", Record(), average)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(tiny.shards(tmp_path / "shards")))

    expected = lives[0]
    for n, live in enumerate(lives[1:], start=1):
        expected = expected.lerp(live, 1 - min(0.3, (1 + n) / (10 + n)))
    assert not torch.equal(lives[-1], lives[0])
    torch.testing.assert_close(next(average._average_model.module.net.parameters()), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("warmup", [False, True])
def test_integers_and_what_never_changes_keep_their_bits(warmup):
    average = WeightEMA(decay=0.9995, warmup=warmup)._kwargs["avg_fn"]
    positions, weight = torch.arange(77), torch.randn(1000)
    kept = weight.clone()
    for n in range(1, 200):
        positions, kept = average(positions, torch.arange(77), n), average(kept, weight, n)
    assert torch.equal(positions, torch.arange(77))
    assert torch.equal(kept, weight)


def test_files_of_the_last_steps_weights_are_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = tiny.trainer(tmp_path / "run", WeightEMA(), saving, enable_checkpointing=True)
    with pytest.raises(ValueError, match="save_weights_only would save the last step's weights"):
        trainer.fit(tiny.meanflow(), datamodule=tiny.data(tiny.shards(tmp_path / "shards")))


def test_a_run_that_goes_on_without_averages_starts_from_the_last_steps_weights(tmp_path):
    shards = tiny.shards(tmp_path / "shards")

    def fit(name: str, steps: int, *callbacks: Callback, ckpt_path: str | None = None) -> list[torch.Tensor]:
        torch.manual_seed(5)
        module = tiny.meanflow()
        trainer = tiny.trainer(tmp_path / name, *callbacks, max_steps=steps, enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=tiny.data(shards), ckpt_path=ckpt_path)
        return [parameter.detach().clone() for parameter in module.parameters()]

    saving = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=2)
    fit("averaged", 2, WeightEMA(decay=0.5), saving)
    resumed = fit("on", 4, ckpt_path=str(tmp_path / "saved/last.ckpt"))
    assert all(map(torch.equal, resumed, fit("whole", 4)))


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_trainer_that_has_trained_evaluates_a_checkpoints_averages(tmp_path, verb):
    held = []

    class Watch(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            held.append({name: value.clone() for name, value in pl_module.state_dict().items()})

        on_test_epoch_end = on_validation_epoch_end

    shards = tiny.shards(tmp_path / "shards")
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=8)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
    trainer = tiny.trainer(tmp_path / "run", WeightEMA(decay=0.9), Watch(), saver, enable_checkpointing=True)
    module = tiny.meanflow()
    trainer.fit(module, datamodule=data)
    held.clear()
    assert trainer.global_step == 4
    getattr(trainer, verb)(module, datamodule=data, ckpt_path=str(tmp_path / "step=4.ckpt"), verbose=False)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    averages, live = saved["state_dict"], saved["current_model_state"]
    assert any(not torch.equal(value, live[name]) for name, value in averages.items())
    assert all(torch.equal(value, averages[name]) for name, value in held[0].items())
