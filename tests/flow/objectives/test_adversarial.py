from __future__ import annotations

import math

import pytest
import torch

from emf_lightning.flow.objectives.adversarial import discriminator_loss, generator_loss


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_generator_is_pushed_hardest_where_it_fools_nobody():
    """A sigmoid before the softplus would leave a gradient of less than 1e-4 at a logit of -10."""
    logits = torch.tensor([-10.0, 0.0, 10.0], requires_grad=True)
    losses = generator_loss(logits)
    assert losses.tolist() == pytest.approx([softplus(10), softplus(0), softplus(-10)], rel=1e-5)
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-1.0, -0.5, 0.0], abs=1e-4)


def quadratic(weight: torch.Tensor):
    return lambda z: (weight * z.square()).flatten(1).sum(1)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_discriminators_loss_is_the_formula_with_its_penalty_on_data(gamma):
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    terms = discriminator_loss(quadratic(weight), real, fake, gamma)
    on_real, on_fake = (weight * x.square().sum((1, 2, 3)) for x in (real, fake))
    penalty = (2 * weight * real).square().sum((1, 2, 3)).mean()
    wanted = (torch.log1p(on_fake.exp()) + torch.log1p((-on_real).exp())).mean() + gamma / 2 * penalty
    assert terms.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    mine, theirs = (torch.autograd.grad(loss, weight)[0].item() for loss in (terms.loss, wanted))
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert terms.r1.isnan() if gamma == 0 else terms.r1.item() == pytest.approx(penalty.item())


@pytest.mark.parametrize(("real", "fake", "accuracy"), [(1.0, -1.0, 1.0), (1.0, 1.0, 0.5), (-1.0, 1.0, 0.0)])
def test_accuracy_is_the_share_told_rightly(real, fake, accuracy):
    rows = [torch.full((4, 1, 1, 1), value) for value in (real, fake)]
    assert discriminator_loss(lambda z: z.flatten(1).sum(1), *rows, 0.0).accuracy == accuracy


def test_nothing_flows_into_the_samples():
    fake = torch.randn(3, 1, 2, 2, requires_grad=True)
    real = torch.randn(3, 1, 2, 2)
    weight = torch.ones((), requires_grad=True)
    discriminator_loss(quadratic(weight), real, fake, 1.0).loss.backward()
    assert fake.grad is None
    assert not real.requires_grad
    assert weight.grad is not None
