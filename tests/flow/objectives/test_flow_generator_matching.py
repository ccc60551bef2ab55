"""FGM on the one case whose gradient is known: Gaussian data, a linear generator, both velocities exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emf_lightning.flow.objectives.distribution_matching import (
    AlphaMatching,
    ExactMatching,
    MatchingLoss,
    TimeWeight,
)
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching

M, S = 0.7, 0.4
"""The teacher's data are N(M, S^2)."""
A, B = 0.9, -0.3
"""The generator samples A z + B."""
ROWS = 200_000
WEIGHT = TimeWeight(2.0, 1.0)


class OnlyL1(MatchingLoss):
    def __call__(self, u, v, c):
        return (u - v).square().flatten(1).mean(1)


class OnlyL2(MatchingLoss):
    def __call__(self, u, v, c):
        return 2 * ((u - v) * (v - c)).flatten(1).mean(1)


def gaussian_velocity(z: Tensor, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """E[e - x | z] where x is N(m, s^2)."""
    return -m + (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (z - (1 - t) * m)


def exact_gradient(weight: TimeWeight) -> Tensor:
    """d/d(a, b) of E w(t) |v - u|^2, v's own dependence included, by quadrature over t and in closed form over z."""
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * 0.9 + 0.05
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    m, s = torch.tensor(M, dtype=torch.float64), torch.tensor(S, dtype=torch.float64)

    def gap(z: Tensor) -> Tensor:
        return gaussian_velocity(z, t, b, a) - gaussian_velocity(z, t, m, s)

    offset, slope = gap(zero), gap(one) - gap(zero)  # both velocities are affine in z
    mean, variance = (1 - t) * b, (1 - t) ** 2 * a**2 + t**2
    value = (weight(t) * ((offset + slope * mean) ** 2 + slope**2 * variance)).mean()
    return torch.stack(torch.autograd.grad(value, (a, b)))


def sampled_gradient(loss: MatchingLoss, weight: TimeWeight, wrong: str = "") -> tuple[Tensor, Tensor]:
    """Mean over rows of each row's d loss / d(a, b), and its standard error; ``wrong`` names a mistake to make."""
    generator = torch.Generator().manual_seed(0)
    noise, e = torch.randn(2, ROWS, 1, 1, 1, dtype=torch.float64, generator=generator)
    e = noise if wrong == "noise used again" else e
    t = torch.rand(ROWS, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    a, b = (torch.full((ROWS, 1, 1, 1), value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    x = a * noise + b

    def velocity(m: float, s: float, cut: bool):
        def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return gaussian_velocity(z.detach() if cut else z, t.view(-1, 1, 1, 1), m, s)

        return u

    teacher = velocity(M, S, cut=wrong == "no gradient through the teacher's input")
    online = velocity(B, A, cut=wrong == "no gradient through the online flow's input")
    if wrong == "no gradient through c":
        attached, x = x, x.detach()
        inner, online_inner = teacher, online
        teacher = lambda z, r, t: inner(z + (1 - t).view(-1, 1, 1, 1) * (attached - x), r, t)  # noqa: E731
        online = lambda z, r, t: online_inner(z + (1 - t).view(-1, 1, 1, 1) * (attached - x), r, t)  # noqa: E731
    terms = FlowGeneratorMatching(loss=loss, weight=weight).terms(teacher, online, x, e, t)
    rows = torch.stack(torch.autograd.grad(terms.loss * ROWS, (a, b))).flatten(1)
    return rows.mean(1), rows.std(1) / ROWS**0.5


@pytest.mark.parametrize("weight", [TimeWeight(), WEIGHT])
@pytest.mark.parametrize(("loss", "factor"), [(ExactMatching(), 1.0), (AlphaMatching(0.5), 0.5)])
def test_gradient_is_the_exact_one(loss, factor, weight):
    mean, error = sampled_gradient(loss, weight)
    wanted = factor * exact_gradient(weight)
    assert ((mean - wanted).abs() < 3 * error).all()
    assert (error < 0.02 * wanted.abs()).all(), "a difference of 6 % would be seen"


@pytest.mark.parametrize("loss", [OnlyL1(), OnlyL2()])
def test_neither_term_alone_has_the_exact_gradient(loss):
    mean, error = sampled_gradient(loss, TimeWeight())
    assert ((mean - exact_gradient(TimeWeight())).abs() > 10 * error).all()


@pytest.mark.parametrize(
    "wrong",
    [
        "no gradient through the teacher's input",
        "no gradient through the online flow's input",
        "no gradient through c",
        "noise used again",
    ],
)
def test_a_mistake_is_far_from_the_exact_gradient(wrong):
    mean, error = sampled_gradient(ExactMatching(), WEIGHT, wrong)
    assert ((mean - exact_gradient(WEIGHT)).abs() > 10 * error).any()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_alpha_loss_is_its_formula_and_half_the_exact_one_at_one_half(alpha):
    u, v, c = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64)
    first, second = ((u - v) ** 2).mean((1, 2, 3)), 2 * ((u - v) * (v - c)).mean((1, 2, 3))
    assert torch.allclose(AlphaMatching(alpha)(u, v, c), (1 - alpha) * first + second / 2)
    assert torch.allclose(ExactMatching()(u, v, c), first + second)
    assert torch.allclose(AlphaMatching(0.5)(u, v, c), ExactMatching()(u, v, c) / 2)


def test_rows_that_are_not_finite_are_left_out():
    x = torch.randn(4, 1, 2, 2, requires_grad=True)
    spoiled = torch.tensor([False, True, False, False]).view(-1, 1, 1, 1)

    def online(z, r, t):
        return torch.where(spoiled, float("inf"), 0.5 * z)

    t, e = torch.full((4,), 0.4), torch.randn(4, 1, 2, 2)
    objective = FlowGeneratorMatching()
    terms = objective.terms(lambda z, r, t: -z, online, x, e, t)
    assert terms.finite.tolist() == [True, False, True, True]
    keep = ~spoiled.flatten()
    alone = objective.terms(lambda z, r, t: -z, lambda z, r, t: 0.5 * z, x[keep], e[keep], t[keep])
    assert torch.allclose(terms.loss, alone.loss)
    assert torch.allclose(terms.gap[keep], alone.gap)
    assert terms.cosine[keep].tolist() == pytest.approx([-1.0] * 3)


def test_weights_are_powers():
    t = torch.tensor([0.25, 0.5])
    assert TimeWeight()(t).tolist() == [1, 1]
    assert TimeWeight(2.0, 1.0)(t).tolist() == pytest.approx([0.75 / 16, 0.125])


def test_a_generator_is_trained_at_the_times_that_it_samples_at():
    times, scale = [], torch.ones((), requires_grad=True)

    def net(z, r, t):
        times.append(float(t[0]))
        return scale * z

    objective = FlowGeneratorMatching(steps=2, generator_time=0.8)
    objective.online_flow_loss(net, torch.zeros(2, 1, 2, 2), online_flow=lambda z, r, t: scale * z, step=1)
    sampled = len(times)
    objective.sampler(net, torch.randn(2, 1, 2, 2), 2)
    assert times[:sampled] == times[sampled:] == pytest.approx([0.8, 0.4])
