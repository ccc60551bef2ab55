from __future__ import annotations

import time

import pytest
import torch
from lightning.pytorch import Callback

from emf_lightning.callbacks import FewStepSampling, TrainingLog
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from tests.callbacks import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


class Gradients(Callback):
    """The norm of the clipped gradient at each optimiser step."""

    def __init__(self) -> None:
        self.clipped: list[float] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        if norms:
            self.clipped.append(float(torch.stack(norms).norm()))


def test_gradient_norm_is_the_one_before_clipping(shards, tmp_path):
    run, seen = tmp_path / "run", Gradients()
    trainer = tiny.trainer(run, TrainingLog(), seen, gradient_clip_val=1e-3)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards))

    logged = [event.value for event in tiny.events(run).Scalars("train/gradient_norm")]
    assert len(logged) == 4
    assert seen.clipped
    assert max(seen.clipped) <= 1.01e-3 < 0.01 < min(logged)


class Clock:
    """A clock that goes on only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_leaves_sampling_out_and_counts_accumulated_batches(shards, tmp_path, monkeypatch):
    clock = Clock()

    class Slow(FewStepSampling):
        def _publish(self, *_):
            clock.now += 50.0

    class Paced(Callback):
        def on_train_batch_start(self, *_):
            clock.now += 0.25

    suite = ShapesSuite(per_task=2, scenes_per_task=1)
    sampling = Slow(suite, steps=[1], every_n_steps=1, images_per_task=1, final_images_per_task=1)
    data, run = tiny.data(shards), tmp_path / "run"
    trainer = tiny.trainer(run, TrainingLog(), sampling, Paced(), accumulate_grad_batches=2, max_steps=3)
    monkeypatch.setattr(time, "perf_counter", clock)
    trainer.fit(tiny.meanflow(), datamodule=data)
    monkeypatch.undo()

    found = tiny.events(run)
    assert sampling.seconds == 4 * 50, "not sampled at 0, 1, 2 and 3"
    assert [event.value for event in found.Scalars("train/step_seconds")] == pytest.approx([0.5] * 3)
    assert [event.value for event in found.Scalars("train/images_per_second")] == pytest.approx([2 * 8 / 0.5] * 3)


def test_skipped_samples_and_the_cache_are_counted(tmp_path):
    folder = tiny.shards(tmp_path / "shards")
    shard = folder / "shapes-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512:520] = b"no image"  # the first bytes of the first image
    shard.write_bytes(bytes(content))
    data = tiny.data(folder, cache=FeatureCache(tmp_path / "cache", max_gb=0.001))
    trainer = tiny.trainer(tmp_path / "run", TrainingLog(), max_steps=6)
    trainer.fit(tiny.meanflow(), datamodule=data)

    found = tiny.events(tmp_path / "run")
    last = {tag: found.Scalars(f"train/{tag}")[-1].value for tag in ("skipped_samples", "cache_hits", "cache_misses")}
    assert last["skipped_samples"] == 1 == sum(data.skipped.values())
    assert [found.Scalars(f"train/skipped/{reason}")[-1].value for reason in data.skipped] == [1]
    assert last["cache_hits"] == data.cache.hits > 0
    assert last["cache_misses"] == data.cache.misses > 0


def test_speed_leaves_validation_out(tmp_path, monkeypatch):
    clock, run = Clock(), tmp_path / "run"

    class Paced(Callback):
        def on_train_batch_start(self, *_):
            clock.now += 0.25

        def on_validation_batch_start(self, *_):
            clock.now += 50.0

    shards = tiny.shards(tmp_path / "shards")
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=8)
    trainer = tiny.trainer(run, TrainingLog(), Paced(), max_steps=3, val_check_interval=1, num_sanity_val_steps=0)
    monkeypatch.setattr(time, "perf_counter", clock)
    trainer.fit(tiny.meanflow(), datamodule=data)
    monkeypatch.undo()
    assert clock.now > 50
    assert [event.value for event in tiny.events(run).Scalars("train/step_seconds")] == pytest.approx([0.25] * 3)
