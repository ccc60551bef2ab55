"""Cache of text features."""

from __future__ import annotations

from torch import Tensor

from emf_lightning.data.cache.entry_cache import EntryCache
from emf_lightning.text.base import NULL_CAPTION, TextEncoder, TextFeatures


class FeatureCache(EntryCache[TextFeatures]):
    """Text features that any process has computed before, by encoder and caption, or by encoder, caption and image.

    The null caption has an entry like any other. For the arguments see ``EntryCache``.
    """

    def open(self, encoder: TextEncoder) -> None:
        """Binds the cache to ``encoder``; warns if the disk is smaller than ``max_gb``."""
        self._open(encoder.fingerprint, encoder.length, encoder.width)
        self._variant = encoder.variant

    def key(self, caption: str, image: str | None = None) -> str:
        """Key of the features of ``caption`` alone, or of ``caption`` and the image named ``image``.

        Features of captions alone depend on the encoder's variant, except for the null caption's.
        """
        if image is None and self._variant and caption != NULL_CAPTION:
            image = f"\0{self._variant}"
        return caption if image is None else f"{caption}\0{image}"

    def to_tokens(self, values: TextFeatures) -> tuple[Tensor, Tensor]:
        return values.context, values.mask

    def from_tokens(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        return TextFeatures(tokens, mask)
