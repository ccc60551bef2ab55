from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.rcgm import RCGM
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import UniformWeighting
from tests.flow.gaussian import average_velocity, rms, states, velocity


def rcgm(u, z, v, times, **settings) -> FlowMapTerms:
    return RCGM(**settings).terms(AverageVelocity(u), z, v, times, UniformWeighting(), 0.0)


def wide(a: torch.Tensor) -> torch.Tensor:
    return a.view(-1, 1, 1, 1)


def step_end(r: torch.Tensor, t: torch.Tensor, h: float) -> torch.Tensor:
    return torch.maximum(t - h, r)


def inexact(z, r, t):
    return 1.3 * average_velocity(z, r, t) + 0.2 * wide(t - r)


def residual(u, z, r, t, v, h, order, *, sign=1.0, forget_step=False, same_state=False, end=None):
    """G by the formula, sample by sample; right with the defaults."""
    s = step_end(r, t, h)
    state = z - sign * wide(t - s) * v
    jumps = torch.zeros_like(z)
    for k in range(order):
        a, b = s + (r - s) * k / order, s + (r - s) * (k + 1) / order
        jump = wide(a - b) * u(state, b if end is None else end(a, b), a)
        state, jumps = state if same_state else state - jump, jumps + jump
    length = s - r if forget_step else t - r
    return (wide(length) * u(z, r, t) - jumps) / wide(t - s) - v


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("h", [0.01, 0.3])
def test_exact_flow_map_has_zero_error_on_the_average_velocity_of_the_step(order, h):
    z, r, t = states()
    v = average_velocity(z, step_end(r, t, h), t)  # where v is the step's, no step is too long
    terms = rcgm(average_velocity, z, v, Times(r, t, len(t)), order=order, step=h)
    assert terms.squared_error.max() < 1e-12
    assert terms.derivative_norm.numel() == 0


def test_error_of_the_exact_flow_map_on_the_velocity_falls_with_the_step():
    z, r, t = states()
    v, times = velocity(z, t), Times(r, t, len(t))
    coarse, fine = (rcgm(average_velocity, z, v, times, step=h).squared_error.mean().sqrt() for h in (0.02, 0.01))
    assert coarse / fine == pytest.approx(2, rel=0.1)
    assert fine < 0.02


def test_wrong_formulas_have_an_error_at_the_exact_flow_map():
    z, r, t = states()
    h = 0.1
    v = average_velocity(z, step_end(r, t, h), t)

    def error(**wrong) -> float:
        return rms(residual(average_velocity, z, r, t, v, h, 2, **wrong))

    assert error() < 1e-12
    assert error(sign=-1.0) > 0.1, "a step towards the noise"
    assert error(forget_step=True) > 0.1, "the interval without its step"
    assert error(same_state=True) > 0.01, "jumps that all start from one state"
    assert error(end=lambda a, b: a) > 0.01, "velocities for the jumps' averages"


@pytest.mark.parametrize(("order", "h"), [(1, 0.01), (2, 0.01), (3, 0.25)])
def test_error_is_the_formula_on_a_network_that_is_not_exact(order, h):
    z, r, t = states()
    v = velocity(z, t)
    terms = rcgm(inexact, z, v, Times(r, t, len(t)), order=order, step=h)
    expected = residual(inexact, z, r, t, v, h, order).clamp(-1, 1)
    assert (expected.abs() == 1).any(), "some are clipped"
    assert (expected.abs() < 1).any(), "and some are not"
    assert torch.allclose(terms.squared_error.double(), expected.square().flatten(1).mean(1), rtol=1e-4)


def test_one_jump_and_a_short_step_are_meanflow():
    z, r, t = states()
    v, times = velocity(z, t), Times(r, t, len(t))
    wanted = MeanFlow().terms(AverageVelocity(inexact), z, v, times, UniformWeighting(), 0.0).squared_error
    far, near = (
        rms(rcgm(inexact, z, v, times, order=1, step=h, residual_bound=1e9).squared_error - wanted)
        for h in (0.002, 0.001)
    )
    assert near < 0.05 * rms(wanted)
    assert far / near == pytest.approx(2, rel=0.2)


def test_target_is_v_when_r_equals_t():
    z, r, t = states()
    n, v = 20, torch.randn_like(z)
    r = torch.cat([r[:n], t[n:]])
    terms = rcgm(average_velocity, z, v, Times(r, t, n))
    expected = (velocity(z, t) - v).square().flatten(1).mean(1)[n:]
    assert torch.allclose(terms.squared_error[n:].double(), expected, rtol=1e-5)
    assert rcgm(average_velocity, z, v, Times(t, t, 0)).loss.isfinite()


@pytest.mark.parametrize("length", [0.0, 1e-7, 1e-3, 0.01, 0.0100001])
def test_intervals_as_short_as_the_step_are_finite_and_compare_u_with_v(length):
    z, _, t = states()
    z, t = z.float(), t.float()
    v = velocity(z, t)
    terms = rcgm(lambda z, r, t: velocity(z, t) + 0.5, z, v, Times(t - length, t, len(t)))
    assert torch.allclose(terms.squared_error, torch.tensor(0.25), rtol=1e-3)


def test_gradient_flows_through_u_alone():
    z, r, t = states(8)
    theta = torch.tensor(1.01, dtype=z.dtype, requires_grad=True)
    v = velocity(z, t)

    def u(z, r, t):
        return theta * average_velocity(z, r, t)

    def by_hand(g) -> float:
        error = (u(z, r, t) - (u(z, r, t) - g).detach()).square().flatten(1).sum(1).mean()
        return float(torch.autograd.grad(error, theta, retain_graph=True)[0])

    loss = rcgm(u, z, v, Times(r, t, 8), residual_bound=1e9).loss
    ours = float(torch.autograd.grad(loss, theta)[0])
    g = residual(u, z, r, t, v, 0.01, 2)
    assert ours == pytest.approx(by_hand(g.detach()), rel=1e-3)
    whole = float(torch.autograd.grad(g.square().flatten(1).sum(1).mean(), theta)[0])
    assert ours != pytest.approx(whole, rel=0.1), "the stop-gradient matters"


def test_passes_behind_the_target_are_in_full_precision():
    """In bf16 the rounding of u would be a hundred times as large in G, and fill its bound."""
    torch.manual_seed(0)
    net = torch.nn.Linear(16, 16)
    z, t = torch.randn(32, 16), torch.full((32,), 0.9)
    times = Times(torch.full((32,), 0.1), t, 32)

    def error() -> torch.Tensor:
        return rcgm(lambda z, r, t: net(z).float(), z, torch.ones_like(z), times, order=1).squared_error

    exact = error()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(error(), exact, rtol=0.02)
    net.bfloat16()
    with pytest.raises(ValueError, match=r"RCGM in torch.bfloat16: .*fp32 weights"):
        rcgm(lambda z, r, t: net(z.bfloat16()), z, torch.zeros_like(z), times)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"order": 0}, "order"), ({"step": 0.0}, "step"), ({"step": 1.0}, "step"), ({"residual_bound": 0.0}, "bound")],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=f"RCGM: .*{said}"):
        RCGM(**settings)
