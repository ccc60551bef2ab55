from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from emf_lightning.callbacks import SaveNetwork
from emf_lightning.networks.sana import SanaFlowMap
from tests.callbacks import tiny


def test_the_folder_holds_the_averaged_network_and_starts_the_next_experiment(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    live = []

    class Live(SaveNetwork):
        def on_train_end(self, trainer, pl_module):
            live.extend(weight.detach().clone() for weight in pl_module.net.parameters())
            super().on_train_end(trainer, pl_module)

    # listed before the averaging, which copies the averages into the module when training ends
    trainer = tiny.trainer(tmp_path / "run", Live(), average, max_steps=2)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(tiny.shards(tmp_path / "shards")))

    loaded = SanaFlowMap(pretrained=str(tmp_path / "run" / "network"), context_width=16)
    averaged = average._average_model.module.net.state_dict()
    assert loaded.state_dict().keys() == averaged.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, averaged[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(live, loaded.parameters(), strict=True))


def test_a_time_scale_that_would_forget_the_intervals_is_refused_before_the_training(tmp_path):
    trainer = tiny.trainer(tmp_path / "run", SaveNetwork(time_scale=5.0), max_steps=2)
    with pytest.raises(ValueError, match="forgets the intervals that MeanFlow trains; leave it out"):
        trainer.fit(tiny.meanflow(), datamodule=tiny.data(tiny.shards(tmp_path / "shards")))
