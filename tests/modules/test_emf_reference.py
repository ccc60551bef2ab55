"""EMF's released training and sampling, written down once more from their description and compared with ours."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.normalization import AdaLayerNormSingle
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import LogitNormalTimes, Schedule
from emf_lightning.flow.weighting import AdaptiveWeighting
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import SummedInterval
from emf_lightning.text.base import TextFeatures
from tests import tiny_checkpoints

ROWS = 8


class ReleasedTimes(nn.Module):
    """``time_embed_t`` of raw t plus ``time_embed_r`` of raw t - r, for the blocks and for the output norm."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed_t, self.time_embed_r = AdaLayerNormSingle(16), AdaLayerNormSingle(16)

    def forward(self, timestep, guidance, hidden_dtype=None):
        (a, b), (c, d) = self.time_embed_t(timestep), self.time_embed_r(timestep - guidance)
        return a + c, b + d


@pytest.fixture
def both(tmp_path):
    """The reference network u(z, t, r, c) and ours, from the same checkpoint."""
    stock = tiny_checkpoints.sana(tmp_path / "diffusers")
    torch.manual_seed(5)
    times = ReleasedTimes()
    tiny_checkpoints.blip3o_checkpoint(tmp_path / "emf", tmp_path / "diffusers", stock, dict(times.named_children()))
    reference = SanaTransformer2DModel.from_pretrained(str(tmp_path / "diffusers"), subfolder="transformer")
    reference.time_embed = times
    ours = SanaFlowMap(
        pretrained=str(tmp_path / "emf"),
        interval=SummedInterval(),
        time_scale=1,
        latent_channels=4,
        latent_size=4,
        context_width=16,
    )
    return lambda z, t, r, c: reference(z, c, t, guidance=r, return_dict=False)[0], ours, reference


@pytest.fixture
def batch():
    torch.manual_seed(11)
    seen = torch.ones(ROWS, 7, dtype=torch.bool)
    text, null = TextFeatures(torch.randn(ROWS, 7, 16), seen), TextFeatures(torch.randn(1, 7, 16), seen[:1])
    return CaptionImageBatch(torch.randn(ROWS, 4, 4, 4), text, null, ("a",) * ROWS)


class Progress:
    """The one thing that the objective asks of a trainer: how far training is."""

    def __init__(self, step: int) -> None:
        self.global_step = step


@pytest.mark.parametrize("step", [0, 40, 100])
def test_loss_and_gradient_are_the_releases(both, batch, step):
    u, ours, reference = both
    times = LogitNormalTimes(
        mu=Schedule(-0.5, 0.5), sigma=Schedule(1.0, 2.0), flow_matching_ratio=Schedule(0.75, 0.25), sort_first=True
    )
    module = FlowMapModule(ours, MeanFlow(times=times, weighting=AdaptiveWeighting(1.0, 1e-3)), caption_dropout=0.3)
    module._trainer, module._planned_steps = Progress(step), 100
    module.log = lambda *_, **__: None
    torch.manual_seed(3)
    loss = module.compute_loss(batch)
    loss.backward()

    # sections 1.2 and 1.4 of the method's description, with the same random numbers
    torch.manual_seed(3)
    p = step / 100
    dropped = torch.rand(ROWS) < 0.3
    s1, s2 = (torch.sigmoid(-0.5 + p + (1 + p) * torch.randn(ROWS)) for _ in range(2))
    t, r = torch.maximum(s1, s2), torch.minimum(s1, s2)
    n = round((0.25 + 0.5 * p) * ROWS)  # a count here where the release samples it for each row
    r = torch.cat([r[:n], t[n:]])
    x, e = batch.latents, torch.randn(batch.latents.shape)
    wide = t.view(-1, 1, 1, 1)
    z, v = (1 - wide) * x + wide * e, e - x
    c = torch.where(dropped.view(-1, 1, 1), batch.null.context, batch.text.context)
    out = u(z, t, r, c)
    with sdpa_kernel(SDPBackend.MATH):
        _, dudt = torch.func.jvp(lambda z, r, t: u(z, t, r, c), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    target = (v - (t - r).view(-1, 1, 1, 1) * dudt).detach()
    D = (out - target).square().flatten(1).sum(1)
    expected = (D / (D + 1e-3).detach()).mean()
    expected.backward()

    assert torch.allclose(loss, expected, rtol=1e-5)
    mse = (out - target).square().mean()
    assert torch.allclose(module.last_terms.squared_error.mean(), mse, rtol=1e-4), "the loss is about 1 whatever u is"
    for name, weight in reference.named_parameters():
        place = name.replace("time_embed.time_embed_t.", "time_embed.")
        place = place.replace("time_embed.time_embed_r.", "time_embed.interval.")
        mine = ours.transformer.get_parameter(place).grad
        assert (mine - weight.grad).norm() <= 2e-4 * weight.grad.norm() + 1e-8, name


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_are_the_releases(both, batch, steps):
    u, ours, _ = both
    module = FlowMapModule(ours.eval(), guidance_scale=2.0)
    noise = torch.randn(ROWS, 4, 4, 4)
    latents = module.sample_latents(batch.text, batch.null, noise, steps)
    grid, z = torch.linspace(1, 0, steps + 1), noise
    with torch.no_grad():
        for now, then in zip(grid, grid[1:], strict=False):
            t, r = (torch.full((2 * ROWS,), float(time)) for time in (now, then))
            context = torch.cat([batch.null.context.expand(ROWS, -1, -1), batch.text.context])
            null, text = u(torch.cat([z, z]), t, r, context).chunk(2)
            z = z - (now - then) * (null + 2.0 * (text - null))
    assert torch.allclose(latents, z, atol=1e-4)
    assert not torch.allclose(
        module.sample_latents(batch.text, batch.null, noise, steps, guidance_scale=1.0), latents, atol=1e-3
    )
