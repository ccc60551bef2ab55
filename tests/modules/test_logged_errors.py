"""What modules log, and the random numbers and captions of a step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.times import Times
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import VALIDATION_TIMES, FlowMapModule
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.text.words import WordEncoder
from tests.modules.conftest import Batches


def logged(model) -> dict:
    found = {}
    model.log = lambda name, value, **_: found.update({name: float(value)})
    return found


def test_the_validation_error_is_zero_at_the_flow_of_the_data_alone(net):
    batch = Batches(1)[0]
    for point, error in ((batch.latents, 0.0), (batch.latents + 1, 1.0)):
        model = FlowMapModule(net)
        model.average_velocity = lambda text, x=point: lambda z, r, t: (z - x) / t.view(-1, 1, 1, 1)
        found = logged(model)
        model.validation_step(batch, 7)
        assert found == {
            f"validation/mse_v_at_{time}": pytest.approx(error / time**2, rel=1e-4, abs=1e-6)
            for time in VALIDATION_TIMES
        }


def test_validation_compares_the_online_flow_with_the_teacher(net):
    model = FGM(net)
    found = logged(model)
    with torch.no_grad():
        model.validation_step(Batches(1)[0], 0)
        assert set(found.values()) == {0.0}, "both start as the teacher"
        model.online_flow.transformer.proj_out.bias += 1  # x-prediction: u moves by 1 / t
        model.validation_step(Batches(1)[0], 0)
    assert found == {f"validation/velocity_gap_at_{t}": pytest.approx(1 / t**2, rel=1e-4) for t in VALIDATION_TIMES}


def test_logged_errors_are_means_over_finite_samples(net):
    model, t = FlowMapModule(net), torch.ones(5)
    found = logged(model)
    errors = torch.tensor([1.0, 3.0, 4.0, torch.nan, 8.0])
    model.log_terms(FlowMapTerms(t.sum(), errors, errors.isfinite(), t, torch.zeros(0), Times(0 * t, t, 2)))
    assert found == {"train/nan_rows": 1, "train/mse_r_below_t": 2, "train/mse_r_equals_t": 6}


def test_random_numbers_are_of_the_rank_the_step_and_the_part_of_it(net):
    model = FlowMapModule(net)

    def drawn(rank: int = 0, step: int = 0, batch: int = 0) -> float:
        model._trainer = SimpleNamespace(accumulate_grad_batches=2, global_rank=rank, global_step=step)
        model.on_train_batch_start(None, batch)
        return float(torch.rand(()))

    others = [drawn(), drawn(rank=1), drawn(step=1), drawn(batch=1)]
    assert len(set(others)) == 4 and drawn(batch=2) == others[0]


def test_the_online_flow_learns_samples_of_the_captions_that_the_network_draws(net):
    batch = Batches(1)[0]
    batch = replace(batch, sampling=WordEncoder(width=16, length=4)(["two circles"] * len(batch)))
    model, seen = JointDistillation(net), []
    logged(model)
    model._trainer, model._planned_steps = SimpleNamespace(global_step=0), 1
    model.auxiliaries["online_flow"].register_forward_pre_hook(lambda _, given: seen.append(given[3]))
    model.compute_auxiliary_loss(batch)
    assert all(torch.equal(context, batch.sampling.context) for context in seen) and seen
