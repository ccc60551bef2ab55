from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL
from tests.callbacks import tiny


class Batches(Callback):
    """The optimiser step and the index of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((trainer.global_step, batch_idx))


@pytest.mark.parametrize("step", [2, 3])
def test_accumulation_resumes_within_a_pass_and_at_its_end(tmp_path, step):
    """Passes of five batches, two a step: the third step of a pass takes one."""
    write_shards(SMALL, tmp_path / "shards", 40, samples_per_shard=20)

    def run(name, checkpoint=None):
        seen, saved = Batches(), ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = tiny.trainer(
            tmp_path / name, seen, saved, max_steps=6, accumulate_grad_batches=2, enable_checkpointing=True
        )
        model = tiny.flow_matching()
        trainer.fit(model, tiny.data(tmp_path / "shards"), ckpt_path=checkpoint, weights_only=checkpoint and True)
        return model.state_dict(), seen.seen

    whole, batches = run("whole")
    assert batches[:6] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (3, 0)]
    resumed, again = run("resumed", tmp_path / f"whole/step={step}.ckpt")
    assert again == [entry for entry in batches if entry[0] >= step]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_pass_that_ends_with_a_saving_validation_ends_once(tmp_path):
    write_shards(SMALL, tmp_path / "shards", 40, samples_per_shard=20)
    shards = str(tmp_path / "shards")

    def run(name, checkpoint=None):
        seen, saved = (
            Batches(),
            ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, save_on_train_epoch_end=False),
        )
        settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "limit_val_batches": 1}
        trainer = tiny.trainer(
            tmp_path / name, seen, saved, max_steps=50, max_epochs=2, val_check_interval=5, **settings
        )
        data = tiny.data(shards, validation_shards=shards, validation_samples=8)
        trainer.fit(tiny.flow_matching(), data, ckpt_path=checkpoint, weights_only=checkpoint and True)
        return trainer.current_epoch, seen.seen

    epochs, batches = run("whole")
    assert run("resumed", tmp_path / "whole/step=3.ckpt") == (epochs, [each for each in batches if each[0] >= 3])
