"""Every objective trains a tiny network."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer

from emf_lightning.flow.derivative.derivative import FiniteDifference
from emf_lightning.flow.objectives.alpha_flow import AlphaFlowObjective, AlphaSchedule
from emf_lightning.flow.objectives.meanflow import MeanFlowObjective
from emf_lightning.flow.objectives.split_meanflow import SplitMeanFlowObjective
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from emf_lightning.flow.weighting import TransitionWeighting
from emf_lightning.modules.meanflow import MeanFlow
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import DecoupledInterval, SummedInterval
from tests.modules.conftest import TINY

HALF = LogitNormalTimes(interval_share=Schedule(0.5), zero_share=0.25)
OBJECTIVES = {
    "meanflow": {"objective": MeanFlowObjective()},
    "alpha_flow": {"objective": AlphaFlowObjective(AlphaSchedule(0.0, 0.9, gamma=4.0))},
    "split_meanflow": {"objective": SplitMeanFlowObjective()},
    "transition": {"objective": MeanFlowObjective(FiniteDifference(0.005)), "weighting": TransitionWeighting()},
}


def optimizer(params):
    return torch.optim.AdamW(params, lr=1e-3)


def fit(model, loader, folder, **settings) -> Trainer:
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(model, loader)
    return trainer


def moved(before: dict[str, torch.Tensor], net: SanaFlowMap) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_trains_every_weight(tmp_path, net, loader, objective, precision):
    before = copy.deepcopy(net.state_dict())
    model = MeanFlow(net, times=HALF, velocity="teacher", optimizer=optimizer, **OBJECTIVES[objective])
    logged = fit(model, loader, tmp_path, precision=precision).callback_metrics
    assert moved(before, net) == set(before)
    assert logged["train/nan_rows"] == 0
    assert logged["train/mse_r_below_t"] > 0
    assert logged["train/mse_r_equals_t"] > 0


@pytest.mark.parametrize("interval", [SummedInterval(), DecoupledInterval(1)])
def test_a_network_trains_with_every_interval(tmp_path, loader, interval):
    torch.manual_seed(0)
    net = SanaFlowMap(
        TINY, prediction=PredictData(), time_scale=10.0, latent_size=8, context_width=16, interval=interval
    )
    before = copy.deepcopy(net.state_dict())
    logged = fit(MeanFlow(net, times=HALF, optimizer=optimizer), loader, tmp_path).callback_metrics
    assert moved(before, net) == set(before)
    assert logged["train/nan_rows"] == 0


def test_alpha_flow_takes_derivatives_from_the_end_of_its_schedule_on(tmp_path, net, loader):
    steps = []

    class Watched(MeanFlow):
        def log_terms(self, terms):
            steps.append(len(terms.derivative_norm))
            super().log_terms(terms)

    objective = AlphaFlowObjective(AlphaSchedule(0.0, 0.5))
    fit(Watched(net, objective=objective, times=HALF, optimizer=optimizer), loader, tmp_path)
    assert steps == [0, 0, 4]
