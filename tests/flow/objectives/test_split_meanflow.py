from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.split_meanflow import SplitMeanFlow
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import UniformWeighting
from tests.flow.gaussian import average_velocity, rms, states, velocity


class Fixed(SplitMeanFlow):
    def split(self, r):
        return torch.linspace(0.1, 0.9, len(r), dtype=r.dtype)


def split(u, z, v, times, objective=SplitMeanFlow, **settings) -> FlowMapTerms:
    return objective(**settings).terms(AverageVelocity(u), z, v, times, UniformWeighting(), 0.0)


def written_out(u, z, r, t, lam, *, share=None, back=1.0, second=None) -> torch.Tensor:
    """The target by the formula; right with the defaults."""
    share = lam if share is None else share
    s = (1 - lam) * t + lam * r
    lam, share, length = (a.view(-1, 1, 1, 1) for a in (lam, share, t - s))
    u2 = u(z, s, t)
    u1 = u(z - back * length * u2, *(second or (r, s)))
    return (1 - share) * u1 + share * u2


def test_exact_average_velocity_has_zero_error():
    torch.manual_seed(0)
    z, r, t = states()
    terms = split(average_velocity, z, torch.zeros_like(z), Times(r, t, len(t)))
    assert terms.squared_error.max() < 1e-12
    assert terms.derivative_norm.numel() == 0


def test_wrong_formulas_have_an_error_at_the_exact_average_velocity():
    z, r, t = states()
    lam = Fixed().split(r)
    exact = average_velocity(z, r, t)
    s = (1 - lam) * t + lam * r

    def error(**wrong) -> float:
        return rms(written_out(average_velocity, z, r, t, lam, **wrong) - exact)

    assert error() < 1e-12
    assert error(share=1 - lam) > 0.01, "weights of the two parts swapped"
    assert error(back=0.0) > 0.01, "z_t for z_s"
    assert error(back=-1.0) > 0.01, "a step towards the noise"
    assert error(second=(s, s)) > 0.01, "the velocity for the second part's average"


def test_target_is_the_formula_on_a_network_that_is_not_exact():
    z, r, t = states()

    def u(z, r, t):
        return 1.3 * average_velocity(z, r, t) + (t - r).view(-1, 1, 1, 1)

    terms = split(u, z, velocity(z, t), Times(r, t, len(t)), Fixed)
    expected = u(z, r, t) - written_out(u, z, r, t, Fixed().split(r))
    assert torch.allclose(terms.squared_error.double(), expected.square().flatten(1).mean(1), rtol=1e-4)


def test_target_is_v_when_r_equals_t():
    z, r, t = states()
    n, v = 20, torch.randn_like(z)
    r = torch.cat([r[:n], t[n:]])
    terms = split(average_velocity, z, v, Times(r, t, n))
    expected = (velocity(z, t) - v).square().flatten(1).mean(1)[n:]
    assert torch.allclose(terms.squared_error[n:].double(), expected, rtol=1e-5)
    assert split(average_velocity, z, v, Times(t, t, 0)).loss.isfinite()


def test_zero_is_a_solution_without_rows_at_r_equals_t_and_none_with_them():
    z, r, t = states()

    def zero(z, r, t):
        return torch.zeros_like(z)

    assert split(zero, z, velocity(z, t), Times(r, t, len(t))).loss == 0
    assert split(zero, z, velocity(z, t), Times(torch.cat([r[:32], t[32:]]), t, 32)).loss > 0.1


def test_gradient_flows_through_u_alone():
    z, r, t = states(8)
    lam = Fixed().split(r)
    theta = torch.tensor(1.2, dtype=z.dtype, requires_grad=True)

    def u(z, r, t):
        return theta * average_velocity(z, r, t)

    def by_hand(target) -> float:
        error = (u(z, r, t) - target).square().flatten(1).sum(1).mean()
        return float(torch.autograd.grad(error, theta)[0])

    loss = split(u, z, velocity(z, t), Times(r, t, 8), Fixed).loss
    ours = float(torch.autograd.grad(loss, theta)[0])
    target = written_out(u, z, r, t, lam)
    assert ours == pytest.approx(by_hand(target.detach()), rel=1e-4)
    assert ours != pytest.approx(by_hand(target), rel=0.1), "the stop-gradient matters"


def test_split_points_fill_the_interval():
    torch.manual_seed(0)
    lam = SplitMeanFlow().split(torch.zeros(10_000))
    assert 0 <= lam.min() < 0.01 < 0.99 < lam.max() <= 1
    assert abs(lam.mean() - 0.5) < 0.02


def test_bound_cuts_the_targets_of_interval_rows_alone():
    z, r, t = states()
    n, v = 20, torch.full_like(z, 9.0)
    r = torch.cat([r[:n], t[n:]])
    terms = split(lambda z, r, t: torch.full_like(z, 5.0), z, v, Times(r, t, n), clip_target=2.0)
    assert torch.allclose(terms.squared_error[:n].double(), torch.tensor(9.0, dtype=z.dtype))
    assert torch.allclose(terms.squared_error[n:].double(), torch.tensor(16.0, dtype=z.dtype))
    with pytest.raises(ValueError, match="clip_target"):
        SplitMeanFlow(clip_target=0.0)
