"""Base class of frozen text encoders, the token features that they return, and the count of truncated captions."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emf_lightning.text.plain import prompt_texts

NULL_CAPTION = ""
"""The caption of the unconditional half of classifier-free guidance."""

Device = torch.device | str | None


@dataclass(frozen=True)
class TextFeatures:
    """Token features of B captions.

    Attributes:
        context: ``[B, L, D]``; positions where ``mask`` is False are never read.
        mask: ``[B, L]``, bool, True for tokens, False for padding.
    """

    context: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:  # tokenizers' are whole numbers, by which indexing means something else
            object.__setattr__(self, "mask", self.mask.bool())

    def __len__(self) -> int:
        return len(self.context)

    @property
    def conditioning(self) -> tuple[Tensor, Tensor]:
        """The context and the mask, as networks and discriminators take them."""
        return self.context, self.mask

    def __getitem__(self, index: slice | Tensor) -> TextFeatures:
        return TextFeatures(self.context[index], self.mask[index])

    def to(self, device: Device = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> TextFeatures:
        """The same features on ``device``, the context as ``dtype``; only the context moves without blocking."""
        context = self.context.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return TextFeatures(context, self.mask.to(device=device))

    def pin_memory(self) -> TextFeatures:
        """The same features, the context in page-locked memory."""
        return TextFeatures(self.context.pin_memory(), self.mask)

    def expand(self, count: int) -> TextFeatures:
        """The features of one caption repeated ``count`` times, without a copy."""
        assert len(self) == 1
        return TextFeatures(self.context.expand(count, -1, -1), self.mask.expand(count, -1))

    def where(self, keep: Tensor, other: TextFeatures) -> TextFeatures:
        """These features where ``keep`` ``[B]`` is True, those of ``other`` elsewhere."""
        context = torch.where(keep[:, None, None], self.context, other.context.to(self.context.dtype))
        return TextFeatures(context, torch.where(keep[:, None], self.mask, other.mask))

    def finite_or(self, other: TextFeatures) -> tuple[TextFeatures, Tensor]:
        """These features where those of all tokens are finite, those of ``other`` elsewhere, and where, ``[B]``."""
        finite = (self.context.isfinite().all(2) | ~self.mask).all(1)
        return self.where(finite, other), finite

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        """The features of all parts, concatenated along the batch."""
        return TextFeatures(torch.cat([part.context for part in parts]), torch.cat([part.mask for part in parts]))


@dataclass
class Truncation:
    """Counter of the captions that ``encoder``, a class name for the warning, has seen, and of those it truncated."""

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
                f"length={self.length} tokens and lose their end; raise `length` (counted from here on in `truncated`, "
                "without a warning)",
                stacklevel=3,
            )
        self.truncated += truncated


class TextEncoder(nn.Module, ABC):
    """A frozen text encoder: always in eval mode, never trained, never in a checkpoint.

    Attributes:
        width: D, channels of a token's features.
        length: L, fixed number of token positions; shorter captions are padded, longer ones truncated and counted.
        image_size: side of the square images that ``encode_pairs`` reads beside captions in training; None if the
            encoder reads captions alone.
        image_tokens: tokens of the image of a pair, numbers of 16 bit; 0 if the encoder reads captions alone.
    """

    width: int
    length: int
    image_size: int | None = None
    image_tokens: int = 0
    _truncation: Truncation

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that the features depend on: weights, tokenizer, template, dtype, length.

        It does not depend on the folder, file or hub name that the weights come from.
        """

    @property
    def truncated(self) -> int:
        """Number of truncated captions so far; missing if the encoder does not count them."""
        return self._truncation.truncated

    @property
    def variant(self) -> str:
        """Settings, beside the fingerprint, on which ``encode`` depends but ``encode_pairs`` does not."""
        return ""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]`` of ``captions``, float32; the null caption is the empty string."""

    def encode_negative(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]`` of negative prompts, by default those of captions.

        Encoders that put an instruction before each caption leave it out here, as their models' pipelines do.
        """
        return self.encode(captions)

    def encode_pairs(self, captions: Sequence[str], images: Tensor) -> TextFeatures:
        """Training features ``[B, L, D]``, float32, of ``captions`` and their whole images ``[B, 3, S, S]`` in [-1, 1].

        Only for encoders with an ``image_size``, S; the others have one kind of features.
        """
        raise NotImplementedError(f"{type(self).__name__} reads captions alone")

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """The passes of one caption, which `emf plan` runs on the meta device to count their operations.

        For an encoder of captions and images, the first one is the image's into tokens. Without any, `emf plan` counts
        two operations for each weight and token.
        """
        return ()

    @torch.no_grad()
    def forward(self, captions: Sequence[str], negative: bool = False) -> TextFeatures:
        """``encode`` or ``encode_negative`` without gradients, of texts that are made fit by ``prompt_texts``."""
        features = (self.encode_negative if negative else self.encode)(prompt_texts(captions, "captions"))
        wanted, found = (len(captions), self.length, self.width), tuple(features.context.shape)
        if found != wanted or tuple(features.mask.shape) != wanted[:2]:
            raise ValueError(
                f"{type(self).__name__}: encode gave features {found} with a mask {tuple(features.mask.shape)} for "
                f"{len(captions)} captions; by its length and width they are {wanted} and {wanted[:2]}"
            )
        return features.to(dtype=torch.float32)

    def freeze(self) -> None:
        """Ends construction: permanent eval mode, no gradient for any parameter."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in eval mode, although Lightning puts every submodule into train mode."""
        super().train(False)
        return self
