"""A run and an export build an objective's sampler again from its class and fields."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.sampling import FlowMapSampler, Sampler
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.part_classes import spec_of


class Shifted(FlowMapSampler):
    def __init__(self, power: float = 1.0) -> None:
        self.power = power


class Bare(Sampler):
    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, u, noise, steps, step_end=None):
        return noise


@dataclass(frozen=True)
class Powered(FlowMapSampler):
    power: float = 1.0


class Settingless(Sampler):
    def __call__(self, u, noise, steps, step_end=None):
        return noise


@pytest.mark.parametrize("sampler", [Shifted(4.0), Bare(4.0)])
def test_settings_that_no_run_could_read_off_are_refused_before_training(net, sampler):
    objective = MeanFlow()
    objective.sampler = sampler

    with pytest.raises(
        ValueError, match=f"{type(sampler).__name__} has a constructor of its own, .*make it a dataclass"
    ):
        FlowMapModule(net, objective)


@pytest.mark.parametrize(("sampler", "arguments"), [(Powered(4.0), {"power": 4.0}), (Settingless(), {})])
def test_fields_are_the_settings(net, sampler, arguments):
    objective = MeanFlow()
    objective.sampler = sampler

    FlowMapModule(net, objective)
    path = f"{__name__}.{type(sampler).__name__}"
    assert spec_of(sampler) == {"class_path": path, "init_args": arguments}
