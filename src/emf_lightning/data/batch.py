"""Encoded batch of a training step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emf_lightning.text.base import TextFeatures


@dataclass(frozen=True)
class CaptionImageBatch:
    """B encoded caption-image pairs.

    Attributes:
        latents: x, ``[B, C, H, W]``, fp32.
        text: features of the B captions.
        null: features of the null caption, ``[1, L, D]``.
        captions: the B captions.
        sampling: features of B other captions, of which an objective draws its samples; None takes ``text``.
    """

    latents: Tensor
    text: TextFeatures
    null: TextFeatures
    captions: tuple[str, ...]
    sampling: TextFeatures | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CaptionImageBatch:
        """This batch on ``device``; Lightning moves every object with this method."""
        latents = self.latents.to(device, non_blocking=non_blocking)
        sampling = None if self.sampling is None else self.sampling.to(device)
        return CaptionImageBatch(latents, self.text.to(device), self.null.to(device), self.captions, sampling)

    def without_bad_features(self) -> CaptionImageBatch:
        """This batch, where captions whose features are not finite have the null caption's, and latents of NaN.

        Objectives leave samples of such latents out, but features reach all gradients through the network.
        """
        text, good = self.text.finite_or(self.null)
        latents = torch.where(good[:, None, None, None], self.latents, torch.nan)
        sampling = None if self.sampling is None else self.sampling.finite_or(self.null)[0]
        return replace(self, latents=latents, text=text, sampling=sampling)

    def parts(self, count: int) -> list[CaptionImageBatch]:
        """Splits the batch into at most ``count`` batches of nearly equal size."""
        size = -(-len(self) // count)
        slices = [slice(first, first + size) for first in range(0, len(self), size)]
        return [
            CaptionImageBatch(
                self.latents[s], self.text[s], self.null, self.captions[s], self.sampling and self.sampling[s]
            )
            for s in slices
        ]
