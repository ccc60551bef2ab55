from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import AdaptiveWeighting, UniformWeighting
from tests.flow.gaussian import average_velocity, states, velocity

f64 = torch.float64


def meanflow(u, z, v, times, weighting, **settings) -> FlowMapTerms:
    return MeanFlow(**settings).terms(AverageVelocity(u), z, v, times, weighting, 0.0)


def central_difference(u, z, r, t, dz, dr, dt, h=1e-5):
    ahead = u(z + h * dz, r + h * dr, t + h * dt)
    return (ahead - u(z - h * dz, r - h * dr, t - h * dt)) / (2 * h)


def test_derivative_equals_float64_central_differences():
    z, r, t = states()
    v = velocity(z, t)
    u, dudt = ForwardMode()(average_velocity, z, r, t, v, len(z))
    assert torch.equal(u, average_velocity(z, r, t))
    expected = central_difference(average_velocity, z, r, t, v, 0.0, 1.0)
    assert (dudt - expected).abs().max() < 1e-7 * expected.abs().max()


@pytest.mark.parametrize(("dr", "dt"), [(1.0, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_derivative_differs_from_wrong_tangents(dr: float, dt: float):
    z, r, t = states()
    v = velocity(z, t)
    dudt = ForwardMode().jvp(average_velocity, z, r, t, v)
    wrong = central_difference(average_velocity, z, r, t, v, dr, dt)
    assert (dudt - wrong).abs().max() > 0.1


def test_exact_average_velocity_has_zero_error_on_the_true_velocity():
    z, r, t = states()
    terms = meanflow(average_velocity, z, velocity(z, t), Times(r, t, len(t)), UniformWeighting())
    assert terms.squared_error.max() < 1e-12
    assert terms.finite.all()


def test_minimiser_given_the_conditional_velocity_is_the_exact_average_velocity():
    """The gradient of the loss at a scaled exact u vanishes at scale 1, for e - x in place of the true velocity."""
    generator = torch.Generator().manual_seed(0)
    rows = 400_000
    x = 0.7 + 0.4 * torch.randn(rows, 1, dtype=f64, generator=generator)
    e = torch.randn(rows, 1, dtype=f64, generator=generator)
    r, t = torch.full((rows,), 0.3, dtype=f64), torch.full((rows,), 0.8, dtype=f64)
    z = interpolate(x, e, t)

    def gradient(scale: float) -> tuple[float, float]:
        theta = torch.tensor(scale, dtype=f64, requires_grad=True)
        terms = meanflow(
            lambda z, r, t: theta * average_velocity(z, r, t), z, e - x, Times(r, t, rows), UniformWeighting()
        )
        (grad,) = torch.autograd.grad(terms.loss, theta)
        return float(grad), float(terms.squared_error.std() / rows**0.5)

    exact, noise = gradient(1.0)
    assert abs(exact) < 5 * noise
    assert gradient(1.3)[0] > 20 * noise
    assert gradient(0.7)[0] < -20 * noise


def test_target_is_v_when_r_equals_t():
    z, _, t = states()
    v = torch.randn_like(z)
    terms = meanflow(average_velocity, z, v, Times(t, t, 0), UniformWeighting())
    expected = (average_velocity(z, t, t) - v).float().square().flatten(1).mean(1)
    assert torch.allclose(terms.squared_error.float(), expected, rtol=1e-5)
    assert terms.derivative_norm.numel() == 0


def test_derivative_on_some_rows_equals_the_full_batch():
    z, r, t = states()
    n = 20
    r = torch.cat([r[:n], t[n:]])
    v = torch.randn_like(z)
    split = meanflow(average_velocity, z, v, Times(r, t, n), UniformWeighting())
    full = meanflow(average_velocity, z, v, Times(r, t, len(t)), UniformWeighting())
    # In float64 the full batch's factor t - r is exactly zero on the r = t rows, whatever their derivative
    assert torch.allclose(split.squared_error[:n], full.squared_error[:n], rtol=1e-12)


def test_gradient_flows_through_u_alone():
    z, r, t = states(8)
    theta = torch.tensor(1.2, dtype=f64, requires_grad=True)
    v = velocity(z, t)

    def u(z, r, t):
        return theta * average_velocity(z, r, t)

    loss = meanflow(u, z, v, Times(r, t, 8), UniformWeighting()).loss
    (gradient,) = torch.autograd.grad(loss, theta)
    with torch.no_grad():
        base = average_velocity(z, r, t)
        dudt = central_difference(u, z, r, t, v, 0.0, 1.0)
        target = v - (t - r).view(-1, 1, 1, 1) * dudt
        expected = (2 * (theta * base - target) * base).flatten(1).sum(1).mean()
    assert torch.allclose(gradient.float(), expected.float(), rtol=1e-4)


def test_rows_that_are_not_finite_are_left_out():
    z, r, t = states(8)
    z[3] = torch.inf
    theta = torch.tensor(1.1, dtype=f64, requires_grad=True)
    terms = meanflow(
        lambda z, r, t: theta * average_velocity(z, r, t), z, velocity(z, t), Times(r, t, 8), AdaptiveWeighting()
    )
    assert terms.finite.tolist() == [True] * 3 + [False] + [True] * 4
    assert terms.loss.isfinite()


def test_target_that_is_not_finite_spoils_no_gradient():
    z, r, t = states(8)
    v = velocity(z, t)
    v[3] = torch.nan

    def gradient(rows: list[int]) -> torch.Tensor:
        theta = torch.tensor(1.1, dtype=f64, requires_grad=True)
        times = Times(r[rows], t[rows], len(rows))
        terms = meanflow(lambda z, r, t: theta * average_velocity(z, r, t), z[rows], v[rows], times, UniformWeighting())
        return torch.autograd.grad(terms.loss, theta)[0]

    assert torch.allclose(gradient(list(range(8))), gradient([0, 1, 2, 4, 5, 6, 7]))


def test_adaptive_loss_is_flat_at_one():
    half = torch.full((3,), 0.5)
    terms = AdaptiveWeighting(1.0, 1e-3)(torch.tensor([0.5, 100.0, 1e5]), Times(half, half, 0))
    assert torch.allclose(terms, torch.ones(3), atol=3e-3)


def test_bound_cuts_the_targets_of_interval_rows_alone():
    z, r, t = states()
    n, v = 20, torch.full_like(z, 9.0)
    r = torch.cat([r[:n], t[n:]])
    terms = meanflow(lambda z, r, t: torch.zeros_like(z), z, v, Times(r, t, n), UniformWeighting(), clip_target=2.0)
    assert torch.allclose(terms.squared_error[:n].double(), torch.full((n,), 4.0, dtype=f64))
    assert torch.allclose(terms.squared_error[n:].double(), torch.full((len(t) - n,), 81.0, dtype=f64))
