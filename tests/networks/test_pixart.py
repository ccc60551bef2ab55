from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, PixArtTransformer2DModel

from emf_lightning.networks.pixart import PixArtFlowMap
from emf_lightning.networks.prediction import PredictNoise

SCHEDULES = {
    "PixArt": ({}, {"beta_start": 0.0001, "beta_end": 0.02}),
    "Stable Diffusion": (
        {"first_beta": 0.00085, "last_beta": 0.012, "power": 2},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_straight_paths_velocity_is_that_of_the_schedules_noise(name):
    """In float64, with diffusers' schedule as the reference: state, time and velocity of each of its steps."""
    ours, theirs = SCHEDULES[name]
    prediction, scheduler = PredictNoise(**ours), DDPMScheduler(num_train_timesteps=1000, **theirs)
    kept = scheduler.alphas_cumprod.double()  # that diffusers computes in fp32
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    t = sigma / (alpha + sigma)
    x, e = torch.randn(2, 1000, 2, 3, 3, dtype=torch.float64).unbind()
    shape = (-1, 1, 1, 1)
    z = (1 - t).view(shape) * x + t.view(shape) * e
    state = prediction.state(z, t)
    assert (state - alpha.view(shape) * x - sigma.view(shape) * e).abs().max() < 1e-4
    assert (1000 * prediction.time(t) - torch.arange(1000)).abs().max() < 0.02
    assert ((prediction(e.double(), z, t) - (e - x)) * alpha.view(shape)).abs().max() < 1e-5
    exact = torch.tensor(prediction._times, dtype=torch.float64)
    assert torch.equal(1000 * prediction.time(exact), torch.arange(1000).double())
    assert (exact - t).abs().max() < 1e-5


def test_between_its_steps_the_time_grows_steadily_and_at_the_ends_u_is_finite():
    prediction = PredictNoise()
    t = torch.linspace(0, 1, 100_001)
    n = 1000 * prediction.time(t)
    assert (n.diff() >= 0).all() and n[0] == 0 and n[-1] == pytest.approx(999)
    noise = torch.randn(2, 4, 3, 3)
    u = prediction(noise + 0.01, noise, torch.ones(2))
    assert torch.allclose(u, torch.full_like(u, 0.01 * 158.4), rtol=1e-3)
    _, slope = torch.func.jvp(prediction.time, (torch.tensor([0.3, 0.5]),), (torch.ones(2),))
    before, after = prediction.time(torch.tensor([[0.2999, 0.4999], [0.3001, 0.5001]]).double())
    assert torch.allclose(slope.double(), (after - before) / 2e-4, rtol=1e-2)


def test_numbers_of_another_kind_are_the_same_prediction():
    one, other = PredictNoise(steps=10, power=2), PredictNoise(steps=10.0, power=2.0)
    assert vars(one) == vars(other) and repr(vars(one)) == repr(vars(other))


def test_published_weights_are_called_with_the_schedules_state_and_integer_times(tmp_path):
    torch.manual_seed(0)
    PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    ).save_pretrained(str(tmp_path))
    stock = PixArtTransformer2DModel.from_pretrained(str(tmp_path)).eval()
    common = {"pretrained": str(tmp_path), "latent_size": 8, "context_width": 16}
    net = PixArtFlowMap(prediction=PredictNoise(), **common).eval()
    kept = DDPMScheduler(beta_start=0.0001, beta_end=0.02).alphas_cumprod[torch.tensor([100, 700])].double()
    alpha, sigma = (part.sqrt().view(-1, 1, 1, 1) for part in (kept, 1 - kept))
    z_n, context, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    with torch.no_grad():
        noise = stock(z_n, context, torch.tensor([100, 700]), encoder_attention_mask=mask).sample[:, :4].double()
        t = (sigma / (alpha + sigma)).flatten().float()
        u = net((z_n / (alpha + sigma)).float(), t, t, context, mask)
        changed = net((z_n / (alpha + sigma)).float(), t, t, context.masked_fill(~mask[..., None], 9.0), mask)
    x = (z_n - sigma * noise) / alpha
    torch.testing.assert_close(u.double(), noise - x, rtol=1e-3, atol=1e-3)
    assert torch.allclose(u, changed, atol=1e-4), "masked tokens are not read"

    net.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="was trained with prediction 'PredictNoise"):
        PixArtFlowMap(**common | {"pretrained": str(tmp_path / "ours")})


def test_weights_that_take_the_pictures_size_are_refused(tmp_path):
    PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        num_layers=1,
        cross_attention_dim=12,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=True,
    ).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="also take the size of the picture"):
        PixArtFlowMap(pretrained=str(tmp_path), latent_size=8, context_width=16)


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match=r"betas must lie in \(0, 1\)"):
        PredictNoise(first_beta=0.02, last_beta=0.01)
