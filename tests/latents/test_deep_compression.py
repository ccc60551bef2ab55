from __future__ import annotations

import json

import pytest
import torch

from emf_lightning.latents.deep_compression import DeepCompression
from tests import tiny_checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dc_ae")
    tiny_checkpoints.dc_ae(path)
    return path


def test_latents_and_decoded_images_equal_the_stock_model_s(folder):
    stock = tiny_checkpoints.dc_ae(folder)
    latents = DeepCompression(str(folder))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        code = stock.encode(images).latent
        z = latents.encode(images)
        assert z.shape == (2, latents.channels, 16 // latents.downsampling, 16 // latents.downsampling)
        assert torch.equal(z, code * 0.41407)
        assert torch.equal(latents.decode(z), stock.decode(z / 0.41407).sample.clamp(-1, 1))
        assert not torch.equal(latents.decode(z), latents.decode(0.5 * z))


def test_precision_is_its_own_whatever_autocast_says(folder):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    full, half = DeepCompression(str(folder)), DeepCompression(str(folder), dtype="bfloat16")
    with torch.no_grad():
        alone, low = full.encode(images), half.encode(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(full.encode(images), alone)
    assert alone.dtype == low.dtype == torch.float32
    assert 1e-3 * alone.norm() < (alone - low).norm() < 0.2 * alone.norm()


def test_it_stays_frozen_and_in_eval_mode(folder):
    latents = DeepCompression(str(folder)).train()
    assert not latents.model.training
    assert not any(p.requires_grad for p in latents.parameters())


def test_published_autoencoder_has_its_size_on_the_meta_device():
    """f32c32 of SANA-1.5: 312 M parameters (its model card's 1.25 GB of fp32)."""
    with torch.device("meta"):
        latents = DeepCompression("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers")
    assert sum(p.numel() for p in latents.parameters()) == 312_250_275
    assert (latents.channels, latents.downsampling, latents.scale) == (32, 32, 0.41407)


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_a_name_without_weights_is_one_sentence(tmp_path, name):
    with pytest.raises(ValueError, match=f"cannot load vae of pretrained='{name}'.*subfolder"):
        DeepCompression(name)


def test_weights_of_another_size_are_refused(tmp_path):
    tiny_checkpoints.dc_ae(tmp_path)
    config = json.loads((tmp_path / "vae/config.json").read_text())
    config["encoder_layers_per_block"] = [2, 1, 1]
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"DeepCompression: vae of pretrained=.* lacks .* of the weights"):
        DeepCompression(str(tmp_path))
