"""What a wrong sign, a swapped argument or a lost term of an objective would change."""

from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.base import LossTerm
from emf_lightning.flow.objectives.distribution_matching import DMD, AlphaMatching, DistributionMatching, ExactMatching
from emf_lightning.flow.objectives.joint import JointObjective
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.self_corrected import SelfCorrectedFlow
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from emf_lightning.flow.weighting import UniformWeighting


def to_point(point: float):
    """The flow of data that are one point."""
    return lambda z, r, t: (z - point) / t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("shift", [-0.3, 0.2])
def test_both_terms_pull_samples_towards_the_real_ones_and_add_up(shift):
    """Real samples are 0, the network's are -shift."""

    def pull(matching: float, adversarial: float) -> float:
        torch.manual_seed(0)
        s = torch.tensor(shift, requires_grad=True)
        terms = JointObjective(matching_weight=LossTerm(matching), adversarial_weight=LossTerm(adversarial))(
            lambda z, r, t: z + s,
            torch.zeros(64, 1, 2, 2),
            teacher=to_point(0.0),
            online_flow=to_point(-shift),
            discriminator=lambda z, t: -z.square().flatten(1).sum(1),
        )
        return float(torch.autograd.grad(terms.loss - terms.regression.loss, s)[0]) * shift

    matching, adversarial, both = pull(1.0, 0.0), pull(0.0, 1.0), pull(1.0, 1.0)
    assert matching > 0 and adversarial > 0, "descent takes the shift to 0"
    assert both == pytest.approx(matching + adversarial, rel=0.2)


@pytest.mark.parametrize("loss", [DMD(), ExactMatching(), AlphaMatching(1.0)])
def test_descent_takes_samples_from_the_online_flows_point_to_the_teachers(loss):
    x = torch.zeros(64, 1, 2, 2, requires_grad=True)
    terms = DistributionMatching(loss=loss).matching_loss(x, teacher=to_point(1.0), online_flow=to_point(0.0))
    assert (torch.autograd.grad(terms.loss, x)[0] < 0).all()


def test_scflows_loss_is_the_weighted_sum_of_its_terms():
    x, flow = torch.full((16, 1, 2, 2), 0.5), to_point(0.5)
    weights = {"consistency": 1.0, "backward": 0.2, "alignment": 0.3, "adversarial": 0.5}
    objective = SelfCorrectedFlow(**{name: LossTerm(w) for name, w in weights.items() if name != "consistency"})

    def terms(student=flow, target=flow, logit: float = 0.0):
        flows = {"teacher": flow, "target": target, "discriminator": lambda z, t: z.new_full((len(z),), logit)}
        return objective(student, x, **flows)

    found = terms(lambda z, r, t: 1.1 * flow(z, r, t))
    assert all(value > 0 for value in found.metrics.values())
    assert found.loss.item() == pytest.approx(sum(w * found.metrics[name].item() for name, w in weights.items()))
    assert terms(logit=5.0).metrics["adversarial"] < 0.01 < 1 < terms(logit=-5.0).metrics["adversarial"]
    assert terms().metrics["consistency"] < 1e-6 and terms().metrics["alignment"] < 1e-6
    assert terms(target=to_point(0.0)).metrics["consistency"] > 0.1, "the moving average's own X is the target"


def test_scflows_discriminator_is_to_tell_data_from_samples():
    data = torch.full((16, 1, 2, 2), 5.0)
    terms = SelfCorrectedFlow(r1=0.0).discriminator_loss(
        to_point(0.0), data, discriminator=lambda z, t: z.mean((1, 2, 3)) - 2.5
    )
    assert terms.accuracy == 1


def test_guidance_in_the_target_leads_away_from_the_null_caption_and_spares_dropped_samples():
    """Captions are points of data: guidance 2 of the one at 1 against the one at 0 is the flow to the point 2."""

    def flow(z, r, t, c):
        return (z - c) / t[:, None]

    objective = MeanFlow(
        times=LogitNormalTimes(flow_matching_ratio=Schedule(1.0)),
        weighting=UniformWeighting(),
        velocity=TeacherVelocity(flow),
        guidance=TargetGuidance(scale=2.0),
    )
    dropped = torch.arange(8) < 3
    terms = objective(
        lambda z, r, t, c: flow(z, r, t, torch.where(dropped[:, None], c, 2 * c)),
        torch.randn(8, 3),
        torch.ones(8, 3),
        null_context=torch.zeros(1, 3),
        dropped=dropped,
    )
    assert terms.squared_error.max() < 1e-6
