from __future__ import annotations

import pytest
import torch

from emf_lightning.data.cache.latent_cache import autoencoder_fingerprint
from emf_lightning.latents.pixels import Pixels

IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("patch_size", [1, 2, 3, 6])
def test_images_come_back_from_patches(patch_size):
    pixels = Pixels(scale=0.5, shift=0.2, patch_size=patch_size)
    latents = pixels.encode(IMAGES)
    side = 12 // patch_size
    assert latents.shape == (2, pixels.channels, side, side) == (2, 3 * patch_size**2, side, side)
    assert pixels.downsampling == patch_size
    assert torch.allclose(pixels.decode(latents), IMAGES, atol=1e-6)


def test_a_position_holds_the_pixels_of_its_patch():
    patch = Pixels(scale=2.0, patch_size=3).encode(IMAGES)[:, :, 1, 2]
    assert torch.equal(patch, 2 * IMAGES[:, :, 3:6, 6:9].flatten(1))


def test_latents_of_patches_have_a_cache_key_of_their_own_and_those_without_the_same_as_ever():
    keys = [autoencoder_fingerprint(Pixels(0.5, 0.2, patch_size=patch_size)) for patch_size in (1, 2, 3)]
    assert len(set(keys)) == 3
    assert keys[0] == "4c404097122171588d3bbd7dc347b34d76d669cdab81b714147b7dabe32242fa", "the key of existing caches"


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"scale": 0.0}, "scale must be positive"), ({"patch_size": 0}, "patch_size must be at least 1")],
)
def test_values_out_of_range_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Pixels(**settings)
