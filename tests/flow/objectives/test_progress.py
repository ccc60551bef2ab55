"""Every objective reads its schedules at the progress of training that it is given."""

from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.cmt import CMT
from emf_lightning.flow.objectives.distribution_matching import DistributionMatching
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching
from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.self_corrected import SelfCorrectedFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import Schedule, UniformTimes


class Spy(UniformTimes):
    def __init__(self, ratio=1.0):
        super().__init__(Schedule(ratio))
        self.seen = []

    def __call__(self, batch, progress, device):
        self.seen.append(progress)
        return super().__call__(batch, progress, device)


SCALE = torch.ones((), requires_grad=True)


def flow(z, r, t):
    return SCALE * z


def heads(z, r, t, *context, conditions=None):
    return torch.cat([z, z], 1)


def critic(z, t):
    return z.flatten(1).sum(1)


def improved(x, spy, p):
    ImprovedMeanFlow(times=spy)(heads, x, null_context=torch.zeros(1), context=torch.zeros(len(x)), progress=p)


def cmt(x, spy, p):
    CMT(share=1.0, velocity=TeacherVelocity(flow), times=spy)(flow, x, progress=p)


def fgm(x, spy, p):
    FlowGeneratorMatching(times=spy)(flow, x, teacher=flow, online_flow=flow, progress=p)


def fgm_online(x, spy, p):
    FlowGeneratorMatching(times=spy).online_flow_loss(flow, x, online_flow=flow, progress=p)


def scflow(x, spy, p):
    SelfCorrectedFlow(times=spy)(flow, x, teacher=flow, target=flow, discriminator=critic, progress=p)


def scflow_critic(x, spy, p):
    objective = SelfCorrectedFlow(discriminator_times=spy)
    objective.discriminator_loss(flow, x, discriminator=critic, progress=p)


def joint(x, spy, p):
    objective = JointObjective(
        regression=MeanFlow(times=spy), matching=DistributionMatching(), adversarial_weight=LossTerm(1.0)
    )
    objective(flow, x, teacher=flow, online_flow=lambda z, r, t: 2 * z, discriminator=critic, progress=p)


def joint_matching(x, spy, p):
    objective = JointObjective(matching=DistributionMatching(times=spy))
    objective(flow, x, teacher=flow, online_flow=lambda z, r, t: 2 * z, progress=p)


def joint_critic(x, spy, p):
    objective = JointObjective(discriminator_times=spy, adversarial_weight=LossTerm(1.0))
    objective.discriminator_loss(flow, x, teacher=flow, discriminator=critic, progress=p)


@pytest.mark.parametrize(
    "case", [improved, cmt, fgm, fgm_online, scflow, scflow_critic, joint, joint_matching, joint_critic]
)
def test_schedules_of_times_follow_training_in_every_objective(case):
    spy = Spy(0.5 if case in (improved, cmt, joint) else 1.0)
    case(torch.randn(8, 2, 2, 2), spy, 0.7)
    assert spy.seen and set(spy.seen) == {0.7}
