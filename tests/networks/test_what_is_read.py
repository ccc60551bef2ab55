"""What networks read of their inputs, and what they do not."""

from __future__ import annotations

import torch

from emf_lightning.networks.feature_discriminator import FeatureDiscriminator
from tests.networks.test_discriminator import generator
from tests.networks.test_discriminator import inputs as samples
from tests.networks.test_two_time import inputs, network, stir


def test_qwen_images_masked_tokens_are_not_read():
    net = stir(network("Qwen-Image", None)).eval()
    z, _, t, context, mask = inputs("Qwen-Image")
    mask[0, 4:] = False
    with torch.no_grad():
        u = net(z, t, t, context, mask)
        assert torch.allclose(net(z, t, t, context.masked_fill(~mask[..., None], 9.0), mask), u, atol=1e-5)
        assert not torch.allclose(net(z, t, t, context.flip(0), mask), u, atol=1e-4)


def test_heads_read_the_time_and_the_caption_without_its_padding():
    net = FeatureDiscriminator(stir(generator()), blocks=[0], width=8).eval()
    z, t, context, mask = samples(8)
    t = t + 0.5
    logits = net(z, t, context, mask)
    assert torch.allclose(net(z, t, context.masked_fill(~mask[..., None], 9.0), mask), logits, atol=1e-5)
    assert not torch.allclose(net(z, t / 2, context, mask), logits, atol=1e-4)
    net.backbone.net.forward = lambda z, r, t, context, mask, f=net.backbone.net.forward: f(z, r, t, 0 * context, mask)
    alone = net(z, t, context, mask)
    assert not torch.allclose(net(z, t, context.flip(0), mask.flip(0)), alone, atol=1e-4), (
        "by the heads' own projection"
    )
