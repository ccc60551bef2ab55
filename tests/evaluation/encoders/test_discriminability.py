from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.evaluation.encoders.discriminability import discriminability
from emf_lightning.evaluation.encoders.features import pooled_features
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.shapes.pairs import ShapesPairs
from emf_lightning.text.words import WordEncoder


class Groups(PairCorpus):
    """Pairs in groups of five: images of one group are the same, others have nothing in common."""

    name = "groups"
    exhaustive = True

    def __init__(self, groups: int = 40) -> None:
        self.group = np.repeat(np.arange(groups), 5)
        self.captions = [f"caption {i}" for i in range(len(self.group))]
        self.owners = np.arange(len(self.group))

    def similarity(self, query, others):
        return (self.group[others] == self.group[query]).astype(float)

    def image(self, pair):
        return np.full((4, 4, 3), self.group[pair], np.uint8)


CORPUS = Groups()
ONE_HOT = np.eye(40, dtype=np.float32)[CORPUS.group]


def score(features, corpus=CORPUS, **arguments):
    return discriminability(features.astype(np.float32), corpus, queries=100, **arguments)


def test_an_encoder_that_knows_the_scene_scores_one_in_every_variant():
    found = score(ONE_HOT)
    assert {name: estimate.mean for name, estimate in found.score.items()} == dict.fromkeys(found.score, 1.0)
    assert found.best == 1
    assert found.chance == pytest.approx(4 / 199)
    assert all(q not in pairs and CORPUS.group[q] == CORPUS.group[pairs[0]] for q, pairs in found.retrieved.items())


def test_constant_and_shuffled_features_score_chance():
    constant = score(np.ones((200, 8)))
    assert all(estimate.low <= constant.chance + 0.02 for estimate in constant.score.values())
    assert all(estimate.mean < 0.08 for estimate in constant.score.values())
    assert score(ONE_HOT).shuffled.mean < 0.1


def test_nearly_parallel_features_are_told_apart():
    # mean-pooled states of language models: all cosines lie within 1e-5 of 1
    noisy = ONE_HOT + np.random.default_rng(0).normal(0, 0.15, ONE_HOT.shape)
    rows = (noisy + 3000 / np.sqrt(40)).astype(np.float32).astype(float)
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (directions @ directions.T).min() > 1 - 1e-5
    plain, hidden = score(noisy), score(rows)
    assert plain.score["raw"].mean > 0.95
    assert hidden.score["raw"].mean > 0.95
    assert hidden.score["centred"].mean == pytest.approx(plain.score["centred"].mean, abs=0.02)


def test_an_encoder_whose_cosines_are_the_scenes_similarities_finds_the_best_there_are():
    corpus = ShapesPairs(count=120)
    alike = np.stack([corpus.similarity(i, np.arange(120)) for i in range(120)])
    values, vectors = np.linalg.eigh(alike)
    assert values.min() > -1e-9, "similarities of scenes are inner products"
    found = score(vectors * np.sqrt(np.maximum(values, 0)), corpus, k=3)
    words = score(pooled_features(WordEncoder(length=10), corpus.captions), corpus, k=3)
    assert found.score["raw"].mean == pytest.approx(found.best, abs=1e-6)
    assert found.chance + 0.1 < words.score["raw"].mean < found.best - 0.1


def test_more_captions_than_there_are_to_find_are_refused():
    corpus = Groups(2)
    assert {len(pairs) for pairs in score(ONE_HOT[:10], corpus, k=9).retrieved.values()} == {9}
    with pytest.raises(ValueError, match="k must be at most 9, got 10"):
        score(ONE_HOT[:10], corpus, k=10)
    corpus.captions[1] = corpus.captions[0]
    with pytest.raises(ValueError, match="k must be at most 8, got 9"):
        score(ONE_HOT[:10], corpus, k=9)


def test_the_querys_own_image_and_equal_captions_are_never_found():
    corpus = Groups()
    corpus.owners = np.arange(200) // 2 * 2  # pairs of one image
    found = score(np.repeat(np.eye(100), 2, axis=0), corpus, k=1)
    assert found.score["raw"].mean < 0.2
    corpus = Groups()
    corpus.captions = [f"caption {i // 5}" for i in range(200)]
    assert score(ONE_HOT, corpus, k=1).score["raw"].mean == 0
