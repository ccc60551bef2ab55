"""Checkpoints are whole, finite and of the last step, or an error says what is wrong with them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks import fault_runner
from emf_lightning.callbacks import WeightEMA
from emf_lightning.callbacks.save_last_state import SaveLastState
from emf_lightning.files import write_atomic
from emf_lightning.modules.checkpoint import read_checkpoint
from emf_lightning.modules.checkpoint_files import WholeCheckpointIO, whole_checkpoint
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization
from tests.callbacks import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("shards"))


def checkpointed(folder: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_last=True)


def state(path: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in read_checkpoint(path, "ckpt_path")["state_dict"].items()}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step=3.ckpt, step=6.ckpt and last.ckpt of 7 steps."""
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny.trainer(folder, SaveLastState(), checkpointed(folder, 3), max_steps=7, enable_checkpointing=True)
    trainer.strategy.checkpoint_io = WholeCheckpointIO()
    trainer.fit(tiny.meanflow(), tiny.data(shards))
    return folder


def test_the_last_step_is_in_a_checkpoint_whatever_the_interval(run):
    assert read_checkpoint(run / "last.ckpt", "ckpt_path")["global_step"] == 7
    assert {path.name for path in run.glob("*.ckpt")} == {"step=3.ckpt", "step=6.ckpt", "last.ckpt"}


def test_a_link_to_the_last_checkpoint_is_the_last_state_at_the_end(shards, tmp_path):
    linked = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1, save_last="link")
    trainer = tiny.trainer(tmp_path, SaveLastState(), linked, max_steps=7, enable_checkpointing=True)
    trainer.strategy.checkpoint_io = WholeCheckpointIO()
    trainer.fit(tiny.meanflow(), tiny.data(shards))
    assert read_checkpoint(tmp_path / "last.ckpt", "ckpt_path")["global_step"] == 7
    assert read_checkpoint(tmp_path / "step=6.ckpt", "ckpt_path")["global_step"] == 6
    assert linked.save_last == "link"


def damaged(path: Path, place: Path, seed: int) -> Path:
    """A copy of ``path``, damaged at a place and in a way of ``seed``."""
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    match seed % 4:
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        case 2:
            del data[at:]
        case 3:
            data[at:at] = rng.randbytes(64)
    place.write_bytes(data)
    return place


def test_damage_at_any_place_is_an_error_or_harmless(run, tmp_path):
    want, refused = state(run / "last.ckpt"), 0
    for seed in range(160):
        path = damaged(run / "last.ckpt", tmp_path / "damaged.ckpt", seed)
        try:
            found = state(path)
        except ValueError:
            refused += 1
        else:
            assert found.keys() == want.keys()
            assert all(torch.equal(found[name], want[name]) for name in want)
    assert refused > 80


def test_lightning_resumes_from_no_damaged_file(run, tmp_path):
    data = bytearray((run / "last.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=r"flipped.ckpt: it is damaged: .*; give another checkpoint"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "flipped.ckpt")


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1])
def test_a_torn_last_checkpoint_falls_back_to_the_newest_whole_one(run, tmp_path, size):
    for name in ("step=3.ckpt", "step=6.ckpt", "last.ckpt"):  # in the order of their age
        (tmp_path / name).write_bytes((run / name).read_bytes())
    last = tmp_path / "last.ckpt"
    assert whole_checkpoint(last) == last
    last.write_bytes(last.read_bytes()[:size])
    with pytest.warns(UserWarning, match=r"step=6.ckpt, the newest whole checkpoint beside it, is used"):
        assert whole_checkpoint(last).name == "step=6.ckpt"


def test_a_full_disk_names_the_file_and_keeps_the_one_before(tmp_path):
    path = tmp_path / "last.ckpt"

    def save() -> None:
        WholeCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(2)}}, path)
        write_atomic(tmp_path / "text.txt", "before")
        before = path.read_bytes()
        with pytest.raises(OSError, match=r"last.ckpt"):
            WholeCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.randn(5000)}}, path)
        with pytest.raises(OSError, match=r"text.txt"):
            write_atomic(tmp_path / "text.txt", "x" * 5000)
        assert path.read_bytes() == before

    ending = fault_runner.run(save, tmp_path, file_limit=3000)  # in a process of its own
    assert ending.status == 0, ending.output
    assert (tmp_path / "text.txt").read_text() == "before"
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "text.txt"}


def test_a_partial_file_of_a_killed_run_is_removed_by_the_next_save(tmp_path):
    (tmp_path / ".step=6.ckpt.partial").write_bytes(b"torn")
    WholeCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "step=9.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["step=9.ckpt"]


def test_a_tensor_marked_as_a_folder_is_damage(run, tmp_path):
    # torch reads nothing from such an entry and returns what the memory held
    data = bytearray((run / "last.ckpt").read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 38] |= 0x10
    (tmp_path / "last.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match="is not the content that was saved"):
        read_checkpoint(tmp_path / "last.ckpt", "ckpt_path")


class Breaks(Callback):
    """Makes one weight infinite after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            next(pl_module.parameters()).data.view(-1)[0] = torch.inf


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_not_finite_replace_no_checkpoint(shards, tmp_path, averaged):
    callbacks = [Breaks(4), checkpointed(tmp_path, 3), *([WeightEMA(decay=0.5)] if averaged else [])]
    trainer = tiny.trainer(tmp_path, *callbacks, max_steps=9, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"at step 6 the weights are not finite .* go on from .*\.ckpt with a lower"):
        trainer.fit(tiny.meanflow(), tiny.data(shards))
    for path in tmp_path.glob("*.ckpt"):
        assert all(value.isfinite().all() for value in state(path).values())
    assert read_checkpoint(tmp_path / "last.ckpt", "ckpt_path")["global_step"] == 3


def test_averages_that_have_not_begun_are_the_live_weights(shards, tmp_path):
    callbacks = [WeightEMA(decay=0.9, update_starting_at_step=5), checkpointed(tmp_path, 1)]
    trainer = tiny.trainer(tmp_path, *callbacks, max_steps=8, enable_checkpointing=True)
    trainer.fit(tiny.meanflow(), tiny.data(shards))
    for path in sorted(tmp_path.glob("step=*.ckpt")):
        content = read_checkpoint(path, "ckpt_path")
        live = content["current_model_state"]
        same = all(torch.equal(value, live[name]) for name, value in content["state_dict"].items())
        assert same == (content["global_step"] <= 6)  # the first average is a copy


class Gradients(Callback):
    """Keeps the gradient's norm after each backward pass, and after the step where there was one."""

    def __init__(self) -> None:
        self.after_batch, self.of_step = [], []

    def on_after_backward(self, trainer, pl_module):
        self.after_batch.append(norm(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.of_step.append(norm(pl_module))


def norm(module: FlowMapModule) -> float:
    return sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None) ** 0.5


def test_the_last_step_of_a_pass_has_the_mean_gradient_of_its_batches(shards, tmp_path):
    # 5 batches, 4 a step: the fifth is a step of its own
    gradients = Gradients()
    settings = {"accumulate_grad_batches": 4, "limit_train_batches": 5, "max_epochs": 1, "max_steps": -1}
    module = FlowMapModule(tiny.network(), optimization=Optimization(torch.optim.SGD))
    tiny.trainer(tmp_path, gradients, **settings).fit(module, tiny.data(shards))
    assert len(gradients.after_batch) == 5
    assert gradients.of_step[-2:] == pytest.approx([gradients.after_batch[3], 4 * gradients.after_batch[4]], rel=1e-5)
