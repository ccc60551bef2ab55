"""Control encoders, which carry no information about the caption."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from emf_lightning.text.base import TextEncoder, TextFeatures


class ConstantEncoder(TextEncoder):
    """The same token for every caption: a raw disentanglement of 1, a discriminability of chance.

    Args:
        width: D, the width of the features.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width, self.length = width, 1
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{type(self).__name__} {self.width}".encode()).hexdigest()

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        mask = torch.ones(len(captions), 1, dtype=torch.bool)
        return TextFeatures(torch.ones(len(captions), 1, self.width), mask)
