"""Losses of the auxiliary networks: units, captions and progress."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.modules.scflow import SCFlow
from emf_lightning.networks.discriminator import ConvDiscriminator
from emf_lightning.text.words import WordEncoder
from tests.modules.conftest import Batches
from tests.modules.test_logged_errors import logged


def critic(net):
    return ConvDiscriminator(net, 4, 8)


@pytest.mark.parametrize("kind", [FGM, JointDistillation])
def test_the_online_flows_loss_is_its_mean_squared_error(net, kind):
    """In these units clipping at 1 and Adam's eps are the published ones."""
    model = kind(net)
    found = logged(model)
    model._trainer, model._planned_steps = SimpleNamespace(global_step=0), 1
    loss = model.compute_auxiliary_loss(Batches(1)[0])
    assert float(loss.detach()) == pytest.approx(found["train/online_flow_mse"], rel=1e-5)


@pytest.mark.parametrize(("real_steps", "whose"), [(None, "text"), (1, "sampling")])
def test_the_discriminator_reads_the_captions_of_its_real_images(net, real_steps, whose):
    batch = Batches(1)[0]
    batch = replace(batch, sampling=WordEncoder(width=16, length=4)(["two circles"] * len(batch)))
    objective = JointObjective(matching_weight=LossTerm(0.0), adversarial_weight=LossTerm(1.0), real_steps=real_steps)
    model, seen = JointDistillation(net, objective, critic), []
    logged(model)
    model._trainer, model._planned_steps = SimpleNamespace(global_step=0), 1
    model.auxiliaries["discriminator"].register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    model.compute_auxiliary_loss(batch)
    assert seen and all(torch.equal(context, getattr(batch, whose).context) for context in seen)


@pytest.mark.parametrize("kind", [FGM, JointDistillation, lambda net: SCFlow(net, critic)])
def test_objectives_read_how_far_training_is(net, kind):
    model, seen = kind(net), []
    logged(model)
    model._trainer, model._planned_steps = SimpleNamespace(global_step=3), 4
    objective = model.objective

    def watched(part):
        def called(*args, **options):
            seen.append((options["progress"], options.get("step", 3)))
            return part(*args, **options)

        return called

    class Watched:
        def __getattr__(self, name):
            part = getattr(objective, name)
            return watched(part) if name in ("online_flow_loss", "discriminator_loss") else part

        def __call__(self, *args, **options):
            return watched(objective)(*args, **options)

    model.objective = Watched()
    model.compute_loss(Batches(1)[0])
    model.compute_auxiliary_loss(Batches(1)[0])
    assert seen == [(0.75, 3)] * 2
