from __future__ import annotations

import pytest
import torch

from emf_lightning.networks.lumina2 import Lumina2Architecture, Lumina2FlowMap

SIZE = Lumina2Architecture(16, 2, 1, 2, 1, multiple_of=8, axes_dim_rope=(2, 2, 4), axes_lens=(16, 8, 8))


def test_its_time_and_its_output_are_turned_round_and_masked_tokens_are_not_read():
    torch.manual_seed(0)
    net = Lumina2FlowMap(SIZE, latent_channels=4, latent_size=8, context_width=16).eval()
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    with torch.no_grad():
        u = net(z, t / 2, t, context, mask)
        assert torch.equal(u, -net.model(z, 1 - t, context, mask).sample)
        assert torch.allclose(net(z, t, t, context.masked_fill(~mask[..., None], 9.0), mask), u, atol=1e-5)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_attention_heads=24 must be a multiple of num_kv_heads=7"):
        Lumina2Architecture(num_kv_heads=7)
    with pytest.raises(ValueError, match="more patches along a side than axes_lens"):
        Lumina2FlowMap(SIZE, latent_channels=4, latent_size=32, context_width=16)
    with torch.device("meta"):
        net = Lumina2FlowMap(SIZE, latent_channels=4, latent_size=8, context_width=16)
        z, t, context, mask = torch.empty(1, 4, 8, 8), torch.empty(1), torch.empty(1, 5, 16), torch.ones(1, 5).bool()
        assert net(z, t, t, context, mask).shape == z.shape  # with whole captions


def test_captions_longer_than_its_positions_are_refused():
    net = Lumina2FlowMap(SIZE, latent_channels=4, latent_size=8, context_width=16).eval()
    z, t = torch.randn(1, 4, 8, 8), torch.ones(1)
    for length in (15, 16):
        context, mask = torch.randn(1, length, 16), torch.ones(1, length, dtype=torch.bool)
        if length == 15:
            assert net(z, t, t, context, mask).isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"captions of 16 tokens, .* set data.text.init_args.length to 15"):
                net(z, t, t, context, mask)
