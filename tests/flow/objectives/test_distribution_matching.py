"""DMD's gradient on the one case where it is known: Gaussian data, a linear generator, both velocities exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emf_lightning.flow.guidance import guided
from emf_lightning.flow.objectives.distribution_matching import DMD, DistributionMatching, MatchingLoss
from tests.flow.objectives.test_flow_generator_matching import ROWS, A, B, M, S, gaussian_velocity


def gradient_of_kl() -> Tensor:
    """d/d(a, b) of the KL divergence of the noised samples from the noised data, averaged over t."""
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * 0.9 + 0.05
    ours, theirs = (1 - t) ** 2 * a**2 + t**2, (1 - t) ** 2 * S**2 + t**2
    kl = 0.5 * (ours / theirs + ((1 - t) * (b - M)) ** 2 / theirs - 1 - (ours / theirs).log())
    return torch.stack(torch.autograd.grad(kl.mean(), (a, b)))


def sampled_gradient(loss: MatchingLoss, online: tuple[float, float] = (B, A)) -> tuple[Tensor, Tensor]:
    """The same from samples, with the loss's normalisation and weight of t taken back, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    noise, e = torch.randn(2, ROWS, 1, 1, 1, dtype=torch.float64, generator=generator)
    t = torch.rand(ROWS, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    x = (A * noise + B).requires_grad_()
    at = t.view(-1, 1, 1, 1)

    def velocity(m: float, s: float):
        return lambda z, r, t: gaussian_velocity(z, t.view(-1, 1, 1, 1), m, s)

    terms = DistributionMatching(loss=loss).terms(velocity(M, S), velocity(*online), x, e, t)
    (g,) = torch.autograd.grad(terms.loss * ROWS, x)
    u = gaussian_velocity((1 - at) * x.detach() + at * e, at, M, S)
    g = g * (e - x.detach() - u).abs() * (1 - at) ** 2 / at
    rows = torch.stack([g * noise, g]).flatten(1)  # dx/da = noise, dx/db = 1
    return rows.mean(1), rows.std(1) / ROWS**0.5


class Reversed(DMD):
    def __call__(self, u, v, c):
        return super().__call__(u, v, 2 * c.detach() - c)


class WithoutStopGradient(DMD):
    differentiates_flows = True

    def __call__(self, u, v, c):
        g = (u - v) / (c - u).abs().mean((1, 2, 3), keepdim=True)
        return (g - (c - c.detach())).square().flatten(1).mean(1) / 2


def test_dmd_has_the_gradient_of_the_divergence():
    mean, error = sampled_gradient(DMD())
    assert ((mean - gradient_of_kl()).abs() < 3 * error).all()
    assert (error < 0.03 * gradient_of_kl().abs()).all(), "a difference of 9 % would be seen"


@pytest.mark.parametrize(("loss", "online"), [(Reversed(), (B, A)), (DMD(), (B + 0.3, A)), (DMD(), (B, A - 0.3))])
def test_a_sign_or_a_stale_online_flow_is_far_from_it(loss, online):
    mean, error = sampled_gradient(loss, online)
    assert ((mean - gradient_of_kl()).abs() > 10 * error).any()


@pytest.mark.parametrize(("loss", "right"), [(DMD(), True), (DMD(project=True), True), (WithoutStopGradient(), False)])
def test_gradient_is_the_papers_in_denoised_samples(loss, right):
    def teacher(z, r, t):
        return 0.7 * z.roll(1, -1) + 0.2

    def online_flow(z, r, t):
        return (1.3 * z).sin()

    x, e = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64)
    t = torch.linspace(0.2, 0.8, 5)
    at = t.view(-1, 1, 1, 1)
    x.requires_grad_()
    z = ((1 - at) * x + at * e).detach()
    x_u, x_v = (z - at * flow(z, t, t) for flow in (teacher, online_flow))
    wanted = (x_v - x_u) / (x.detach() - x_u).abs().mean((1, 2, 3), keepdim=True)
    if loss.project:
        r = x_v - x.detach()
        wanted = wanted - (wanted * r).sum((1, 2, 3), keepdim=True) / r.square().sum((1, 2, 3), keepdim=True) * r
        assert torch.allclose((wanted * r).sum((1, 2, 3)), torch.zeros(5, dtype=torch.float64))
    terms = DistributionMatching(loss=loss).terms(teacher, online_flow, x, e, t)
    (gradient,) = torch.autograd.grad(terms.loss * x.numel(), x)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6) == right


def test_no_gradient_reaches_the_flows():
    scale = torch.ones(1, requires_grad=True)
    x = torch.randn(4, 1, 2, 2, requires_grad=True)
    flows = (lambda z, r, t: scale * z), (lambda z, r, t: -scale * z)
    terms = DistributionMatching().terms(*flows, x, torch.randn_like(x), torch.full((4,), 0.5))
    assert torch.autograd.grad(terms.loss, scale, allow_unused=True, retain_graph=True) == (None,)


def test_the_teachers_guidance_acts_inside_its_interval():
    matching = DistributionMatching(teacher_guidance_scale=3.0, teacher_guidance_interval=(0.3, 1.0))
    u = matching.teacher_velocity(lambda z, r, t, c: z * c, torch.full((2, 1), 2.0), torch.ones(1, 1), 2)
    assert u(torch.ones(2, 1), torch.zeros(2), torch.tensor([0.2, 0.3])).flatten().tolist() == [2.0, 4.0]
    everywhere = guided(lambda z, r, t: 2 * z, lambda z, r, t: z, 3.0)
    assert everywhere(torch.ones(2, 1), torch.zeros(2), torch.tensor([0.2, 0.3])).flatten().tolist() == [4.0, 4.0]
    with pytest.raises(ValueError, match="null_context"):
        matching.teacher_velocity(lambda z, r, t, c: z, torch.ones(2, 1), None, 2)
    with pytest.raises(ValueError, match=r"0 <= start < end <= 1, got \(0.5, 0.5\)"):
        DistributionMatching(teacher_guidance_interval=(0.5, 0.5))
