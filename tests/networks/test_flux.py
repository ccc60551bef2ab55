from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from emf_lightning.networks.backbone import patches, unpatched
from emf_lightning.networks.flux import FluxArchitecture, FluxFlowMap, _positions
from emf_lightning.networks.two_time.rules import AnchoredInterval
from emf_lightning.pretrained.loading import PretrainedWeights
from tests import pipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(pipelines.flux(tmp_path_factory.mktemp("flux")))


def network(pipeline: str, **settings) -> FluxFlowMap:
    common = {"latent_channels": 4, "latent_size": 8, "context_width": 40}
    return FluxFlowMap(pretrained=PretrainedWeights(pipeline, "transformer"), **common | settings)


def inputs():
    torch.manual_seed(0)
    pooled, sequence = torch.randn(2, 16), torch.randn(2, 6, 40)
    first = torch.nn.functional.pad(pooled, (0, 24))[:, None]
    return torch.randn(2, 4, 8, 12), torch.tensor([0.2, 0.9]), pooled, sequence, torch.cat([first, sequence], dim=1)


def test_latents_are_packed_as_in_the_pipeline():
    z = torch.randn(2, 4, 6, 10)
    packed = FluxPipeline._pack_latents(z, 2, 4, 6, 10)
    assert torch.equal(patches(z, 2), packed)
    assert torch.equal(unpatched(packed, 3, 2), z)
    places = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(_positions(3, 5, torch.device("cpu")), places)


def test_the_network_is_the_stock_one_with_pooled_features_first_and_a_guidance_input(pipeline):
    stock = FluxTransformer2DModel.from_pretrained(pipeline, subfolder="transformer").eval()
    z, t, pooled, sequence, context = inputs()
    places = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    for guidance, told in ((3.5, 3.504), (4.5, 4.512), (1.0, 1.0)):  # 1000 times the latter are numbers of bf16
        net = network(pipeline, guidance=guidance).eval()
        with torch.no_grad():
            u = net(z, t / 2, t, context, torch.ones(2, 7, dtype=torch.bool))
            packed = FluxPipeline._pack_latents(z, 2, 4, 8, 12)
            scale = torch.full((2,), told)
            tokens = stock(packed, sequence, pooled, t, places, torch.zeros(6, 3), scale).sample
            expected = FluxPipeline._unpack_latents(tokens, 64, 96, 8)
        assert torch.equal(u, expected)


def test_a_network_in_bf16_sees_unrounded_times(pipeline):
    """FLUX itself rounds its time: t = .2004 and .2 are one number in bf16."""
    net = network(pipeline, interval=AnchoredInterval()).bfloat16().eval()
    z, _, _, _, context = inputs()
    r, t = torch.tensor([0.2, 0.7]), torch.tensor([0.2004, 0.7001])
    assert torch.equal(r.bfloat16()[:1], t.bfloat16()[:1])
    seen = []
    net.model.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net(z, r, t, context, torch.ones(2, 7, dtype=torch.bool))
    ours = [time for time in seen if time.dtype == torch.float32]
    assert len(ours) == 3
    for time, expected in zip(ours, (1000 * t, 1000 * t - 1000 * r, torch.zeros(2)), strict=True):
        assert torch.equal(time, expected)


def test_impossible_sizes_and_other_weights_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"must be even .* sum attention_head_dim=64, got \[16, 56, 56\]"):
        FluxArchitecture(attention_head_dim=64)
    with pytest.raises(ValueError, match="FluxFlowMap: latents of side 9 do not divide into patches of 2"):
        network(pipeline, latent_size=9)
    with pytest.raises(ValueError, match="latent channels 4, this experiment has 16"):
        network(pipeline, latent_channels=16)
    with pytest.raises(ValueError, match="text feature width 40, this experiment has 4096"):
        network(pipeline, context_width=4096)


@pytest.mark.parametrize("guidance", [3.5, 4.5, 4.0])
def test_guidance_is_the_same_number_in_every_precision(pipeline, guidance):
    net, told = network(pipeline, guidance=guidance).eval(), []
    net.model.time_text_embed.guidance_embedder.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    z, t, _, _, context = inputs()
    mask = torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        net(z, t / 2, t, context, mask)
        with torch.autocast("cpu", torch.bfloat16):
            net(z, t / 2, t, context, mask)
    full, low = (each.float() for each in told)
    torch.testing.assert_close(full, low, rtol=5e-3, atol=5e-3)
