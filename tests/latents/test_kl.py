from __future__ import annotations

import pytest
import torch

from emf_lightning.latents.kl import KLAutoencoder
from tests import pipelines


@pytest.fixture(params=[{"scaling_factor": 0.18215}, {"scaling_factor": 1.5305, "shift_factor": 0.0609}])
def case(request, tmp_path):
    return pipelines.vae(tmp_path, **request.param), KLAutoencoder(str(tmp_path)), request.param


def test_latents_are_the_scaled_mean_and_decode_as_the_stock_model_does(case):
    stock, latents, settings = case
    scale, shift = settings["scaling_factor"], settings.get("shift_factor", 0.0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = stock.encode(images).latent_dist.mean
        z = latents.encode(images)
        assert z.shape == (2, latents.channels, 16 // latents.downsampling, 16 // latents.downsampling)
        assert torch.allclose(z, (mean - shift) * scale, atol=1e-6)
        assert torch.equal(latents.encode(images), z), "an image has one latent"
        assert torch.allclose(latents.decode(z), stock.decode(mean).sample.clamp(-1, 1), atol=1e-4)


def test_tiles_change_decoded_images_and_no_latents(tmp_path):
    pipelines.vae(tmp_path, sample_size=16)
    whole, tiled = KLAutoencoder(str(tmp_path)), KLAutoencoder(str(tmp_path), tiling=True)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    z = whole.encode(images)
    assert torch.equal(tiled.encode(images), z), "both share the entries of a cache"
    assert not torch.equal(tiled.decode(z), whole.decode(z))
    assert tiled.model.use_tiling


def test_it_stays_frozen_and_in_eval_mode(case):
    latents = case[1].train()
    assert not latents.model.training
    assert not any(p.requires_grad for p in latents.parameters())


@pytest.mark.parametrize(
    ("name", "subfolder", "size", "channels", "scale"),
    [
        ("stabilityai/sd-vae-ft-mse", None, 83_653_863, 4, 0.18215),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "vae", 83_819_683, 16, 1.5305),
    ],
)
def test_published_autoencoders_have_their_size_on_the_meta_device(name, subfolder, size, channels, scale):
    with torch.device("meta"):
        latents = KLAutoencoder(name, subfolder)
    assert sum(p.numel() for p in latents.parameters()) == size
    assert (latents.channels, latents.downsampling, latents.scale) == (channels, 8, scale)


def test_a_name_without_weights_is_one_sentence():
    with pytest.raises(ValueError, match="KLAutoencoder: cannot load pretrained='nowhere'"):
        KLAutoencoder("nowhere")
