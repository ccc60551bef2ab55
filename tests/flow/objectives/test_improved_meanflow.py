from __future__ import annotations

import math

import pytest
import torch

from emf_lightning.flow.guidance import GuidanceCondition, GuidanceSampler
from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow, _Heads, guided_velocity
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.times import Times
from emf_lightning.flow.weighting import AdaptiveWeighting, UniformWeighting
from tests.flow.gaussian import M, S, average_velocity, rms, states, velocity

f64 = torch.float64


def exact(z, r, t):
    return torch.cat([average_velocity(z, r, t), velocity(z, t)], dim=1)


def improved(heads, z, v_g, v_c, times, weighting=None, **settings) -> FlowMapTerms:
    return ImprovedMeanFlow(**settings).head_terms(_Heads(heads), z, v_g, v_c, times, weighting or UniformWeighting())


def test_exact_heads_have_zero_error_on_the_true_velocity():
    z, r, t = states()
    v = velocity(z, t)
    terms = improved(exact, z, v, v, Times(r, t, 40))
    assert terms.squared_error[:40].max() < 1e-12
    assert terms.loss > 0, "the rows behind have r < t here, and were treated as r = t"
    terms = improved(exact, z, v, v, Times(torch.cat([r[:40], t[40:]]), t, 40))
    assert terms.loss < 1e-12


def compound(z, r, t, v, dz, dr, dt, h=1e-5) -> torch.Tensor:
    """V = u + (t - r) du/dt by central differences along (dz, dr, dt)."""
    ahead, behind = (average_velocity(z + s * h * dz, r + s * h * dr, t + s * h * dt) for s in (1, -1))
    return average_velocity(z, r, t) + (t - r).view(-1, 1, 1, 1) * (ahead - behind) / (2 * h)


def test_wrong_tangents_have_an_error_at_the_exact_average_velocity():
    z, r, t = states()
    v = velocity(z, t)

    def error(dz=v, dr=0.0, dt=1.0) -> float:
        return rms(compound(z, r, t, v, dz, dr, dt) - v)

    assert error() < 1e-7
    assert error(dr=1.0, dt=0.0) > 0.1, "r and t swapped"
    assert error(dr=1.0) > 0.1, "r moved, too"
    assert error(dt=0.0) > 0.1, "t kept"
    assert error(dz=average_velocity(z, r, t)) > 0.01, "u for v"
    assert error(dz=torch.randn_like(v)) > 0.1, "a velocity of something else"


