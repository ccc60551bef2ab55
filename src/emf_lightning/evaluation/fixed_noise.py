"""Noise as a function of the prompt and the image index: images of two checkpoints differ by the weights alone."""

from __future__ import annotations

import hashlib

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
