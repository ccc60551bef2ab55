from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from emf_lightning.networks.prediction import PredictReversedVelocity
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.unet import TextUNetFlowMap, UNetArchitecture, UNetDiscriminator, UNetFlowMap
from emf_lightning.pretrained.loading import PretrainedWeights
from tests import pipelines

SMALL = UNetArchitecture([8, 16], [False, True], layers=1, groups=4)
INSTAFLOW = "XCLiu/2_rectified_flow_from_sd_1_5"


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def inputs(channels: int, side: int = 8, batch: int = 3):
    torch.manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    z, t = torch.randn(batch, channels, side, side), torch.rand(batch) * 0.8 + 0.1
    return z, t, torch.randn(batch, 5, 16), mask


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(pipelines.stable_diffusion_15(tmp_path_factory.mktemp("sd15")))


def instaflow(pipeline: str, **settings) -> TextUNetFlowMap:
    return TextUNetFlowMap(
        pretrained=PretrainedWeights(pipeline, "unet"),
        prediction=PredictReversedVelocity(),
        latent_size=8,
        context_width=16,
        **settings,
    ).eval()


def test_published_sizes_build_on_the_meta_device():
    """DDPM's for CIFAR-10, LDM-4's for CelebA-HQ (274 M in arXiv 2112.10752), and Stable Diffusion 1.5's (860 M)."""
    faces = UNetArchitecture([224, 448, 672, 896], [False, True, True, True], head_channels=32)
    with torch.device("meta"):
        assert count(UNetFlowMap()) == 35_746_307
        assert count(UNetFlowMap(faces, latent_channels=3, latent_size=64)) == 274_056_163
        # with four channels in and out, as celebahq.yaml has them
        assert count(UNetFlowMap(faces, latent_channels=4)) == 274_056_163 + 224 * 9 + 224 * 9 + 1
        assert count(TextUNetFlowMap(pretrained=PretrainedWeights(INSTAFLOW, "unet"))) == 859_520_964
        assert count(TextUNetFlowMap()) == 859_520_964


def test_instaflows_network_is_told_1000_t_and_gives_the_way_to_the_data(pipeline):
    stock = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").eval()
    z, t, context, _ = inputs(4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad():
        given = stock(z, 1000 * t, context).sample
        u = instaflow(pipeline)(z, t / 3, t, context, mask)
    assert torch.allclose(u, -given, atol=1e-6)
    at = t.view(-1, 1, 1, 1)
    assert torch.allclose(z - at * u, z + at * given, atol=1e-6), "its own formula for the data"


def test_masked_tokens_are_not_read(pipeline):
    net = instaflow(pipeline)
    z, t, context, mask = inputs(4)
    with torch.no_grad():
        u = net(z, t, t, context, mask)
        assert torch.allclose(net(z, t, t, context.masked_fill(~mask[..., None], 9.0), mask), u, atol=1e-5)
        assert not torch.allclose(net(z, t, t, context.flip(0), mask), u, atol=1e-4)


def test_an_unconditional_network_is_the_stock_one_and_reads_no_caption():
    torch.manual_seed(0)
    net = UNetFlowMap(SMALL, latent_size=8).eval()
    assert isinstance(net.model, UNet2DModel)
    z, t, context, mask = inputs(3)
    with torch.no_grad():
        u = net(z, t / 2, t, context, mask)
        assert torch.equal(u, net.model(z, 1000 * t).sample)
        assert torch.equal(u, net(z, t, t, context.flip(0), mask))


@pytest.mark.parametrize("kind", ["text", "plain"])
def test_weights_survive_the_round_trip_and_say_what_they_mean(tmp_path, kind):
    torch.manual_seed(0)
    build = TextUNetFlowMap if kind == "text" else UNetFlowMap
    common = {"latent_channels": 4, "latent_size": 8, "context_width": 16}
    net = build(SMALL, time_scale=100.0, **common).eval()
    net.save_pretrained(tmp_path)
    z, t, context, mask = inputs(4)
    with torch.no_grad():
        again = build(pretrained=str(tmp_path), time_scale=100.0, **common).eval()
        assert torch.equal(again(z, t, t, context, mask), net(z, t, t, context, mask))
    with pytest.raises(ValueError, match=r"time_scale 100\.0, this experiment has 1000\.0"):
        build(pretrained=str(tmp_path), **common)
    with pytest.raises(ValueError, match="latent channels 4, this experiment has 3"):
        build(pretrained=str(tmp_path), time_scale=100.0, **common | {"latent_channels": 3})
    if kind == "text":
        with pytest.raises(ValueError, match="text feature width 16, this experiment has 8"):
            build(pretrained=str(tmp_path), time_scale=100.0, **common | {"context_width": 8})


def test_gradient_checkpointing_changes_no_gradient(pipeline):
    def gradients(**settings) -> torch.Tensor:
        net = instaflow(pipeline, **settings).train()
        z, t, context, mask = inputs(4)
        net(z, t, t, context, mask).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    assert torch.allclose(gradients(gradient_checkpointing=True), gradients(), atol=1e-7)


def test_the_discriminator_starts_with_the_generators_features(pipeline):
    net = instaflow(pipeline)
    discriminator = UNetDiscriminator(net).eval()
    z, t, context, mask = inputs(4)
    seen = []
    handles = [
        part.mid_block.register_forward_hook(lambda *a: seen.append(a[2])) for part in (net.model, discriminator)
    ]
    with torch.no_grad():
        net(z, t, t, context, mask)
        logits = discriminator(z, t, context, mask)
    for handle in handles:
        handle.remove()
    assert torch.allclose(*seen, atol=1e-5)
    assert logits.shape == (3,)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.nn.init.zeros_(discriminator.conv_in.weight)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "a copy"


def test_what_cannot_be_is_refused_with_the_remedy(pipeline):
    sana = SanaFlowMap(SanaArchitecture())
    with pytest.raises(ValueError, match="take ConvDiscriminator"):
        UNetDiscriminator(sana)
    with pytest.raises(ValueError, match="not both"):
        UNetFlowMap(SMALL, pretrained=pipeline)
    with pytest.raises(ValueError, match="UNetFlowMap: cannot load pretrained='nowhere'"):
        UNetFlowMap(pretrained="nowhere")
    with pytest.raises(ValueError, match="2 stages and attention 1"):
        UNetArchitecture([8, 16], [True])