def conditional(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, e - x, r and t of pairs of data and noise."""
    generator = torch.Generator().manual_seed(0)
    x = M + S * torch.randn(rows, 1, dtype=f64, generator=generator)
    e = torch.randn(rows, 1, dtype=f64, generator=generator)
    r, t = torch.full((rows,), 0.3, dtype=f64), torch.full((rows,), 0.8, dtype=f64)
    return interpolate(x, e, t), e - x, r, t


def test_raw_error_is_the_velocitys_variance_and_meanflows_is_not():
    """With a predicted tangent V - (e - x) is V - v plus what no function of z can know: a regression's error."""
    z, v, r, t = conditional(100_000)
    times = Times(r, t, len(t))
    unknowable = float((v - velocity(z, t)).square().mean())
    predicted = improved(exact, z, v, velocity(z, t), times).squared_error.mean()
    meanflow = MeanFlow().terms(average_velocity, z, v, times, UniformWeighting(), 0.0).squared_error.mean()
    assert predicted == pytest.approx(unknowable, rel=1e-3)
    assert meanflow != pytest.approx(unknowable, rel=0.1)


def test_minimiser_given_the_conditional_velocity_is_exact():
    z, v, r, t = conditional(400_000)

    def gradients(scale: float) -> list[float]:
        theta = torch.full((2,), scale, dtype=f64, requires_grad=True)

        def heads(z, r, t):
            return torch.cat([theta[0] * average_velocity(z, r, t), theta[1] * velocity(z, t)], dim=1)

        terms = improved(heads, z, v, velocity(z, t), Times(r, t, len(t)))
        return torch.autograd.grad(terms.loss, theta)[0].tolist()

    noise = 10 / len(t) ** 0.5
    assert all(abs(g) < noise for g in gradients(1.0))
    assert all(g > 5 * noise for g in gradients(1.5))
    assert all(g < -5 * noise for g in gradients(0.5))


def test_target_is_v_g_when_r_equals_t():
    z, _, t = states()
    v_g = torch.randn_like(z)
    terms = improved(exact, z, v_g, velocity(z, t), Times(t, t, 0))
    expected = (velocity(z, t) - v_g).square().flatten(1)
    assert torch.allclose(terms.squared_error.double(), expected.mean(1), rtol=1e-5)
    assert terms.loss.item() == pytest.approx(2 * expected.sum(1).mean().item(), rel=1e-5)
    assert terms.derivative_norm.numel() == 0


def test_gradient_flows_through_u_and_v_and_not_through_the_derivative():
    z, r, t = states(8)
    v = velocity(z, t)
    theta = torch.tensor([1.2, 0.9], dtype=f64, requires_grad=True)

    def heads(z, r, t):
        return torch.cat([theta[0] * average_velocity(z, r, t), theta[1] * velocity(z, t)], dim=1)

    def by_hand(derivative) -> list[float]:
        u = theta[0] * average_velocity(z, r, t)
        V = u + (t - r).view(-1, 1, 1, 1) * derivative
        error = (V - v).square() + (theta[1] * velocity(z, t) - v).square()
        return torch.autograd.grad(error.flatten(1).sum(1).mean(), theta)[0].tolist()

    h = 1e-5
    exactly = (average_velocity(z + h * v, r, t + h) - average_velocity(z - h * v, r, t - h)) / (2 * h)
    (ours,) = torch.autograd.grad(improved(heads, z, v, v, Times(r, t, 8)).loss, theta)
    assert ours.tolist() == pytest.approx(by_hand(1.2 * exactly), rel=1e-4)
    assert ours.tolist() != pytest.approx(by_hand(theta[0] * exactly), rel=0.1), "the stop-gradient matters"


def test_each_head_has_its_own_weight_and_rows_must_be_finite_in_both():
    z, r, t = states(8)
    v = velocity(z, t)

    def heads(z, r, t):
        both = exact(z, r, t)
        both[2, 1:] = torch.nan
        return both

    terms = improved(heads, z, v, v, Times(r, t, 8), AdaptiveWeighting())
    assert terms.finite.tolist() == [True, True, False, *[True] * 5]
    assert terms.loss.isfinite()
    flat = improved(lambda z, r, t: 1.5 * exact(z, r, t), z, v, v, Times(r, t, 8), AdaptiveWeighting(c=1e-6))
    assert flat.loss.item() == pytest.approx(2, abs=1e-2)


def test_bound_cuts_the_targets_of_u_on_interval_rows_alone():
    z, r, t = states()
    n, v = 20, torch.full_like(z, 9.0)
    r = torch.cat([r[:n], t[n:]])
    terms = improved(lambda z, r, t: torch.cat([0 * z, v[: len(z)]], 1), z, v, v, Times(r, t, n), clip_target=2.0)
    assert torch.allclose(terms.squared_error[:n].double(), torch.tensor(4.0, dtype=f64))
    assert torch.allclose(terms.squared_error[n:].double(), torch.tensor(81.0, dtype=f64))
    with pytest.raises(ValueError, match="clip_target"):
        ImprovedMeanFlow(clip_target=0.0)


def test_guided_velocity_of_a_network_that_has_learned_it_is_classifier_free_guidance():
    """v_c = v_g solves v_g = v + (1 - 1 / w) (v_g - v_u) at w v + (1 - w) v_u."""
    v, v_u = torch.randn(2, 4, 3, 2, 2).unbind(0)
    w = torch.tensor([1.0, 1.5, 4.0, 8.0])
    wide = w.view(-1, 1, 1, 1)
    fixed = wide * v + (1 - wide) * v_u
    assert torch.allclose(guided_velocity(v, fixed, v_u, w), fixed, atol=1e-5)
    assert not torch.allclose(v + (1 - wide) * (fixed - v_u), fixed, atol=0.1), "1 / w left out"
    assert torch.equal(guided_velocity(v, fixed, v_u, w)[0], v[0])


def test_guidance_acts_in_its_interval_and_its_conditions_lie_between_zero_and_one():
    guidance = GuidanceCondition(
        torch.tensor([2.0, 4.0, 1.0]), torch.tensor([0.2, 0.6, 0.0]), torch.tensor([0.8, 1.0, 1.0])
    )
    assert guidance.at(torch.tensor([0.2, 0.5, 0.5])).tolist() == [2.0, 1.0, 1.0]
    assert guidance.conditions[:, 0].tolist() == [0.5, 0.75, 0.0]
    assert torch.equal(guidance.conditions[:, 1:], torch.stack([guidance.start, guidance.end], 1))
    assert GuidanceCondition.everywhere(torch.ones(2)).conditions.tolist() == [[0, 0, 1], [0, 0, 1]]


def test_distribution_of_guidance_is_flat_in_the_logarithm_and_leaves_rows_with_r_equal_t_the_whole_interval():
    torch.manual_seed(0)
    half = torch.full((20_000,), 0.5)
    guidance = GuidanceSampler(largest=8.0, latest_start=0.4, earliest_end=0.6)(Times(half, half, 15_000))
    logarithm = guidance.omega.log() / math.log(8.0)
    assert 0 <= logarithm.min() and logarithm.max() <= 1
    assert abs(logarithm.mean() - 0.5) < 0.01
    assert abs(logarithm.std() - 12**-0.5) < 0.01
    assert abs(guidance.start[:15_000].mean() - 0.2) < 0.01
    assert abs(guidance.end[:15_000].mean() - 0.8) < 0.01
    assert (guidance.start <= 0.4).all() and (guidance.end >= 0.6).all()
    assert (guidance.start[15_000:] == 0).all() and (guidance.end[15_000:] == 1).all()


@pytest.mark.parametrize("settings", [{"largest": 0.5}, {"latest_start": 0.7}])
def test_impossible_samplers_are_refused(settings):
    with pytest.raises(ValueError, match="GuidanceSampler"):
        GuidanceSampler(**settings)
