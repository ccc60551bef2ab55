"""Text encoder with degraded features, to measure how much feature quality matters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from emf_lightning.text.base import TextEncoder, TextFeatures


class DegradedEncoder(TextEncoder):
    """Adds noise and a shared vector to another encoder's features; deterministic.

    Token i of caption c becomes ``(x + noise * n(c, i)) / sqrt(1 + noise^2) + shared * s``, with n and s in
    units of the token's RMS. n is random noise seeded by the caption, so that captions of similar meaning become less
    similar; s is the same for all tokens, so that all captions become more similar.

    Args:
        encoder: encoder whose features are degraded.
        noise: weight of n; the signal's share in the mean over L tokens falls as 1 / (1 + noise^2 / L).
        shared: weight of s.
        seed: of n and s.
    """

    def __init__(self, encoder: TextEncoder, noise: float = 0.0, shared: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if noise < 0 or shared < 0:
            raise ValueError(f"DegradedEncoder: noise and shared must not be negative, got {noise} and {shared}")
        self.encoder = encoder
        self.width, self.length = encoder.width, encoder.length
        self.image_tokens = encoder.image_tokens
        self.noise, self.shared, self.seed = noise, shared, seed
        self.freeze()

    @property
    def fingerprint(self) -> str:
        settings = f"{type(self).__name__} 1 {self.encoder.fingerprint} {self.noise} {self.shared} {self.seed}"
        return hashlib.sha256(settings.encode()).hexdigest()

    @property
    def variant(self) -> str:
        """Variant of the encoder."""
        return self.encoder.variant

    @property
    def truncated(self) -> int:
        """Number of truncated captions so far."""
        return int(getattr(self.encoder, "truncated", 0))

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """The encoder's."""
        return self.encoder.planned_passes()

    def _normal(self, name: str, rows: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest[:16], np.uint64))
        return torch.from_numpy(rng.standard_normal((rows, self.width), np.float32))

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]``, zero where masked, with the encoder's mask."""
        return self._degraded(self.encoder.encode(captions), captions)

    def encode_negative(self, captions: Sequence[str]) -> TextFeatures:
        """Features of negative prompts, as the encoder has them."""
        return self._degraded(self.encoder.encode_negative(captions), captions)

    def _degraded(self, text: TextFeatures, captions: Sequence[str]) -> TextFeatures:
        scale = text.context.square().mean(-1, keepdim=True).sqrt()
        noise = torch.stack([self._normal(f"caption {caption}", self.length) for caption in captions]).to(text.context)
        shared = self._normal("shared", 1).to(text.context)
        noisy = (text.context + self.noise * scale * noise) / (1 + self.noise**2) ** 0.5
        context = noisy + self.shared * scale * shared
        return TextFeatures(context.masked_fill(~text.mask[..., None], 0.0), text.mask)
