"""Noise that belongs to a prompt and an image index, so that two checkpoints' images differ by the weights alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fixed_noise(seed: int, prompt: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of ``shape``, fp32, on the CPU, a function of the four arguments and nothing else.

    Step counts, checkpoints, ranks and batch sizes therefore share it, and the global generators stay as they are.

    Args:
        seed: of a whole evaluation.
        prompt: the caption.
        index: which of the prompt's images.
        shape: ``(C, H, W)`` of the latents.
    """
    digest = hashlib.sha256(f"{seed}\0{index}\0{prompt}".encode()).digest()
    # manual_seed takes 64 bits; the top one is dropped because it reads it as a sign
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)
