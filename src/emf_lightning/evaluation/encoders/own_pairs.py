"""Caption-image pairs of one's own data for encoder studies."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.sources import HubDataset, open_sources
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.encoders.pair_corpus import Dinov3, PairCorpus


class OwnPairs(PairCorpus):
    """The first pairs of any training data; pairs of equal images count as one image.

    The similarity of two images is the cosine of their DINOv3 features. Without DINOv3 nothing is downloaded: it is the
    cosine of ``RandomFeatures``, each scaled to mean 0 and variance 1 over the pairs, which see colours and textures
    but not content.

    Args:
        shards: as ``data.shards`` of an experiment.
        limit: number of pairs; all are held in memory, 50 kB each.
        dinov3: hub name or local folder of a DINOv3 ViT in transformers' format.
        caption_column: as of ``CaptionImageData``.
        image_column: likewise.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.

    Raises:
        ValueError: for data that cannot be read or hold fewer than two usable pairs; for missing weights.
    """

    exhaustive = True
    side = 128

    def __init__(
        self,
        shards: str | HubDataset | list[str | HubDataset],
        limit: int = 3000,
        dinov3: str | None = None,
        caption_column: str | None = None,
        image_column: str | None = None,
        device: str | None = None,
    ) -> None:
        if limit < 2:
            raise ValueError(f"OwnPairs: limit must be at least 2, got {limit}")
        sources = open_sources(shards, "OwnPairs: shards", caption_column=caption_column, image_column=image_column)
        columns = {"caption_column": caption_column}
        stream = ShardStream(sources, SquareTransform(self.side), 64, limit=limit, **columns)  # type: ignore[arg-type]
        captions, images = list[str](), list[NDArray[np.uint8]]()
        for batch in ShardLoader(stream):
            captions += batch.captions
            images += list(batch.images.permute(0, 2, 3, 1).numpy())
        if len(captions) < 2:
            raise ValueError("OwnPairs: shards hold one usable pair; give two or more")
        self.captions, self._images = captions, [np.ascontiguousarray(image) for image in images]
        digests = [hashlib.sha256(image.tobytes()).digest() for image in self._images]
        self.owners = np.unique(digests, return_inverse=True)[1].astype(np.int64)
        self._vectors = self._random() if dinov3 is None else self._dinov3(dinov3, device)
        how = "random features" if dinov3 is None else str(dinov3).rpartition("/")[2]
        self.name = f"own data, {len(captions):,} pairs, {how}"

    def _random(self) -> NDArray[np.float64]:
        features = RandomFeatures()(self._images).double().numpy()
        scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-9)
        return np.asarray(scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-9))

    def _dinov3(self, model: str, device: str | None) -> NDArray[np.float64]:
        embed = Dinov3(model, device)
        return np.stack([embed(image) for image in self._images])

    def similarity(self, query: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(self._vectors[others] @ self._vectors[query])

    def image(self, pair: int) -> NDArray[np.uint8]:
        return self._images[pair]
