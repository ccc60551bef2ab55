"""The same prompts from the same noise at every step count and guidance scale."""

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
from emf_lightning.evaluation.reports.figures import step_name
from emf_lightning.modules.flow_map import FlowMapModule


@dataclass(frozen=True)
class Setting:
    """How to draw.

    Attributes:
        steps: network steps from noise to data.
        guidance: scale of classifier-free guidance; None is the module's own.
        label: last part of the tags; ``4step``, or ``4step_cfg2`` for a guidance that is swept beside the main one.
    """

    steps: int
    guidance: float | None
    label: str

    @property
    def heading(self) -> str:
        """What a figure calls it."""
        return step_name(self.steps) + (f", cfg {self.guidance:g}" if "_cfg" in self.label else "")


@dataclass(frozen=True)
class Drawn:
    """Images of one batch: 8-bit RGB ``[B, H, W, 3]``, and the seconds they took with one setting."""

    setting: Setting
    images: NDArray[np.uint8]
    seconds: float


def settings_of(steps: Sequence[int], guidance: Sequence[float] | float | None) -> list[Setting]:
    """Every step count with every guidance scale, the first scale being the main one.

    Raises:
        ValueError: for no step counts, repeated ones, or ones below 1.
    """
    if not steps or len(set(steps)) < len(steps) or min(steps) < 1:
        raise ValueError(f"steps must be different whole numbers from 1 on, got {list(steps)}; e.g. [1, 2, 4]")
    scales: list[float | None] = list(guidance) if isinstance(guidance, Sequence) else [guidance]
    main, *others = scales or [None]
    return [Setting(n, main, f"{n}step") for n in steps] + [
        Setting(n, scale, f"{n}step_cfg{scale:g}") for scale in others for n in steps
    ]


def datamodule_of(trainer: Trainer) -> CaptionImageData:
    """The trainer's datamodule, which encodes captions and decodes latents.

    Raises:
        ValueError: where training runs on bare loaders.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, CaptionImageData):
        raise ValueError("drawing images needs CaptionImageData: hand the trainer a datamodule, not loaders")
    return data


def draw_images(
    module: FlowMapModule,
    data: CaptionImageData,
    captions: Sequence[str],
    indices: Sequence[int],
    settings: Sequence[Setting],
    seed: int,
) -> Iterator[Drawn]:
    """Images of ``captions``, the ``indices[i]``-th of caption i, once for each setting.

    Args:
        module: draws latents; call this inside ``undisturbed``.
        data: encodes captions, decodes latents.
        captions: of one batch.
        indices: which image of its caption each row is; together they choose the noise.
        settings: all get the same noise.
        seed: of the noise.
    """
    text, null = data.text_features(captions), data.null_features()
    shape = (data.latent_channels, data.latent_size, data.latent_size)
    rows = [fixed_noise(seed, caption, index, shape) for caption, index in zip(captions, indices, strict=True)]
    noise = torch.stack(rows).to(text.context.device)
    for setting in settings:
        began = time.perf_counter()
        latents = module.sample_latents(text, null, noise, setting.steps, setting.guidance)
        images = data.decode(latents).cpu().numpy()  # waits for the device
        yield Drawn(setting, images, time.perf_counter() - began)
