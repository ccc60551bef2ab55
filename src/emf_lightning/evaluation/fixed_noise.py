"""Noise as a function of the prompt and the image index: images of two checkpoints differ by the weights alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def fixed_noise(seed: int, prompt: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of ``shape``, ``(C, H, W)`` of latents, fp32, on the CPU; a function of the arguments.

    It is the same for all step counts, checkpoints, ranks and batch sizes. The global generators are not used. ``seed``
    is that of a whole evaluation, ``index`` the number of the image among those of the prompt.
    """
    digest = hashlib.sha256(f"{seed}\0{index}\0{prompt}".encode()).digest()
    # manual_seed takes 64 bits; drop the top one, which it reads as a sign
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def noise_indices(images: Sequence[tuple[str, int]]) -> list[int]:
    """The ``index`` of ``fixed_noise`` for each of ``images``, (prompt, image index): no two equal prompts share one.

    Where a prompt stands in the list for the first time, it is the image index. The k-th repetition of a prompt takes
    ``k * n + index``, n images of each prompt. ``images`` is the whole list, of all batches and ranks.
    """
    n = 1 + max((index for _, index in images), default=0)
    seen: Counter[tuple[str, int]] = Counter()
    indices = []
    for prompt, index in images:
        indices.append(seen[prompt, index] * n + index)
        seen[prompt, index] += 1
    return indices
