from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel

from emf_lightning.networks.mmdit import MMDiTArchitecture, MMDiTFlowMap
from emf_lightning.pretrained.loading import PretrainedWeights
from tests import pipelines

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(pipelines.stable_diffusion_3(tmp_path_factory.mktemp("sd3")))


def network(pipeline: str, **settings) -> MMDiTFlowMap:
    common = {"latent_channels": 4, "latent_size": 8, "context_width": 40}
    return MMDiTFlowMap(pretrained=PretrainedWeights(pipeline, "transformer"), **common | settings)


def test_published_size_builds_on_the_meta_device():
    """SD3-medium's 2 B."""
    with torch.device("meta"):
        for net in (MMDiTFlowMap(pretrained=PretrainedWeights(SD3, "transformer")), MMDiTFlowMap()):
            assert sum(p.numel() for p in net.parameters()) == 2_028_328_000
            assert len(net.blocks) == 24


def test_the_first_token_is_the_pooled_features_and_time_is_1000_t(pipeline):
    stock = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer").eval()
    net = network(pipeline).eval()
    torch.manual_seed(0)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    pooled, sequence = torch.randn(2, 24), torch.randn(2, 6, 40)
    first = torch.nn.functional.pad(pooled, (0, 16))[:, None]
    context = torch.cat([first, sequence], dim=1)
    with torch.no_grad():
        u = net(z, t / 2, t, context, torch.ones(2, 7, dtype=torch.bool))
        expected = stock(z, sequence, pooled, 1000 * t).sample
    assert torch.allclose(u, expected, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(pipeline):
    def gradients(**settings) -> torch.Tensor:
        torch.manual_seed(0)
        net, context = network(pipeline, **settings).train(), torch.randn(2, 7, 40)
        z, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
        net(z, t, t, context, torch.ones(2, 7, dtype=torch.bool)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    assert torch.allclose(gradients(gradient_checkpointing=True), gradients(), atol=1e-7)


def test_other_weights_are_refused(pipeline):
    with pytest.raises(ValueError, match="text feature width 40, this experiment has 4096"):
        network(pipeline, context_width=4096)
    with pytest.raises(ValueError, match="not both"):
        MMDiTFlowMap(MMDiTArchitecture(), pretrained=pipeline)
