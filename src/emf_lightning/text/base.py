"""What every frozen text encoder offers: captions in, token features and their mask out, and a fingerprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NULL_CAPTION = ""
"""The caption of the unconditional half of classifier-free guidance."""


@dataclass(frozen=True)
class TextFeatures:
    """Token features of B captions.

    Attributes:
        context: ``[B, L, D]``; what it holds where ``mask`` is False is never read.
        mask: ``[B, L]``, bool, True where there is a token.
    """

    context: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, rows: slice | Tensor) -> TextFeatures:
        return TextFeatures(self.context[rows], self.mask[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        """The same features on ``device``, the context as ``dtype``."""
        return TextFeatures(self.context.to(device=device, dtype=dtype), self.mask.to(device=device))

    def expand(self, rows: int) -> TextFeatures:
        """One row repeated ``rows`` times, without a copy."""
        assert len(self) == 1
        return TextFeatures(self.context.expand(rows, -1, -1), self.mask.expand(rows, -1))

    def where(self, keep: Tensor, other: TextFeatures) -> TextFeatures:
        """These rows where ``keep`` ``[B]`` is True, the rows of ``other`` elsewhere."""
        context = torch.where(keep[:, None, None], self.context, other.context.to(self.context.dtype))
        return TextFeatures(context, torch.where(keep[:, None], self.mask, other.mask))

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        """The rows of all parts, in order."""
        return TextFeatures(torch.cat([part.context for part in parts]), torch.cat([part.mask for part in parts]))


class TextEncoder(nn.Module, ABC):
    """A frozen text encoder: always in eval mode, never trained, never in a checkpoint.

    Attributes:
        width: D, channels of a token's features.
        length: L, the fixed number of token positions; shorter captions are padded, longer ones cut and counted.
        view_side: side of the square picture of the whole image from which training features are made, beside the
            caption; None where the caption is all there is.
        builds_on_meta: whether it has its size, and no weights, when it is made on the meta device.
    """

    width: int
    length: int
    view_side: int | None = None
    builds_on_meta: bool = False

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest of all that the features depend on: weights, tokenizer, template, dtype, length."""

    @property
    def variant(self) -> str:
        """What ``encode`` depends on beside the fingerprint, while ``encode_pairs`` does not."""
        return ""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """The features of ``captions``, ``[B, L, D]``; the null caption is the empty string."""

    def encode_pairs(self, captions: Sequence[str], views: Tensor) -> TextFeatures:
        """The features of ``captions`` that training sees, given pictures ``[B, 3, S, S]`` in [-1, 1] of their images.

        Only for encoders with a ``view_side``, S; the others have one kind of features.
        """
        raise NotImplementedError(f"{type(self).__name__} reads captions alone")

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> TextFeatures:
        """``encode`` without a graph."""
        return self.encode(captions)

    def freeze(self) -> None:
        """Ends construction: eval mode for good and no gradient for any parameter."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in eval mode: Lightning puts whatever it finds into train mode."""
        super().train(False)
        return self
