from __future__ import annotations

import math

import pytest
import torch

from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.objectives.alpha_flow import AlphaFlow, AlphaSchedule
from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import AdaptiveWeighting, UniformWeighting, Weighting
from tests.flow.gaussian import average_velocity, rms, states, velocity


class Constant(AlphaSchedule):
    def __call__(self, progress: float) -> float:
        return self.start


def alpha_flow(u, z, v, times, alpha: float, weighting: Weighting | None = None, **settings) -> FlowMapTerms:
    objective = AlphaFlow(Constant(start=alpha, end=1.0) if alpha < 1 else AlphaSchedule(), **settings)
    return objective.terms(AverageVelocity(u), z, v, times, weighting or UniformWeighting(), 0.0)


def bias(alpha: float) -> float:
    """Root mean square of the error that the objective sees at the exact u, given the true velocity."""
    z, r, t = states()
    terms = alpha_flow(average_velocity, z, velocity(z, t), Times(r, t, len(t)), alpha)
    return float(terms.squared_error.double().mean().sqrt())


def written_out(alpha: float, *, s_weight: float, v_weight: float, direction: float = 1.0) -> float:
    """The same of the formula itself; right at s_weight = v_weight = alpha and direction = 1."""
    z, r, t = states()
    v = velocity(z, t)
    s = s_weight * r + (1 - s_weight) * t
    z_s = z - direction * (t - s).view(-1, 1, 1, 1) * v
    target = v_weight * v + (1 - v_weight) * average_velocity(z_s, r, s)
    return rms(average_velocity(z, r, t) - target)


def order(error, alpha: float = 0.02) -> float:
    """p, where the error goes as alpha^p."""
    return math.log2(error(2 * alpha) / error(alpha))


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.02])
def test_objective_is_the_formula(alpha: float):
    assert bias(alpha) == pytest.approx(written_out(alpha, s_weight=alpha, v_weight=alpha), rel=1e-3)


def test_bias_at_the_exact_average_velocity_is_of_second_order_in_alpha():
    assert order(bias) == pytest.approx(2, abs=0.1)
    assert bias(0.01) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        lambda alpha: written_out(alpha, s_weight=1 - alpha, v_weight=alpha),  # s at the wrong end
        lambda alpha: written_out(alpha, s_weight=alpha, v_weight=1 - alpha),  # weights swapped
        lambda alpha: written_out(alpha, s_weight=alpha, v_weight=alpha, direction=-1.0),  # a step towards the noise
        lambda alpha: written_out(alpha, s_weight=alpha, v_weight=alpha, direction=0.0),  # z_t for z_s
    ],
)
def test_wrong_formulas_have_a_larger_bias(wrong):
    assert order(wrong) < 1.5
    assert wrong(0.01) > 1e-3


def test_alpha_one_is_flow_matching_on_every_row():
    z, r, t = states()
    v = torch.randn_like(z)
    terms = alpha_flow(average_velocity, z, v, Times(r, t, len(t)), 1.0)
    expected = (average_velocity(z, r, t) - v).square().flatten(1).mean(1)
    assert torch.allclose(terms.squared_error.double(), expected, rtol=1e-5)


def test_alpha_zero_is_meanflow():
    z, r, t = states()
    v, times = torch.randn_like(z), Times(r, t, 40)
    u = AverageVelocity(average_velocity)
    terms = AlphaFlow(AlphaSchedule(end=0.5)).terms(u, z, v, times, AdaptiveWeighting(), 0.7)
    expected = MeanFlow().terms(u, z, v, times, AdaptiveWeighting(), 0.7)
    assert torch.equal(terms.squared_error, expected.squared_error)
    assert torch.equal(terms.derivative_norm, expected.derivative_norm)
    assert terms.derivative_norm.numel() == 40


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_no_derivative_is_taken_while_alpha_is_positive(alpha: float):
    class Refuses(ForwardMode):
        def jvp(self, *args):
            raise AssertionError

    z, r, t = states(8)
    terms = alpha_flow(average_velocity, z, velocity(z, t), Times(r, t, 8), alpha, derivative=Refuses())
    assert terms.derivative_norm.numel() == 0


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_target_is_v_when_r_equals_t(alpha: float):
    z, r, t = states()
    n, v = 20, torch.randn_like(z)
    r = torch.cat([r[:n], t[n:]])
    terms = alpha_flow(average_velocity, z, v, Times(r, t, n), alpha)
    expected = (velocity(z, t) - v).square().flatten(1).mean(1)[n:]
    assert torch.allclose(terms.squared_error[n:].double(), expected, rtol=1e-5)
    assert alpha_flow(average_velocity, z, v, Times(t, t, 0), alpha).loss.isfinite()


