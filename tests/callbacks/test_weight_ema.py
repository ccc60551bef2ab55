from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
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
