from __future__ import annotations

import pytest
import torch

from emf_lightning.flow.objectives.adversarial import discriminator_loss
from emf_lightning.networks.discriminator import ConvDiscriminator
from emf_lightning.networks.feature_discriminator import FeatureDiscriminator
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from tests.networks.test_two_time import backbones, network
from tests.networks.test_two_time import inputs as backbone_inputs


def generator(side: int = 8) -> SanaFlowMap:
    torch.manual_seed(1)
    size = SanaArchitecture(num_layers=1, patch_size=1)
    return SanaFlowMap(size, latent_size=side, context_width=16)


def inputs(side: int, batch: int = 8):
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.randint(1, 6, (batch, 1))
    return torch.randn(batch, 3, side, side), torch.zeros(batch), torch.randn(batch, 5, 16), mask


@pytest.mark.parametrize("side", [8, 36, 33])
def test_logits_are_one_a_sample_and_unbounded(side):
    net = ConvDiscriminator(generator(side), 8, 32)
    z, t, context, mask = inputs(side)
    logits = net(100 * z, t, context, mask)
    assert logits.shape == (8,)
    assert (logits > 1).any() and (logits < -1).any()
    assert 0.05 < net(z, t, context, mask).std() < 20, "neither faded nor blown up by the layers"


def test_captions_count_and_masked_tokens_do_not():
    net = ConvDiscriminator(generator(), 8, 32)
    z, t, context, mask = inputs(8)
    logits = net(z, t, context, mask)
    assert torch.equal(net(z, t, context.masked_fill(~mask[..., None], 9.0), mask), logits)
    assert not torch.allclose(net(z, t, context.flip(0), mask), logits, atol=1e-3)
    alone = ConvDiscriminator(generator(), 8, 32, conditional=False)
    assert torch.equal(alone(z, t, context, mask), alone(z, t, context.flip(0), mask))


def test_equal_samples_look_different_together():
    net = ConvDiscriminator(generator(), 8, 32, conditional=False, mbstd_group_size=4)
    z, t, context, mask = inputs(8)
    alike = z[:1].expand(4, -1, -1, -1)
    mixed = torch.cat([z[:1], z[1:4]])
    assert not torch.allclose(net(alike, t[:4], context[:4], mask[:4])[0], net(mixed, t[:4], context[:4], mask[:4])[0])
    halves = (
        net(z, t, context, mask),
        torch.cat([net(*(x[s] for x in (z, t, context, mask))) for s in (slice(4), slice(4, 8))]),
    )
    assert torch.allclose(*halves, atol=1e-6), "groups know nothing of each other"


def test_it_learns_to_tell_two_distributions_apart_under_r1():
    torch.manual_seed(0)
    net = ConvDiscriminator(generator(), 8, 16)
    _, t, context, mask = inputs(8, 32)
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    accuracies = []
    for _ in range(30):
        real, fake = 1.0 + torch.randn(32, 3, 8, 8), torch.randn(32, 3, 8, 8)
        terms = discriminator_loss(lambda z: net(z, t, context, mask), real, fake, 0.1)
        adam.zero_grad()
        terms.loss.backward()
        adam.step()
        accuracies.append(float(terms.accuracy))
    assert sum(accuracies[-5:]) / 5 > 0.95


@pytest.mark.parametrize("settings", [{"channels": 8, "max_channels": 4}, {"mbstd_group_size": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="ConvDiscriminator"):
        ConvDiscriminator(generator(), **settings)


@backbones
def test_heads_read_the_features_of_every_network_and_take_the_penalty(name):
    net = FeatureDiscriminator(network(name, None), width=8)
    z, _, t, *text = backbone_inputs(name)
    assert net(z, t, *text).shape == (3,)
    terms = discriminator_loss(lambda x: net(x, t, *text), z, 0 * z, gamma=0.1)
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.heads.parameters())
