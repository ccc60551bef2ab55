"""Mean-pooled features of captions, raw, centred and whitened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from emf_lightning.text.base import TextEncoder

VARIANTS = ("raw", "centred", "whitened")
"""Pooled features unchanged; minus their mean over the corpus; centred and scaled to unit covariance."""
SHRINKAGE = 0.05
"""Share of the mean variance that whitening adds to every direction: directions of low variance hold noise."""

Features = NDArray[np.float32]
Array = NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Called with (texts done, texts in all)."""


def pooled_features(
    encoder: TextEncoder, captions: Sequence[str], batch_size: int = 64, on_progress: Progress = lambda *_: None
) -> Features:
    """The mean over each caption's tokens without padding, ``[N, D]``; repeated captions are encoded once.

    Sums run in float64: the same tokens in another order give the same feature.
    """
    unique = list(dict.fromkeys(captions))
    batches = []
    for first in range(0, len(unique), batch_size):
        text = encoder(unique[first : first + batch_size])
        mask = text.mask[..., None].double()
        batches.append(((text.context * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu().numpy())
        on_progress(min(first + batch_size, len(unique)), len(unique))
    numbers = {caption: number for number, caption in enumerate(unique)}
    return np.concatenate(batches)[[numbers[caption] for caption in captions]]


def truncations(encoder: TextEncoder) -> float:
    """The number of captions that ``encoder`` has truncated so far; NaN where it does not count them."""
    return float(getattr(encoder, "truncated", np.nan))


def feature_variants(features: Features, fitted_on: Features) -> Iterator[tuple[str, Array]]:
    """The features ``[N, D]`` in each of ``VARIANTS``, normalised, with mean and covariance of ``fitted_on``.

    One after the other, in float64: features of language models differ in their last digits.
    """
    yield VARIANTS[0], normalise(features.astype(np.float64))
    mean = fitted_on.mean(0, dtype=np.float64)
    centred = features - mean
    # equal features minus their mean leave rounding errors, not a direction
    centred[np.linalg.norm(centred, axis=1) < 1e-6 * np.linalg.norm(mean)] = 0
    yield VARIANTS[1], normalise(centred)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov((fitted_on - mean).T)))
    floor = SHRINKAGE * max(values.mean(), np.finfo(np.float64).tiny)
    yield VARIANTS[2], normalise(centred @ (vectors / np.sqrt(np.maximum(values, 0) + floor)))


def normalise(features: Array) -> Array:
    """``features`` ``[N, D]`` scaled to unit length; zero features stay zero."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, out=np.zeros_like(features), where=lengths > 0)
