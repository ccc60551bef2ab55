"""Counts captions that exceed an encoder's length."""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass
class Truncation:
    """Counter of truncated captions.

    Attributes:
        encoder: class name of the encoder, for the warning.
        length: tokens that are kept.
        captions: captions seen.
        truncated: captions that lost their end.
    """

    encoder: str
    length: int
    captions: int = 0
    truncated: int = 0

    def add(self, captions: int, truncated: int) -> None:
        """Counts a batch of ``captions``; warns at the first batch with a truncated one."""
        self.captions += captions
        if truncated and not self.truncated:
            warnings.warn(
                f"{self.encoder}: {truncated} of {self.captions:,} captions so far are longer than "
                f"length={self.length} "
                "tokens and lose their end; raise `length` (counted from here on in `truncated`, without a warning)",
                stacklevel=3,
            )
        self.truncated += truncated
