"""Discriminability of a text encoder: similarity of images whose captions have near features (arXiv 2604.18168, 3).

Mean-pooled features of language models share a large common direction: read the raw score beside the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from emf_lightning.evaluation.bootstrap import Estimate
from emf_lightning.evaluation.encoders.features import Array, Features, feature_variants, normalise
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus

QUANTUM = 1e-9
"""Cosines this close are equal: float64's rounding, and far below the differences of nearly parallel features."""
SHOWN = 6
"""Queries whose retrieved pairs are kept."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Discriminability:
    """Mean similarity of the retrieved images to the query's.

    Attributes:
        score: by variant of the features.
        shuffled: mean similarity with the features assigned to other captions at random: chance, by the same code.
        chance: mean similarity of random images; NaN where that is costly.
        best: mean similarity of the most similar images in the corpus; NaN where that is costly.
        retrieved: query -> pairs that the raw features retrieved, for the first queries.
    """

    score: dict[str, Estimate]
    shuffled: Estimate
    chance: float
    best: float
    retrieved: dict[int, list[int]]


def discriminability(
    features: Features, corpus: PairCorpus, queries: int = 1000, k: int = 2, limits: bool = True
) -> Discriminability:
    """Mean similarity of the images of the ``k`` nearest captions of each of ``queries`` random ones.

    Retrieval leaves out the query's own image and captions equal to the query's, which any encoder finds. Ties are
    broken at random, so that captions of equal features score chance.

    All captions are queries where there are fewer than ``queries``. ``features`` ``[N, D]`` are pooled. ``limits`` asks
    for chance and the best possible score, where the corpus makes them cheap.

    Raises:
        ValueError: for a ``k`` above the number of captions that a query may retrieve.
    """
    check_retrieval(corpus, k)
    rng = np.random.default_rng(0)
    n, ids = len(corpus.captions), _image_and_caption_ids(corpus)
    asked = rng.permutation(n)[: min(queries, n)]
    order = rng.permutation(n)
    scores, retrieved = {}, {}
    for name, variant in feature_variants(features, features):
        found = _nearest(variant, asked, ids, k, order)
        scores[name] = Estimate.from_samples(_similarities(corpus, asked, found))
        if name == "raw":
            retrieved = {int(q): found[i].tolist() for i, q in enumerate(asked[:SHOWN])}
    shuffled = _nearest(normalise(features[rng.permutation(n)].astype(np.float64)), asked, ids, k, order)
    chance = best = float("nan")
    if corpus.exhaustive and limits:
        similarities = [corpus.similarity(q, np.flatnonzero((ids != ids[:, [q]]).all(0))) for q in asked]
        chance = float(np.mean([of_query.mean() for of_query in similarities]))
        best = float(np.mean([np.sort(of_query)[-k:].mean() for of_query in similarities]))
    shuffled_score = Estimate.from_samples(_similarities(corpus, asked, shuffled))
    return Discriminability(scores, shuffled_score, chance, best, retrieved)


def check_retrieval(corpus: PairCorpus, k: int) -> None:
    """Raises a ``ValueError`` where some caption has fewer than ``k`` others to retrieve in ``corpus``."""
    excluded = np.zeros(len(corpus.captions), np.int64)
    for ids in _image_and_caption_ids(corpus):
        _, places, counts = np.unique(ids, return_inverse=True, return_counts=True)
        excluded += counts[places] - 1
    fewest = len(excluded) - 1 - int(excluded.max())
    if k > fewest:
        raise ValueError(
            f"k must be at most {fewest:,}, got {k:,}: of {len(excluded):,} pairs, those of a query's image or "
            "caption are left out"
        )


def _nearest(features: Array, asked: Ids, ids: Ids, k: int, order: Ids) -> Ids:
    """The ``k`` pairs of the largest cosine to each of ``asked``, ``[Q, k]``; ties go by ``order`` ``[N]``.

    Pairs that share an image or caption id, ``ids`` ``[2, N]``, with the query are left out.
    """
    vectors, places, numbers = (torch.from_numpy(part) for part in (features, order, ids))
    found = []
    for first in range(0, len(asked), 128):
        part = torch.from_numpy(asked[first : first + 128])
        # integers that hold the rounded cosine, then the place: equal cosines are ordered by place
        ranks = (vectors[part] @ vectors.T / QUANTUM).round().long() * len(places) - places
        ranks[(numbers[:, None] == numbers[:, part, None]).any(0)] = torch.iinfo(torch.int64).min
        found.append(ranks.topk(k, dim=1).indices.numpy())
    return np.concatenate(found)


def _image_and_caption_ids(corpus: PairCorpus) -> Ids:
    """The ids of each pair's image and caption, ``[2, N]``."""
    numbers = {caption: number for number, caption in enumerate(corpus.captions)}
    return np.stack([corpus.owners, [numbers[caption] for caption in corpus.captions]])


def _similarities(corpus: PairCorpus, asked: Ids, found: Ids) -> Array:
    """The mean similarity of each query's retrieved images to its own, ``[Q]``."""
    return np.array([corpus.similarity(q, pairs).mean() for q, pairs in zip(asked, found, strict=True)])
