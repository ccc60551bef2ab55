"""Text features that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from emf_lightning.data.cache.entry_cache import EntryCache
from emf_lightning.text.base import NULL_CAPTION, TextEncoder, TextFeatures


class FeatureCache(EntryCache):
    """The features of captions that any process has encoded before, by encoder and caption.

    Features that training makes from a caption and its image go by both (``pair_name``). The null caption is an entry
    like any other. For the arguments see ``EntryCache``.
    """

    def open(self, encoder: TextEncoder) -> None:
        """Binds the cache to ``encoder``; warns if the disk is smaller than ``max_gb``.

        Raises:
            ValueError: if the folder cannot be written to or holds something else.
        """
        self._open(encoder.fingerprint, encoder.length, encoder.width)
        self._variant = encoder.variant

    def store(self, captions: Sequence[str], features: TextFeatures) -> None:
        """Writes rows that are not there intact already, in one transaction; at the size limit, warns and stops."""
        self._keep(captions, features.context, features.mask)

    def keep(self, captions: Sequence[str], features: TextFeatures) -> TextFeatures:
        """What ``store`` wrote, as it will come back: rounded to ``dtype``, zero where masked; float32 on the CPU."""
        features = features.to("cpu")
        self.store(captions, features)
        context = self.entries.rounded(features.context).masked_fill_(~features.mask[..., None], 0.0)
        return TextFeatures(context, features.mask)

    def unpack(self, entries: Sequence[bytes]) -> TextFeatures:
        """The features of fetched entries, in the dtype that they are stored in (float8: bfloat16)."""
        return TextFeatures(*self.entries.unpack(entries))

    def features(self, captions: Sequence[str], encode: Callable[[Sequence[str]], TextFeatures]) -> TextFeatures:
        """The features of ``captions``, float32 on the CPU; ``encode`` gets those not found, each once, in one call.

        What was just encoded comes back as it will from the store.
        """
        entries = [self.fetch(self._name(caption)) for caption in captions]
        found = self.unpack([entry for entry in entries if entry is not None]).to(dtype=torch.float32)
        missing = list(dict.fromkeys(c for c, entry in zip(captions, entries, strict=True) if entry is None))
        if not missing:
            return found
        fresh = self.keep([self._name(caption) for caption in missing], encode(missing))
        place = {caption: len(found) + row for row, caption in enumerate(missing)}
        hits = iter(range(len(found)))
        rows = [place[c] if entry is None else next(hits) for c, entry in zip(captions, entries, strict=True)]
        return TextFeatures.cat([found, fresh])[torch.tensor(rows)]

    def _name(self, caption: str) -> str:
        """Under which features of a caption alone are kept; the null caption's are the same in each variant."""
        return pair_name(caption, f"\0{self._variant}") if self._variant and caption != NULL_CAPTION else caption


def pair_name(caption: str, picture: str) -> str:
    """Under which features of a caption and the picture called ``picture`` are kept."""
    return f"{caption}\0{picture}"
