"""Images of prompts, from a module and its datamodule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from emf_lightning.evaluation.fixed_noise import fixed_noise

if TYPE_CHECKING:
    from PIL.Image import Image

    from emf_lightning.modules.flow_map import FlowMapModule


@torch.no_grad()
def generate_images(
    module: FlowMapModule,
    prompts: str | Sequence[str],
    steps: int,
    guidance_scale: float | None,
    images_per_prompt: int,
    seed: int,
) -> list[Image]:
    """PIL images of prompts; see ``FlowMapModule.sample``."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or steps < 1 or images_per_prompt < 1:
        raise ValueError(
            f"sample: nothing to generate for {len(prompts)} prompts, steps={steps}, "
            f"images_per_prompt={images_per_prompt}; each must be at least 1"
        )
    from PIL.Image import fromarray

    data, device = _datamodule(module), module.device
    data.move(device)
    captions = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    indices = list(range(images_per_prompt)) * len(prompts)
    shape = (data.latent_channels, data.latent_size, data.latent_size)
    noise = torch.stack([fixed_noise(seed, *pair, shape) for pair in zip(captions, indices, strict=True)])
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with nullcontext() if module.autocast is None else torch.autocast(device.type, module.autocast):
            text, null = data.text_features(captions).to(device), data.null_features().to(device)
            latents = module.sample_latents(text, null, noise.to(device), steps, guidance_scale)
    finally:
        for part, mode in modes.items():
            part.training = mode
    return [fromarray(image) for image in data.decode(latents).cpu().numpy()]


def _datamodule(module: FlowMapModule) -> Any:
    data = module.data or getattr(module._trainer, "datamodule", None)
    if data is None:
        raise ValueError(
            "sample: the module has no datamodule, which encodes prompts and decodes latents: set module.data, or load "
            "the run with load_run(folder)"
        )
    return data
