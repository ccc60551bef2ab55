"""How discriminative and how disentangled text encoders are, with what their numbers have to be held against.

The protocol is that of EMF's section 3 (arXiv 2604.18168), where it says one: captions retrieve captions by mean-pooled
token features, and the retrieved images are compared with the query's; a part of a prompt is removed, and its feature
compared with the whole prompt's. Mean-pooled features of language models share a large common direction, so both raw
numbers say little alone: a constant encoder has a disentanglement of 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.text.base import TextEncoder

VARIANTS = ("raw", "centred", "whitened")
"""Pooled features as they are; without their mean over the corpus; moreover scaled to unit covariance."""
RESAMPLES = 1000
SHRINKAGE = 0.05
"""Share of the mean variance that whitening adds to every direction: rare ones hold noise."""
QUANTUM = 1e-9
"""Cosines this close are equal: float64's rounding, and far below what tells nearly parallel features apart."""

Features = NDArray[np.float32]
Rows = NDArray[np.float64]
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, bootstrapped over captions."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[np.floating], seed: int = 0) -> Estimate:
        """The estimate of independent ``values`` ``[N]``."""
        n, rng = len(values), np.random.default_rng(seed)
        return cls.between(float(values.mean()), [values[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)])

    @classmethod
    def between(cls, mean: float, resampled: Sequence[float] | NDArray[np.floating]) -> Estimate:
        """The estimate ``mean`` of which bootstrap samples gave ``resampled``, NaN where one has no value."""
        kept = np.asarray(resampled)[~np.isnan(resampled)]
        low, high = np.quantile(kept, (0.025, 0.975)) if len(kept) and not np.isnan(mean) else (np.nan, np.nan)
        return cls(float(mean), float(low), float(high))

    def __str__(self) -> str:
        return "" if np.isnan(self.mean) else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Discriminability:
    """Mean similarity of the retrieved images to the query's.

    Attributes:
        score: by variant of the features.
        shuffled: of the same features dealt out to other captions: chance, by the same code.
        chance: mean similarity of images at random; NaN where that is costly.
        best: of the most similar images there are; likewise.
        retrieved: pairs that the raw features retrieved for the first queries, query -> pairs.
    """

    score: dict[str, Estimate]
    shuffled: Estimate
    chance: float
    best: float
    retrieved: dict[int, list[int]]


@dataclass(frozen=True)
class Disentanglement:
    """Cosine of a prompt and of what is left of it.

    Attributes:
        ablated: by variant of the features; the raw one is what the paper prints.
        unrelated: mean cosine of two different prompts, by variant.
        contrast: (ablated - unrelated) / (1 - unrelated), by variant: 1 is unmoved, 0 as far as any other prompt; NaN
            where all prompts are alike.
        unseen: share of removals that moved the feature no further than rounding does, e.g. because the encoder had cut
            the prompt off.
        truncated: share of whole prompts that the encoder cut; NaN where it does not count them.
    """

    ablated: dict[str, Estimate]
    unrelated: dict[str, Estimate]
    contrast: dict[str, Estimate]
    unseen: float
    truncated: float


def pooled_features(
    encoder: TextEncoder, captions: Sequence[str], batch_size: int = 64, report: Report = lambda done, total: None
) -> Features:
    """The mean over each caption's tokens, padding left out, ``[N, D]``; a caption that comes again is encoded once.

    Sums are float64's: the same tokens in another order give the same feature.
    """
    unique = list(dict.fromkeys(captions))
    rows = []
    for first in range(0, len(unique), batch_size):
        text = encoder(unique[first : first + batch_size])
        mask = text.mask[..., None].double()
        rows.append(((text.context * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu().numpy())
        report(min(first + batch_size, len(unique)), len(unique))
    numbers = {caption: number for number, caption in enumerate(unique)}
    return np.concatenate(rows)[[numbers[caption] for caption in captions]]


def truncations(encoder: TextEncoder) -> float:
    """How many captions ``encoder`` has cut so far; NaN where it does not count them."""
    return float(getattr(encoder, "truncated", np.nan))


def variants_of(features: Features, fitted_on: Features) -> Iterator[tuple[str, Rows]]:
    """The features in each of ``VARIANTS``, rows of unit length; mean and covariance are those of ``fitted_on``.

    One after the other, in float64: features of language models differ in their last digits.
    """
    yield VARIANTS[0], _unit(features.astype(np.float64))
    mean = fitted_on.mean(0, dtype=np.float64)
    centred = features - mean
    # what is left of equal rows is rounding, not a direction
    centred[np.linalg.norm(centred, axis=1) < 1e-6 * np.linalg.norm(mean)] = 0
    yield VARIANTS[1], _unit(centred)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov((fitted_on - mean).T)))
    floor = SHRINKAGE * max(values.mean(), np.finfo(np.float64).tiny)
    yield VARIANTS[2], _unit(centred @ (vectors / np.sqrt(np.maximum(values, 0) + floor)))