def gradient(terms: FlowMapTerms, theta: torch.Tensor) -> float:
    return float(torch.autograd.grad(terms.loss, theta)[0])


@pytest.mark.parametrize("weighting", [UniformWeighting(), AdaptiveWeighting(0.5, 0.1), AdaptiveWeighting(1.0, 0.1)])
def test_gradient_goes_over_into_meanflows_as_alpha_falls(weighting: Weighting):
    """Which the factor on the squared error decides: without it the gradient would go as another power of alpha."""
    z, r, t = states()
    v, times = velocity(z, t), Times(r, t, 40)
    theta = torch.tensor(1.3, dtype=z.dtype, requires_grad=True)

    def u(z, r, t):
        return theta * average_velocity(z, r, t)

    wanted = gradient(MeanFlow().terms(AverageVelocity(u), z, v, times, weighting, 0.0), theta)
    far, near = (abs(gradient(alpha_flow(u, z, v, times, a, weighting), theta) / wanted - 1) for a in (0.02, 0.01))
    assert near < 0.05
    assert far / near == pytest.approx(2, abs=0.3)


def test_gradient_flows_through_u_alone():
    z, r, t = states(8)
    v, alpha = velocity(z, t), 0.4
    theta = torch.tensor(1.2, dtype=z.dtype, requires_grad=True)

    def u(z, r, t):
        return theta * average_velocity(z, r, t)

    s = alpha * r + (1 - alpha) * t
    z_s = z - (t - s).view(-1, 1, 1, 1) * v

    def by_hand(target) -> float:
        error = (u(z, r, t) - target).square().flatten(1).sum(1).mean() / alpha
        return float(torch.autograd.grad(error, theta)[0])

    ours = gradient(alpha_flow(u, z, v, Times(r, t, 8), alpha), theta)
    target = alpha * v + (1 - alpha) * u(z_s, r, s)
    assert ours == pytest.approx(by_hand(target.detach()), rel=1e-4)
    assert ours != pytest.approx(by_hand(target), rel=0.1), "the stop-gradient matters"


def test_bound_cuts_the_targets_of_interval_rows_alone():
    z, r, t = states()
    n, v = 20, torch.full_like(z, 9.0)
    r = torch.cat([r[:n], t[n:]])
    terms = alpha_flow(lambda z, r, t: torch.zeros_like(z), z, v, Times(r, t, n), 0.5, clip_target=2.0)
    assert torch.allclose(terms.squared_error[:n].double(), torch.tensor(4.0, dtype=z.dtype))
    assert torch.allclose(terms.squared_error[n:].double(), torch.tensor(81.0, dtype=z.dtype))


def test_schedule_falls_from_one_to_zero_and_snaps():
    alpha = AlphaSchedule(0.2, 0.6, gamma=25.0, snap=0.02)
    assert [alpha(p) for p in (0.0, 0.2, 0.3, 0.6, 1.0)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert alpha(0.4) == pytest.approx(0.5)
    assert alpha(0.45) == pytest.approx(1 - 1 / (1 + math.exp(-25 * 0.05 / 0.4)))
    assert alpha(0.46) > 0.0
    assert alpha(0.46) == pytest.approx(1 - alpha(0.34))
    values = [alpha(p / 100) for p in range(101)]
    assert values == sorted(values, reverse=True)
    assert [AlphaSchedule(gamma=1.0)(p) for p in (0.0, 1.0)] == [1.0, 0.0]


@pytest.mark.parametrize("settings", [{"start": 0.5, "end": 0.5}, {"end": 1.5}, {"snap": 0.0}])
def test_impossible_schedules_are_refused(settings):
    with pytest.raises(ValueError, match="AlphaSchedule"):
        AlphaSchedule(**settings)
