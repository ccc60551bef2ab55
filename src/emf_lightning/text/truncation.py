"""Counting the captions that do not fit an encoder's length."""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass
class Truncation:
    """How many captions lost their end so far.

    Attributes:
        encoder: the class that cuts, for the warning.
        length: tokens that fit.
        captions: captions seen.
        cut: those of them that did not fit.
    """

    encoder: str
    length: int
    captions: int = 0
    cut: int = 0

    def add(self, captions: int, cut: int) -> None:
        """Counts a batch; warns at the first one with a caption that does not fit."""
        self.captions += captions
        if cut and not self.cut:
            warnings.warn(
                f"{self.encoder}: {cut} of {self.captions:,} captions so far are longer than length={self.length} "
                "tokens and lose their end; raise `length` (counted from here on in `truncated`, without a warning)",
                stacklevel=3,
            )
        self.cut += cut