def discriminability(
    features: Features,
    corpus: PairCorpus,
    queries: int = 1000,
    k: int = 2,
    seed: int = 0,
    shown: int = 6,
    limits: bool = True,
) -> Discriminability:
    """What ``k`` nearest captions of each of ``queries`` random ones show.

    Left out are the query's own image, and captions equal to the query's: any encoder finds those. Ties are broken at
    random: captions of equal features are no better than chance between them.

    Args:
        features: ``[N, D]``, pooled, of the corpus's captions.
        corpus: the pairs.
        queries: how many captions ask; all of them where there are fewer.
        k: captions retrieved.
        seed: of the queries, the ties and the shuffle.
        shown: queries whose retrieved pairs are kept.
        limits: whether to look for chance and the best possible, where the corpus makes that cheap.

    Raises:
        ValueError: for more captions than a query may find.
    """
    check_retrieval(corpus, k)
    rng = np.random.default_rng(seed)
    n, own = len(corpus.captions), _own(corpus)
    asked = rng.permutation(n)[: min(queries, n)]
    order = rng.permutation(n)
    scores, retrieved = {}, {}
    for name, rows in variants_of(features, features):
        found = _nearest(rows, asked, own, k, order)
        scores[name] = Estimate.of(_similarities(corpus, asked, found))
        if name == "raw":
            retrieved = {int(q): found[i].tolist() for i, q in enumerate(asked[:shown])}
    shuffled = _nearest(_unit(features[rng.permutation(n)].astype(np.float64)), asked, own, k, order)
    chance = best = float("nan")
    if corpus.exhaustive and limits:
        alike = [corpus.similarity(q, np.flatnonzero((own != own[:, [q]]).all(0))) for q in asked]
        chance = float(np.mean([row.mean() for row in alike]))
        best = float(np.mean([np.sort(row)[-k:].mean() for row in alike]))
    shuffled_score = Estimate.of(_similarities(corpus, asked, shuffled))
    return Discriminability(scores, shuffled_score, chance, best, retrieved)


def check_retrieval(corpus: PairCorpus, k: int) -> None:
    """Raises a ``ValueError`` where some caption has fewer than ``k`` others to find in ``corpus``."""
    alike = np.zeros(len(corpus.captions), np.int64)
    for numbers in _own(corpus):
        _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        alike += counts[places] - 1
    fewest = len(alike) - 1 - int(alike.max())
    if k > fewest:
        raise ValueError(
            f"k must be at most {fewest:,}, got {k:,}: of {len(alike):,} pairs, those of a query's image or "
            "caption are left out"
        )


