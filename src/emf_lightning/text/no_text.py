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
        self.device_marker = torch.nn.Buffer(torch.empty(0), persistent=False)
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return "no text"

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        context = torch.zeros(len(captions), self.length, self.width, device=self.device_marker.device)
        return TextFeatures(context, torch.ones_like(context[..., 0], dtype=torch.bool))
