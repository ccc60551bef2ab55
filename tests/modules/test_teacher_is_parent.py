"""A teacher is a copy of the network as training starts: it has to be the parent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval, DecoupledInterval, SummedInterval
from emf_lightning.networks.unet import UNetFlowMap
from tests.networks.test_sana import adapted, stock_parent

TEACHER = "The teacher is a copy of the network as training starts, and this network does not start as its parent"
CHANGED = [
    {"interval": SummedInterval()},
    {"finetuning": Finetuning(reset_time=0.02)},
    {"finetuning": Finetuning(reset_text_projection=True)},
]


@pytest.mark.parametrize("changes", CHANGED)
def test_a_network_that_is_not_its_parent_gives_no_teacher(tmp_path: Path, changes: dict) -> None:
    stock_parent(tmp_path)
    net = adapted(tmp_path, **changes)

    with pytest.raises(ValueError, match=TEACHER):
        FlowMapModule(net, MeanFlow(velocity=TeacherVelocity()))
    with pytest.raises(ValueError, match=TEACHER):
        FGM(net)
    with pytest.raises(ValueError, match=TEACHER):
        JointDistillation(net)
    FlowMapModule(net, MeanFlow())
    FlowMapModule(net, MeanFlow(velocity=TeacherVelocity(lambda z, r, t: z)))


@pytest.mark.parametrize("interval", [AnchoredInterval(), DecoupledInterval(1)])
def test_rules_that_keep_the_parent_give_one(tmp_path: Path, interval) -> None:
    stock_parent(tmp_path)

    assert FGM(adapted(tmp_path, interval=interval)).teacher.net is not None


def test_weights_that_were_trained_with_the_plain_sum_give_a_teacher(tmp_path: Path) -> None:
    stock_parent(tmp_path)
    adapted(tmp_path, interval=SummedInterval()).save_pretrained(tmp_path / "trained")

    FGM(adapted(tmp_path, "trained", interval=SummedInterval()))


def test_a_checkpoint_that_training_starts_from_gives_a_teacher(tmp_path: Path) -> None:
    stock_parent(tmp_path)
    net = adapted(tmp_path, interval=SummedInterval())
    torch.save({"state_dict": FlowMapModule(net).state_dict()}, tmp_path / "trained.ckpt")

    FGM(adapted(tmp_path, interval=SummedInterval()), init_from=str(tmp_path / "trained.ckpt"))


def test_other_backbones_say_so_too(tmp_path: Path) -> None:
    size = {"latent_size": 8, "context_width": 16}
    UNetFlowMap(**size).save_pretrained(tmp_path)

    assert UNetFlowMap(pretrained=str(tmp_path), interval=AnchoredInterval(), **size).is_parent
    assert not UNetFlowMap(pretrained=str(tmp_path), interval=SummedInterval(), **size).is_parent


def test_a_network_from_scratch_is_its_own_parent() -> None:
    assert SanaFlowMap(interval=SummedInterval()).is_parent