def disentanglement(
    encoder: TextEncoder,
    prompts: Sequence[str],
    unit: str = "word",
    fraction: float = 0.5,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 64,
    report: Report = lambda done, total: None,
) -> Disentanglement:
    """How much of a prompt's feature survives the removal of a share of its words or sentences.

    Args:
        encoder: of the prompts.
        prompts: P of them, of two units or more; others are left out.
        unit: ``word`` or ``sentence``.
        fraction: share of the units that is removed, at least one and never all.
        seeds: of the removals; each removes others.
        batch_size: prompts encoded at once.
        report: called with (texts encoded, texts in all).

    Raises:
        ValueError: for fewer than two prompts that anything can be removed from.
    """
    usable = [prompt for prompt in dict.fromkeys(prompts) if len(units_of(prompt, unit)) > 1]
    if len(usable) < 2:
        raise ValueError(f"disentanglement: fewer than two of {len(prompts)} prompts have two {unit}s or more")
    cut = truncations(encoder)
    total, done = len(usable) * (1 + len(seeds)), 0

    def encode(texts: Sequence[str]) -> Features:
        nonlocal done
        start = done
        features = pooled_features(encoder, texts, batch_size, lambda n, _: report(start + n, total))
        done += len(texts)
        return features

    whole = encode(usable)
    truncated = (truncations(encoder) - cut) / len(usable)
    parts = [
        encode([without(p, unit, fraction, np.random.default_rng((s, i))) for i, p in enumerate(usable)]) for s in seeds
    ]
    # the same texts among fewer others: what a batch's shape does to a feature is no change of it
    again = usable[: max(min(len(usable) // 2, 16), 1)]
    rounding = np.median(_moved(whole[: len(again)], pooled_features(encoder, again, batch_size)))
    unseen = float(np.mean([_moved(whole, part) <= max(3 * rounding, 1e-6) for part in parts]))
    ablated, unrelated, contrast = {}, {}, {}
    in_step = zip(variants_of(whole, whole), *(variants_of(part, whole) for part in parts), strict=True)
    for (name, rows), *of_parts in in_step:
        cosines = np.mean([(part * rows).sum(1) for _, part in of_parts], axis=0)
        ablated[name], unrelated[name], contrast[name] = _contrasted(cosines, rows)
    return Disentanglement(ablated, unrelated, contrast, unseen, truncated)


def units_of(prompt: str, unit: str) -> list[str]:
    """The words or sentences of ``prompt``."""
    if unit == "sentence":
        return [part for part in re.split(r"(?<=[.!?])\s+", prompt.strip()) if part]
    return prompt.split()


def without(prompt: str, unit: str, fraction: float, rng: np.random.Generator) -> str:
    """``prompt`` without a random ``fraction`` of its units; the others keep their order."""
    units = units_of(prompt, unit)
    removed = min(max(round(fraction * len(units)), 1), len(units) - 1)
    kept = np.sort(rng.permutation(len(units))[removed:])
    return " ".join(units[i] for i in kept)


def _moved(features: Features, others: Features) -> Rows:
    """How far each of ``features`` ``[P, D]`` is from its other, in parts of its own length, ``[P]``."""
    return np.linalg.norm(others - features, axis=1) / np.maximum(np.linalg.norm(features, axis=1), 1e-12)


def _contrasted(cosines: Rows, rows: Rows, seed: int = 0) -> tuple[Estimate, Estimate, Estimate]:
    """The mean of ``cosines`` ``[P]``, that of every two different ``rows`` ``[P, D]``, and the contrast between them.

    Prompts are resampled, and all three move together; one that is drawn twice makes no pair with itself.
    """
    n, rng, lengths = len(rows), np.random.default_rng(seed), np.square(rows).sum(1)

    def numbers(counts: Rows) -> Rows:
        """All three for each of R samples, given how often each prompt is in it, ``[R, P]``."""
        ablated, squares = counts @ cosines / n, np.square(counts)
        pairs = n**2 - squares.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):  # a sample of one prompt alone has no pair
            unrelated = (np.square(counts @ rows).sum(1) - squares @ lengths) / pairs
            room = np.where(unrelated < 1 - 1e-6, 1 - unrelated, np.nan)
        return np.stack([ablated, unrelated, (ablated - unrelated) / room])

    drawn = [numbers(rng.multinomial(n, np.full(n, 1 / n), size=50).astype(float)) for _ in range(RESAMPLES // 50)]
    means, resampled = numbers(np.ones((1, n)))[:, 0], np.concatenate(drawn, axis=1)
    ablated, unrelated, contrast = (Estimate.between(*pair) for pair in zip(means, resampled, strict=True))
    return ablated, unrelated, contrast


def _unit(rows: Rows) -> Rows:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _nearest(
    rows: Rows, asked: NDArray[np.int64], own: NDArray[np.int64], k: int, order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The ``k`` pairs of the largest cosine to each of ``asked``, ``[Q, k]``; ties go by ``order`` ``[N]``.

    Pairs that share a query's number in a row of ``own`` ``[R, N]``, its image's or its caption's, are left out.
    """
    pairs, places, numbers = (torch.from_numpy(part) for part in (rows, order, own))
    found = []
    for first in range(0, len(asked), 128):
        part = torch.from_numpy(asked[first : first + 128])
        # whole numbers, the place behind them: equal but for rounding is equal, and goes by the place
        ranks = (pairs[part] @ pairs.T / QUANTUM).round().long() * len(places) - places
        ranks[(numbers[:, None] == numbers[:, part, None]).any(0)] = torch.iinfo(torch.int64).min
        found.append(ranks.topk(k, dim=1).indices.numpy())
    return np.concatenate(found)


def _own(corpus: PairCorpus) -> NDArray[np.int64]:
    """The numbers of each pair's image and of its caption, ``[2, N]``."""
    numbers = {caption: number for number, caption in enumerate(corpus.captions)}
    return np.stack([corpus.owners, [numbers[caption] for caption in corpus.captions]])


def _similarities(corpus: PairCorpus, asked: NDArray[np.int64], found: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([corpus.similarity(q, row).mean() for q, row in zip(asked, found, strict=True)])
