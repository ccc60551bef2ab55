"""Top-k and top-p sampling of image tokens, with random numbers fixed by the caption."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSampler:
    """Top-k, then top-p (nucleus) sampling; a caption's tokens do not depend on the rest of the batch.

    Of the ``top_k`` likeliest tokens, the smallest set of likeliest ones with at least the share ``top_p`` of the
    probability is kept. ``temperature`` divides the logits. ``seed`` and caption fix the random numbers.
    """

    top_k: int = 1200
    top_p: float = 0.95
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise ValueError(
                f"TokenSampler: needs top_k >= 1, top_p in (0, 1], temperature > 0; got {self.top_k}, {self.top_p}, "
                f"{self.temperature}"
            )

    def uniforms(self, captions: Sequence[str], tokens: int) -> Tensor:
        """Uniform random numbers in [0, 1), ``[B, tokens]``, a function of (seed, caption)."""
        rows = []
        for caption in captions:
            digest = hashlib.sha256(f"{self.seed} {caption}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            rows.append(torch.rand(tokens, generator=generator))
        return torch.stack(rows)

    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens ``[B]`` by inverse transform sampling from ``logits`` ``[B, V]`` with ``uniforms`` ``[B]``."""
        best, tokens = (logits.float() / self.temperature).topk(min(self.top_k, logits.shape[-1]))
        probability = best.softmax(-1)
        before = probability.cumsum(-1) - probability
        share = probability.where(before < self.top_p, 0).cumsum(-1)  # the likeliest is always kept
        place = (share <= uniforms[:, None] * share[:, -1:]).sum(-1, keepdim=True)
        return tokens.gather(1, place.clamp(max=tokens.shape[1] - 1)).squeeze(1)
