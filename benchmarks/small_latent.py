"""Trains a small autoencoder on the small shapes world and says what it keeps: 36 x 36 pixels become 9 x 9 x 8 latents.

For flow matching in a latent space: `KLAutoencoder` reads the folder. Options:
`python -m benchmarks.small_latent --help`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import mse_loss

from emf_lightning.data.shapes.scenes import training_scene
from emf_lightning.data.shapes.world import WORLDS
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from emf_lightning.latents.kl import KLAutoencoder

WORLD = WORLDS["small"]
KL_WEIGHT = 1e-6
"""Stable Diffusion's (arXiv 2112.10752), beside a mean squared error."""


def small_autoencoder() -> AutoencoderKL:
    """diffusers' autoencoder with two halvings."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=36,
        mid_block_add_attention=False,
    )


def images_of(arrays: list[np.ndarray]) -> Tensor:
    """Images ``[B, 3, H, W]`` in [-1, 1] from uint8 ``[H, W, 3]``."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(size: int, seed: int) -> Iterator[Tensor]:
    """New scenes for ever, with the tasks' shares of the training set."""
    rng = np.random.default_rng([seed, 1])
    while True:
        yield images_of([training_scene(WORLD, rng).render(WORLD) for _ in range(size)])


def train(model: AutoencoderKL, steps: int, size: int, seed: int) -> None:
    """Mean squared error and a little of the divergence, AdamW, the learning rate on a cosine to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    start = time.perf_counter()
    for step, images in enumerate(islice(batches(size, seed), steps), start=1):
        posterior = model.encode(images).latent_dist
        error = mse_loss(model.decode(posterior.sample()).sample, images)
        loss = error + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}, mse {error.item():.5f}, {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def normalize(model: AutoencoderKL, size: int, seed: int) -> None:
    """Records the shift and the scale that give latents mean 0 and variance 1."""
    latents = model.encode(next(batches(size, seed + 1))).latent_dist.mode()
    model.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def reconstruction_score(autoencoder: KLAutoencoder, size: int) -> tuple[TaskScores, float]:
    """The suite's score of reconstructed scenes, and their mean squared error."""
    suite, verdicts, errors = ShapesSuite(), [], []
    asked = list(suite.images(100))
    for first in range(0, len(asked), size):
        prompts = [image.prompt for image in asked[first : first + size]]
        scenes = images_of([suite.reference_image(prompt, first + number) for number, prompt in enumerate(prompts)])
        kept = autoencoder.decode(autoencoder.encode(scenes))
        errors.append(mse_loss(kept, scenes).item())
        pixels = ((kept + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        verdicts += [(prompt, suite.evaluate(image, prompt)) for image, prompt in zip(pixels, prompts, strict=True)]
    return TaskScores.of(verdicts), sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/shapes/small/autoencoder"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = small_autoencoder()
    train(model, arguments.steps, arguments.batch_size, arguments.seed)
    model.eval()
    normalize(model, 1024, arguments.seed)
    model.save_pretrained(arguments.out)
    scores, error = reconstruction_score(KLAutoencoder(str(arguments.out)), arguments.batch_size)
    print(f"{arguments.out}: reconstructions score {scores.overall:.3f}, mean squared error {error:.5f}")


if __name__ == "__main__":
    main()
