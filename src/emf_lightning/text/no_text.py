"""Empty text conditioning, for images without captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emf_lightning.text.base import TextEncoder, TextFeatures


class NoText(TextEncoder):
    """One token of zeros for every caption, for unconditional models."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.length = 8, 1
        self.device_marker: torch.Tensor
        self.register_buffer("device_marker", torch.empty(0), persistent=False)
        self.freeze()

    @property
    def fingerprint(self) -> str:
        """A constant: there are no settings."""
        return "no text"

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Zeros ``[B, 1, 8]``."""
        device = self.device_marker.device
        shape = (len(captions), self.length)
        return TextFeatures(
            torch.zeros(*shape, self.width, device=device), torch.ones(shape, dtype=torch.bool, device=device)
        )
