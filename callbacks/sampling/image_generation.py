"""Images of the same prompts from the same noise at every step count and guidance scale."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray

from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.evaluation.fixed_noise import fixed_noise
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.text.plain import prompt_texts


@dataclass(frozen=True)
class GeneratedImages:
    """Images of one batch: 8-bit RGB ``[B, H, W, 3]``, their sampling config, and the seconds that sampling took."""

    config: SamplingConfig
    images: NDArray[np.uint8]
    seconds: float


def generate_images(
    trainer: Trainer,
    module: FlowMapModule,
    captions: Sequence[str],
    indices: Sequence[int],
    configs: Sequence[SamplingConfig],
    seed: int,
) -> Iterator[GeneratedImages]:
    """Images of ``captions``, once for each config.

    Args:
        trainer: its datamodule encodes captions and decodes latents.
        module: samples latents; call this function inside ``sampling_context``.
        captions: B captions of one batch.
        indices: B numbers: image i is the ``indices[i]``-th of its caption. Seed, caption and number fix the noise.
        configs: step counts and guidance scales, which all start from the same noise.
        seed: seed of the noise.

    Raises:
        ValueError: where the trainer was given bare loaders.
    """
    data, captions = data_of(trainer), prompt_texts(captions)
    text, null = data.text_features(captions), data.null_features()
    shape = (data.latent_channels, data.latent_size, data.latent_size)
    noises = [fixed_noise(seed, caption, index, shape) for caption, index in zip(captions, indices, strict=True)]
    noise = torch.stack(noises).to(text.context.device)
    for config in configs:
        began = time.perf_counter()
        latents = module.sample_latents(text, null, noise, config.steps, config.guidance_scale)
        images = data.decode(latents).cpu().numpy()  # waits for the device
        yield GeneratedImages(config, images, time.perf_counter() - began)


def data_of(trainer: Trainer) -> CaptionImageData:
    """The trainer's data.

    Raises:
        ValueError: where the trainer was given bare loaders.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, CaptionImageData):
        raise ValueError("sampling images needs CaptionImageData: hand the trainer a datamodule, not loaders")
    return data
