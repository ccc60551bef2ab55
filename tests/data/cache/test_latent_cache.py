from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emf_lightning.data.cache.latent_cache import LatentCache, autoencoder_fingerprint
from emf_lightning.latents.base import Autoencoder
from emf_lightning.latents.pixels import Pixels


class Linear(Autoencoder):
    """The smallest autoencoder with weights."""

    channels = 5
    downsampling = 2

    def __init__(self, seed: int = 0, factor: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Conv2d(3, 5, 2, stride=2)
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        return self.layer(images) * self.factor

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError


def opened(path: Path, autoencoder: Autoencoder | None = None, transform: str = "plain", **settings) -> LatentCache:
    cache = LatentCache(path, **{"max_gb": 0.01, **settings})
    cache.open(autoencoder or Linear(), 4, transform)
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_latents_come_back_as_they_did_when_they_were_written(tmp_path, dtype):
    cache, latents = opened(tmp_path, dtype=dtype), torch.randn(3, 5, 4, 4)
    cache.store(["a", "b", "c"], latents)
    kept = cache.as_stored(latents)
    again = opened(tmp_path, dtype=dtype)
    found = again.unpack([again.fetch("c"), again.fetch("a")])
    assert torch.equal(found.float(), kept[[2, 0]])
    assert (kept - latents).abs().max() <= {"float32": 0, "bfloat16": 2**-8, "float8": 2**-4}[
        dtype
    ] * latents.abs().max()


def test_another_autoencoder_or_transform_finds_nothing(tmp_path):
    opened(tmp_path).store(["a"], torch.randn(1, 5, 4, 4))
    assert opened(tmp_path).fetch("a") is not None
    for other in (opened(tmp_path, Linear(seed=1)), opened(tmp_path, Linear(factor=0.4))):
        assert other.fetch("a") is None
    assert opened(tmp_path, transform="another").fetch("a") is None


def test_a_fingerprint_is_of_settings_configurations_and_weights():
    from diffusers import AutoencoderKL

    small = {"block_out_channels": (4,), "norm_num_groups": 1, "latent_channels": 2}

    def wrapped(scaling_factor: float) -> Pixels:
        torch.manual_seed(0)
        pixels = Pixels()
        pixels.vae = AutoencoderKL(**small, scaling_factor=scaling_factor)
        return pixels

    prints = [autoencoder_fingerprint(wrapped(0.3)), autoencoder_fingerprint(wrapped(0.4))]
    prints += [autoencoder_fingerprint(Pixels(scale)) for scale in (1.0, 0.5)]
    assert len(set(prints)) == 4
    assert autoencoder_fingerprint(wrapped(0.3)) == prints[0]
    assert autoencoder_fingerprint(Pixels(1)) == prints[2]
    assert autoencoder_fingerprint(Pixels(0.5).train()) == prints[3]


@pytest.mark.parametrize(
    ("one", "other"), [((0, 0), (0.5, 0)), ([1], [2]), ({"mean": (0, 1)}, {"mean": (0, 2)}), (None, (0, 0)), (None, 1)]
)
def test_settings_of_an_own_autoencoder_are_told_apart(one, other):
    def with_setting(value) -> Linear:
        autoencoder = Linear()
        autoencoder.mean = value
        return autoencoder

    prints = [autoencoder_fingerprint(with_setting(value)) for value in (one, other, one)]
    assert prints[0] != prints[1]
    assert prints[0] == prints[2]


class Inner(nn.Module):
    setting = 0


def test_settings_of_parts_of_an_own_autoencoder_and_tensors_are_told_apart():
    def with_settings(**settings) -> Linear:
        autoencoder = Linear()
        autoencoder.inner, autoencoder.tensor, autoencoder._private = Inner(), torch.zeros(2), 1
        for name, value in settings.items():
            setattr(autoencoder.inner if name == "setting" else autoencoder, name, value)
        return autoencoder

    different = [{}, {"setting": 1}, {"tensor": torch.ones(2)}, {"_private": 2}]
    prints = [autoencoder_fingerprint(with_settings(**settings)) for settings in different]
    assert len(set(prints)) == 4
    assert autoencoder_fingerprint(with_settings().train()) == prints[0]
