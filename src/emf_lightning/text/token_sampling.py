"""How image tokens are drawn from a language model's logits: top-k, then top-p, with numbers fixed by the caption."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSampler:
    """Top-k and nucleus sampling; the tokens of a caption do not depend on its neighbours in the batch.

    Attributes:
        top_k: how many of the likeliest tokens are left.
        top_p: of these, as many of the likeliest as it takes for this share of the probability.
        temperature: divides the logits.
        seed: of the numbers that choose; together with the caption it fixes them.
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

    def chances(self, captions: Sequence[str], tokens: int) -> Tensor:
        """Uniform numbers in [0, 1), ``[B, tokens]``: one for each token of each caption."""
        rows = []
        for caption in captions:
            digest = hashlib.sha256(f"{self.seed} {caption}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            rows.append(torch.rand(tokens, generator=generator))
        return torch.stack(rows)

    def draw(self, logits: Tensor, chances: Tensor) -> Tensor:
        """Tokens ``[B]`` from ``logits`` ``[B, V]``: where ``chances`` ``[B]`` fall into the cumulative probability."""
        best, tokens = (logits.float() / self.temperature).topk(min(self.top_k, logits.shape[-1]))
        probability = best.softmax(-1)
        before = probability.cumsum(-1) - probability
        share = probability.where(before < self.top_p, 0).cumsum(-1)  # the likeliest is always left
        place = (share <= chances[:, None] * share[:, -1:]).sum(-1, keepdim=True)
        return tokens.gather(1, place.clamp(max=tokens.shape[1] - 1)).squeeze(1)
