"""Training of adapters: what changes, what averages and checkpoints hold, and resuming to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from emf_lightning.callbacks import SaveNetwork, WeightEMA
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.modules.scflow import SCFlow
from emf_lightning.networks.adapter import Adapter
from emf_lightning.networks.discriminator import ConvDiscriminator
from tests.adapters import adapted, built, parent, same
from tests.modules.conftest import Batches
from tests.modules.test_modules import trainer

MODULES: dict[str, Any] = {
    "MeanFlow": lambda net: FlowMapModule(net, MeanFlow()),
    "teacher": lambda net: FlowMapModule(net, MeanFlow(velocity=TeacherVelocity())),
    "FGM": FGM,
    "joint": lambda net: JointDistillation(net, JointObjective()),
    "SCFlow": lambda net: SCFlow(net, lambda net: ConvDiscriminator(net, channels=4, max_channels=8)),
}
modules = pytest.mark.parametrize("name", MODULES)


class FourChannels(Batches):
    """Batches of latents with four channels."""

    def __getitem__(self, index: int) -> Any:
        batch = super().__getitem__(index)
        return replace(batch, latents=torch.cat([batch.latents, batch.latents[:, :1]], dim=1))


@pytest.fixture
def loader() -> DataLoader:
    return DataLoader(FourChannels(1), batch_size=None)  # a resumed run has the same batches, too


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parent("SANA", tmp_path / "parent")
    return tmp_path / "parent"


def start(name: str, folder: Path, **settings: Any) -> FlowMapModule:
    return MODULES[name](adapted("SANA", folder, **settings).train())


def fit(
    module: FlowMapModule, loader: DataLoader, run: Path, steps: int, average: Any, path: Path | None = None
) -> Any:
    saving = ModelCheckpoint(run, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    done = trainer(run, callbacks=[average, saving], max_steps=steps, enable_checkpointing=True)
    done.fit(module, loader, ckpt_path=path)
    return done


@modules
def test_a_resumed_run_ends_in_the_same_bits_and_its_checkpoint_holds_what_trains_alone(tmp_path, folder, loader, name):
    whole = start(name, folder)
    before = {each: value.clone() for each, value in whole.net.state_dict().items()}
    average = WeightEMA(decay=0.5)
    fit(whole, loader, tmp_path / "whole", 4, average)
    still = {each for each, value in whole.net.state_dict().items() if torch.equal(value, before[each])}
    assert whole.net.parent_weights <= still, "the parent's weights stay"
    assert any(each not in still for each in before if ".lora_B." in each)

    saved = torch.load(tmp_path / "whole/last.ckpt", weights_only=True)
    networks = {"net": whole.net} | ({"online_flow": whole.net} if name == "FGM" else {})
    networks |= {"auxiliaries.online_flow": whole.net} if name == "joint" else {}
    expected = {
        f"{place}.{each}" for place, net in networks.items() for each in net.state_dict().keys() - net.parent_weights
    }
    for state in ("state_dict", "current_model_state"):
        assert {each for each in saved[state] if not each.startswith("discriminator.")} == expected
    assert not saved.get("target", {}).keys() & whole.net.parent_weights
    assert saved["parent"] == str(folder) and saved["flow_map"]["adapter"].startswith("Adapter(alpha=6.0, rank=4")

    resumed, other = start(name, folder), WeightEMA(decay=0.5)
    fit(resumed, loader, tmp_path / "resumed", 4, other, tmp_path / "whole/step=2.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(other._average_model.state_dict(), average._average_model.state_dict())
    if name == "SCFlow":
        assert same(resumed.target.net.state_dict(), whole.target.net.state_dict())


@pytest.mark.parametrize("average", [WeightEMA, EMAWeightAveraging])
def test_averages_are_of_what_trains(tmp_path, folder, loader, average):
    module, averaging = start("MeanFlow", folder), average(decay=0.5)
    live: list[dict[str, torch.Tensor]] = []

    class Record(SaveNetwork):
        def on_train_batch_end(self, trainer, pl_module, *args):
            live.append({name: value.detach().clone() for name, value in pl_module.net.named_parameters()})

        def on_train_end(self, trainer, pl_module):
            averages.update(averaging._average_model.module.net.named_parameters())

    averages: dict[str, torch.Tensor] = {}
    trainer(tmp_path, callbacks=[Record(), averaging], max_steps=3).fit(module, loader)
    expected = dict(live[0])
    for state in live[1:]:
        expected = {name: expected[name].lerp(value, 0.5) for name, value in state.items()}
    for name, value in expected.items():
        torch.testing.assert_close(averages[name], value, rtol=1e-6, atol=1e-8)
    shared = {name for name, value in module.net.named_parameters() if averages[name] is value}
    assert shared == (module.net.parent_weights & averages.keys() if average is WeightEMA else set())


@pytest.mark.parametrize("name", ["teacher", "FGM", "joint", "SCFlow"])
def test_teachers_and_online_flows_have_the_parents_weights_in_common(folder, name):
    module = start(name, folder)
    copies = [getattr(module, "teacher", None) or module.objective.velocity.teacher, getattr(module, "target", None)]
    copies = [each.net for each in copies if each is not None]
    copies += [module.online_flow] if name == "FGM" else []
    copies += [module.auxiliaries["online_flow"]] if name == "joint" else []
    ours = dict(module.net.named_parameters())
    for copied in copies:
        theirs = dict(copied.named_parameters())
        assert {each for each in ours if ours[each] is theirs[each]} == module.net.parent_weights & ours.keys()


def test_weights_of_a_checkpoint_start_a_run(tmp_path, folder, loader):
    first = start("MeanFlow", folder)
    fit(first, loader, tmp_path, 2, WeightEMA(decay=0.0))
    second = FlowMapModule(adapted("SANA", folder), init_from=str(tmp_path / "last.ckpt"))
    assert same(second.net.state_dict(), first.net.state_dict())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"adapter": Adapter(8, alpha=6.0)},
            r"its adapter is Adapter\(alpha=6\.0, rank=4, .*, not Adapter\(alpha=6\.0, rank=8",
        ),
        ({"adapter": None}, r"its adapter is Adapter\(alpha=6\.0, rank=4, target_modules=None\), not none"),
        ({"pretrained": "another"}, "its parent_fingerprint is"),
    ],
)
@pytest.mark.parametrize("way", ["init_from", "ckpt_path"])
def test_a_checkpoint_of_another_network_is_refused_in_a_sentence(tmp_path, folder, loader, other, said, way):
    fit(start("MeanFlow", folder), loader, tmp_path / "run", 2, WeightEMA())
    if "pretrained" in other:
        built("SANA").save_pretrained(tmp_path / "another")
        other = {"pretrained": str(tmp_path / "another")}
    net = adapted("SANA", folder, **other)
    path = tmp_path / "run/last.ckpt"
    go_on = {
        "init_from": lambda: FlowMapModule(net, init_from=str(path)),
        "ckpt_path": lambda: fit(FlowMapModule(net), loader, tmp_path / "again", 4, WeightEMA(), path),
    }
    with pytest.raises(ValueError, match=said) as refused:
        go_on[way]()
    assert "\n" not in str(refused.value)


def test_a_whole_networks_checkpoint_is_refused_by_adapters(tmp_path, folder, loader):
    fit(FlowMapModule(built("SANA", pretrained=str(folder))), loader, tmp_path / "run", 2, WeightEMA())
    with pytest.raises(ValueError, match="its adapter is none, not Adapter"):
        FlowMapModule(adapted("SANA", folder), init_from=str(tmp_path / "run/last.ckpt"))


def test_a_saved_network_goes_on_and_cannot_be_refitted(tmp_path, folder, loader):
    module = start("MeanFlow", folder)
    trainer(tmp_path / "run", callbacks=[SaveNetwork()], max_steps=2).fit(module, loader)
    (saved,) = (tmp_path / "run").rglob("network")
    again = built("SANA", pretrained=str(saved))
    assert same(again.state_dict(), module.net.state_dict())
    assert sum(weight.requires_grad for weight in again.parameters()) == sum(
        w.requires_grad for w in module.net.parameters()
    )
    with pytest.raises(ValueError, match="under adapters the time embedding is the parent's; leave it out"):
        trainer(tmp_path / "run", callbacks=[SaveNetwork(time_scale=1.0)], max_steps=2).fit(module, loader)
