"""Disentanglement of a text encoder: cosine of a prompt's features before and after a removal (arXiv 2604.18168, 3).

A constant encoder has a raw disentanglement of 1: read the raw score beside that of unrelated prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emf_lightning.evaluation.bootstrap import RESAMPLES, Estimate
from emf_lightning.evaluation.encoders.features import Array, Progress, feature_variants, pooled_features, truncations
from emf_lightning.text.base import TextEncoder


@dataclass(frozen=True)
class Disentanglement:
    """Cosine of a prompt's feature and that of the prompt after the removal.

    Attributes:
        ablated: mean cosine by variant of the features; the paper prints the raw one.
        unrelated: mean cosine of two different prompts, by variant.
        contrast: (ablated - unrelated) / (1 - unrelated), by variant: 1 where the removal changes nothing, 0 where it
            changes the feature as much as another prompt does; NaN where all prompts have one feature.
        unseen: share of removals that changed the feature no more than rounding does, e.g. because the encoder had
            truncated the prompt.
        truncated: share of whole prompts that the encoder truncated; NaN where it does not count them.
    """

    ablated: dict[str, Estimate]
    unrelated: dict[str, Estimate]
    contrast: dict[str, Estimate]
    unseen: float
    truncated: float


def disentanglement(
    encoder: TextEncoder,
    prompts: Sequence[str],
    unit: str = "word",
    fraction: float = 0.5,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 64,
    on_progress: Progress = lambda done, total: None,
) -> Disentanglement:
    """Cosines between the features of prompts and those after the removal of a share of words or sentences.

    ``fraction`` is the share of units, ``word`` or ``sentence``, that is removed, at least one and never all; prompts
    with fewer than two are left out. Each of ``seeds`` removes other units.

    Raises:
        ValueError: for fewer than two prompts of two or more units.
    """
    usable = [prompt for prompt in dict.fromkeys(prompts) if len(split_units(prompt, unit)) > 1]
    if len(usable) < 2:
        raise ValueError(f"disentanglement: fewer than two of {len(prompts)} prompts have two {unit}s or more")
    truncated_before = truncations(encoder)
    total = len(usable) * (1 + len(seeds))

    def encode(texts: Sequence[str], done: int) -> NDArray[np.float32]:
        return pooled_features(encoder, texts, batch_size, lambda n, _: on_progress(done + n, total))

    whole = encode(usable, 0)
    truncated = (truncations(encoder) - truncated_before) / len(usable)
    ablated_features = []
    for number, s in enumerate(seeds, 1):
        texts = [remove_units(p, unit, fraction, np.random.default_rng((s, i))) for i, p in enumerate(usable)]
        ablated_features.append(encode(texts, number * len(usable)))
    # the same texts in other batches: the batch's shape changes features by rounding
    again = usable[: max(min(len(usable) // 2, 16), 1)]
    rounding = np.median(_relative_change(whole[: len(again)], pooled_features(encoder, again, batch_size)))
    changes = [_relative_change(whole, part) for part in ablated_features]
    unseen = float(np.mean([change <= max(3 * rounding, 1e-6) for change in changes]))
    ablated, unrelated, contrast = {}, {}, {}
    variants = (feature_variants(part, whole) for part in ablated_features)
    for (name, features), *parts in zip(feature_variants(whole, whole), *variants, strict=True):
        cosines = np.mean([(part * features).sum(1) for _, part in parts], axis=0)
        ablated[name], unrelated[name], contrast[name] = _contrast(cosines, features)
    return Disentanglement(ablated, unrelated, contrast, unseen, truncated)


def split_units(prompt: str, unit: str) -> list[str]:
    """The words or sentences of ``prompt``."""
    if unit == "sentence":
        return [part for part in re.split(r"(?<=[.!?])\s+", prompt.strip()) if part]
    return prompt.split()


def remove_units(prompt: str, unit: str, fraction: float, rng: np.random.Generator) -> str:
    """``prompt`` without a random ``fraction`` of its units; the others keep their order."""
    units = split_units(prompt, unit)
    removed = min(max(round(fraction * len(units)), 1), len(units) - 1)
    kept = np.sort(rng.permutation(len(units))[removed:])
    return " ".join(units[i] for i in kept)


def _relative_change(features: NDArray[np.float32], others: NDArray[np.float32]) -> Array:
    """|others - features| / |features| of each of P features ``[P, D]``, ``[P]``."""
    return np.linalg.norm(others - features, axis=1) / np.maximum(np.linalg.norm(features, axis=1), 1e-12)


def _contrast(cosines: Array, features: Array) -> tuple[Estimate, Estimate, Estimate]:
    """The mean of ``cosines`` ``[P]``, that of every two different ``features`` ``[P, D]``, and their contrast.

    The bootstrap resamples prompts, for all three numbers at once; a prompt that is sampled twice makes no pair with
    itself.
    """
    n, rng, lengths = len(features), np.random.default_rng(0), np.square(features).sum(1)

    def numbers(counts: Array) -> Array:
        """All three numbers of R bootstrap samples, given how often each prompt is in each, ``[R, P]``."""
        ablated, squares = counts @ cosines / n, np.square(counts)
        pairs = n**2 - squares.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):  # a sample of one repeated prompt has no pair
            unrelated = (np.square(counts @ features).sum(1) - squares @ lengths) / pairs
            room = np.where(unrelated < 1 - 1e-6, 1 - unrelated, np.nan)
        return np.stack([ablated, unrelated, (ablated - unrelated) / room])

    uniform = np.full(n, 1 / n)
    resampled = [numbers(rng.multinomial(n, uniform, size=50).astype(float)) for _ in range(RESAMPLES // 50)]
    means = numbers(np.ones((1, n)))[:, 0]
    estimates = zip(means, np.concatenate(resampled, axis=1), strict=True)
    ablated, unrelated, contrast = (Estimate.from_bootstrap(mean, values) for mean, values in estimates)
    return ablated, unrelated, contrast
