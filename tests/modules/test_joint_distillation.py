"""The joint training as Lightning runs it; its mathematics is in tests/flow/objectives/test_joint.py."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.distribution_matching import DMD, DistributionMatching, ExactMatching
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.modules.alternating import Alternation
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.modules.optimization import Optimization, WarmupCosine
from emf_lightning.networks.discriminator import ConvDiscriminator
from emf_lightning.networks.feature_discriminator import FeatureDiscriminator
from tests.callbacks import tiny
from tests.modules.conftest import Batches
from tests.modules.test_fgm import adam, same, weights
from tests.modules.test_modules import trainer

HEADS = partial(FeatureDiscriminator, blocks=[0], width=8)
BOTH = {"matching_weight": LossTerm(2.0), "adversarial_weight": LossTerm(0.5)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("settings", "discriminator", "parts"),
    [
        ({"matching": DistributionMatching(loss=DMD(project=True), teacher_guidance_scale=1.5)}, None, {"online_flow"}),
        ({"matching": DistributionMatching(loss=ExactMatching()), "rollout_steps": (1, 2)}, None, {"online_flow"}),
        ({**BOTH}, HEADS, {"online_flow", "discriminator"}),
        (
            {"matching_weight": LossTerm(0.0), "adversarial_weight": LossTerm(1.0), "r1": 0.1, "real_steps": 2},
            partial(ConvDiscriminator, channels=4, max_channels=8),
            {"discriminator"},
        ),
    ],
)
def test_all_networks_learn_and_the_teacher_stays_bit_for_bit(
    tmp_path, net, loader, precision, settings, discriminator, parts
):
    start = weights(net)
    objective = JointObjective(regression=MeanFlow(velocity=TeacherVelocity()), **settings)
    model = JointDistillation(net, objective, discriminator, optimization=Optimization(adam))
    before = weights(model.auxiliaries)
    fit = trainer(tmp_path, precision=precision, max_steps=3)
    fit.fit(model, loader)
    assert set(model.auxiliaries) == parts
    assert same(weights(model.teacher.net), start)
    assert objective.velocity.teacher is model.teacher
    assert not same(weights(net), start)
    for part in parts:
        after = weights(model.auxiliaries)
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part))
    logged = fit.callback_metrics
    assert logged["train/nan_rows"] == 0
    assert logged["train/regression_gradient"] > 0
    if "online_flow" in parts:
        assert logged["train/velocity_gap"] > 0
        assert logged["train/sample_std"] > 0
    if "discriminator" in parts:
        assert 0 <= logged["train/discriminator_accuracy"] <= 1
    fit.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"net", "auxiliaries"}
    assert not any("backbone" in name for name in saved), "the teacher's features are no part of a checkpoint"


def test_only_the_student_starts_from_the_checkpoint(tmp_path, net, loader):
    further = FlowMapModule(copy.deepcopy(net), MeanFlow(), optimization=Optimization(adam))
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(further, loader)
    fit.save_checkpoint(tmp_path / "student.ckpt")
    start = weights(net)
    model = JointDistillation(net, init_from=str(tmp_path / "student.ckpt"))
    assert same(weights(model.net), weights(further.net))
    assert same(weights(model.teacher.net), start)
    assert same(weights(model.auxiliaries["online_flow"]), start)


def test_the_auxiliary_networks_rest_until_a_term_counts(tmp_path, net, loader):
    objective = JointObjective(matching_weight=LossTerm(2.0, start=2))
    alternation = Alternation(auxiliary_updates=3)
    model = JointDistillation(net, objective, optimization=Optimization(adam), alternation=alternation)
    trainer(tmp_path, max_steps=4).fit(model, loader)
    assert model.auxiliary_steps == 6


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    tiny.shards(tmp_path / "shards")

    def run(name: str, **resumed) -> dict:
        model = JointDistillation(
            tiny.network(),
            JointObjective(regression=MeanFlow(velocity=TeacherVelocity()), rollout_steps=(1, 2), **BOTH),
            HEADS,
            optimization=Optimization(adam, lambda optimizer: WarmupCosine(optimizer, total=6, warmup=1)),
            alternation=Alternation(auxiliary_updates=2),
        )
        saver = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=3, save_top_k=-1)
        averages = EMAWeightAveraging(decay=0.5)
        fit = tiny.trainer(tmp_path / f"run-{name}", averages, saver, max_steps=6, enable_checkpointing=True)
        fit.fit(model, datamodule=tiny.data(tmp_path / "shards"), **resumed)
        return torch.load(tmp_path / name / "step=6.ckpt", weights_only=True)

    expected = run("whole")
    found = run("resumed", ckpt_path=tmp_path / "whole/step=3.ckpt")
    for kind in ("state_dict", "current_model_state"):
        assert same(found[kind], expected[kind])
    for one, other in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        for number, state in other["state"].items():
            assert same(one["state"][number], state)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adversarial_weight": LossTerm(1.0)}, "set model.init_args.discriminator"),
        ({"matching_weight": LossTerm(0.0)}, "take FlowMapModule"),
    ],
)
def test_impossible_settings_are_refused(net, settings, said):
    with pytest.raises(ValueError, match=said):
        JointDistillation(net, JointObjective(**settings))


def test_a_penalty_on_features_that_are_computed_twice_is_refused(net):
    net.enable_gradient_checkpointing()
    objective = JointObjective(adversarial_weight=LossTerm(1.0), r1=1.0)
    with pytest.raises(ValueError, match=r"r1: its second derivative .* set r1 to 0"):
        JointDistillation(net, objective, discriminator=partial(FeatureDiscriminator, blocks=[0]))


def test_the_discriminator_s_loss_is_not_in_bf16(net):
    kinds = []

    def discriminator(z, t, context, mask):
        kinds.append((z.mean(dim=1) @ z.mean(dim=1)).dtype)
        return z.flatten(1).sum(1)

    batch = Batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        JointObjective(adversarial_weight=LossTerm(1.0), r1=1.0).discriminator_loss(
            net, batch.latents, batch.text.conditioning, teacher=net, discriminator=discriminator
        )
    assert kinds == [torch.float32] * 2


@pytest.mark.parametrize("blocks", [[], [1], [0, 0], [-1]])
def test_blocks_that_are_not_there_are_refused(net, blocks):
    with pytest.raises(ValueError, match="blocks must be some of 0 to 0"):
        FeatureDiscriminator(net, blocks)
