from __future__ import annotations

import math

import pytest
import torch

from emf_lightning.flow.derivative.finite_difference import FiniteDifference
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import AdaptiveWeighting, AnyStepWeighting, TransitionWeighting, UniformWeighting
from tests.flow.gaussian import average_velocity, states, velocity


def test_a_negative_power_learns_as_the_higher_order_loss_does():
    """The gradient of (|D|^2)^2 is twice that of sg(|D|^2) |D|^2."""
    error = torch.randn(4, 6, requires_grad=True)
    times = Times(torch.zeros(4), torch.ones(4), n_interval=4)
    (gradient,) = torch.autograd.grad(AdaptiveWeighting(p=-1.0, c=1e-9)(error.square().sum(1), times).sum(), error)
    (expected,) = torch.autograd.grad((error.square().sum(1) ** 2).sum() / 2, error)
    assert torch.allclose(gradient, expected, rtol=1e-5)


def test_transition_weighting_is_the_formula_and_spares_rows_with_r_equal_t():
    r, t = torch.tensor([0.0, 0.2, 0.7]), torch.tensor([1.0, 0.5, 0.7])
    losses = TransitionWeighting(0.25, p=0.5, c=0.1)(torch.tensor([3.0, 5.0, 7.0]), Times(r, t, 2))
    expected = [
        (math.tan(1.0) + 0.25) ** -0.5 * 3 / 3.1**0.5,
        (math.tan(0.5) - math.tan(0.2) + 0.25) ** -0.5 * 5 / 5.1**0.5,
        7 / 7.1**0.5,
    ]
    assert torch.allclose(losses, torch.tensor(expected))


def test_transition_weighting_is_bounded_up_to_the_noise_and_continuous_at_r_equals_t():
    t = torch.linspace(0, 1, 100)
    ones = torch.ones(100)
    longest = TransitionWeighting(c=1e-9)(ones, Times(torch.zeros(100), t, 100))
    assert (longest <= 1).all()
    assert longest.min() > 0.62
    shortest = TransitionWeighting(c=1e-9)(ones, Times(t - 1e-6, t, 100))
    assert torch.allclose(shortest, ones, atol=1e-4)


def test_transition_weight_carries_no_gradient():
    error = torch.tensor([2.0], requires_grad=True)
    half = torch.tensor([0.5])
    loss = TransitionWeighting(c=0.5)(error, Times(half, half, 0))
    assert torch.autograd.grad(loss.sum(), error)[0].item() == pytest.approx(1 / 2.5)


@pytest.mark.parametrize(("step", "bound"), [(0.005, 1e-3), (0.0025, 3e-4)])
def test_transition_models_error_at_the_exact_average_velocity_is_that_of_the_difference(step: float, bound: float):
    z, r, t = states()
    inside = t > 0.1  # near the data the exact u bends within a step
    z, r, t = z[inside], r[inside], t[inside]
    objective = MeanFlow(derivative=FiniteDifference(step))
    terms = objective.terms(average_velocity, z, velocity(z, t), Times(r, t, len(t)), UniformWeighting(), 0.0)
    assert terms.squared_error.max().sqrt() < bound
    weighted = objective.terms(average_velocity, z, velocity(z, t), Times(r, t, len(t)), TransitionWeighting(), 0.0)
    assert weighted.loss < terms.squared_error.numel() * bound


@pytest.mark.parametrize("settings", [{"sigma_data": 0.0}, {"c": 0.0}])
def test_impossible_weightings_are_refused(settings):
    with pytest.raises(ValueError, match="must be positive"):
        TransitionWeighting(**settings)
    with pytest.raises(ValueError, match="must be positive"):
        AdaptiveWeighting(c=-1.0)


def test_any_step_weighting_is_the_formula():
    r, t = torch.tensor([0.0, 0.2, 0.7]), torch.tensor([1.0, 0.5, 0.7])
    losses = AnyStepWeighting(p=0.5, c=0.1)(torch.tensor([3.0, 5.0, 7.0]), Times(r, t, 2))
    expected = [
        3 / 3.1**0.5,
        (1 + math.tan(0.7 * math.pi / 2.5)) * 5 / 5.1**0.5,
        (1 + math.tan(math.pi / 2.5)) * 7 / 7.1**0.5,
    ]
    assert torch.allclose(losses, torch.tensor(expected))


def test_any_step_weight_carries_no_gradient():
    error = torch.tensor([2.0], requires_grad=True)
    loss = AnyStepWeighting(p=1.0, c=0.5)(error, Times(torch.zeros(1), torch.ones(1), 1))
    assert torch.autograd.grad(loss.sum(), error)[0].item() == pytest.approx(1 / 2.5)
