from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
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
