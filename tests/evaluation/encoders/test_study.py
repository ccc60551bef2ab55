from __future__ import annotations

import numpy as np
import pytest
import torch

from emf_lightning.evaluation.encoders.controls import ConstantEncoder
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.encoders.study import (
    Estimate,
    _contrasted,
    discriminability,
    disentanglement,
    pooled_features,
    variants_of,
    without,
)
from emf_lightning.evaluation.shapes.pairs import ShapesPairs
from emf_lightning.text.base import TextEncoder, TextFeatures
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


# -- discriminability -------------------------------------------------------------------------------------------------


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


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [e.low <= 0.3 <= e.high for e in (Estimate.of((rng.random(200) < 0.3).astype(float)) for _ in range(100))]
    assert 0.88 < np.mean(inside) < 0.99


def test_whitened_features_have_no_preferred_direction():
    rows = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32) * [10, 3, 1, 1] + 50
    whitened = dict(variants_of(rows, rows))["whitened"]
    assert np.linalg.norm(whitened, axis=1) == pytest.approx(1)
    spread = np.linalg.eigvalsh(np.cov(whitened.T))
    assert spread.max() < 2 * spread.min()


# -- disentanglement --------------------------------------------------------------------------------------------------

PROMPTS = [
    f"a photo of a {a} {b}" for a in ("red", "blue", "green", "pink") for b in ("cat", "dog", "cup", "car", "bus")
]


def test_a_constant_encoder_has_a_raw_cosine_of_one_and_no_contrast():
    found = disentanglement(ConstantEncoder(), PROMPTS)
    assert found.ablated["raw"].mean == pytest.approx(1)
    assert found.unrelated["raw"].mean == pytest.approx(1)
    assert np.isnan(found.contrast["raw"].mean)
    assert str(found.contrast["raw"]) == ""
    assert found.unseen == 1
    assert np.isnan(found.truncated)


def test_a_bag_of_words_moves_by_what_was_removed():
    encoder = WordEncoder(width=600, window=0, position=0.0)
    found = disentanglement(encoder, PROMPTS, fraction=0.5)
    # of six words, "a" twice, three stay: computed from the words' counts alone, their vectors being nearly orthogonal
    expected = []
    for seed in (0, 1, 2):
        for number, prompt in enumerate(PROMPTS):
            part = without(prompt, "word", 0.5, np.random.default_rng((seed, number))).split()
            words = sorted(set(prompt.split()))
            a, b = (np.array([texts.count(word) for word in words], float) for texts in (prompt.split(), part))
            expected.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.ablated["raw"].mean == pytest.approx(np.mean(expected), abs=0.03)
    assert found.unseen == 0
    assert found.truncated == 0


def test_cut_prompts_and_removals_that_nobody_sees_are_counted():
    long = [f"{prompt} and so on and so on and so on number{i}" for i, prompt in enumerate(PROMPTS)]
    with pytest.warns(UserWarning, match="is cut to length 4"):
        found = disentanglement(WordEncoder(width=16, length=4), long, fraction=0.07, seeds=[0, 1])
    assert found.truncated == 1
    assert found.unseen > 0.4, "most removals are behind the cut"


@pytest.mark.filterwarnings("ignore:.*is cut to length 4")
def test_what_a_batch_does_to_a_feature_is_no_change_of_it():
    class Rounding(WordEncoder):
        """Its features depend in their fourth digit on what else is in the batch."""

        def encode(self, captions):
            text = super().encode(captions)
            rng = np.random.default_rng([len(caption) for caption in captions])
            noise = torch.from_numpy(rng.normal(0, 1e-4, text.context.shape).astype(np.float32))
            return TextFeatures(text.context * (1 + noise), text.mask)

    long = [f"{prompt} and so on and so on and so on number{i}" for i, prompt in enumerate(PROMPTS)]
    exact, found = (
        disentanglement(kind(width=16, length=4), long, fraction=0.07, seeds=[0, 1]) for kind in (WordEncoder, Rounding)
    )
    assert found.unseen == pytest.approx(exact.unseen)
    assert disentanglement(Rounding(width=600), PROMPTS).unseen == 0


def test_intervals_of_unrelated_and_contrast_hold_the_truth_as_often_as_they_say():
    def prompts(count: int, seed: int):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(count, 5)) + np.array([2, 0, 0, 0, 0])
        parts = rows + rng.normal(size=rows.shape)
        rows, parts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, parts))
        return (rows * parts).sum(1), rows

    cosines, rows = prompts(400_000, seed=999)
    unrelated = np.square(rows.mean(0)).sum()
    contrast = (cosines.mean() - unrelated) / (1 - unrelated)
    found = [_contrasted(*prompts(60, seed)) for seed in range(120)]
    for truth, estimates in ((unrelated, [e[1] for e in found]), (contrast, [e[2] for e in found])):
        assert 0.88 < np.mean([e.low <= truth <= e.high for e in estimates]) < 0.99
        assert np.mean([e.mean for e in estimates]) == pytest.approx(truth, abs=0.02)


def test_sentences_may_be_removed():
    prompt = "A cat sits. A dog runs! Is it day?"
    assert without(prompt, "sentence", 0.34, np.random.default_rng(0)) in {
        "A dog runs! Is it day?",
        "A cat sits. Is it day?",
        "A cat sits. A dog runs!",
    }
    with pytest.raises(ValueError, match="fewer than two of 20 prompts have two sentences or more"):
        disentanglement(WordEncoder(width=16), PROMPTS, unit="sentence")


def test_padding_has_no_say():
    class Padded(TextEncoder):
        width, length, fingerprint = 2, 3, "padded"

        def encode(self, captions):
            context = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]).repeat(len(captions), 1, 1)
            return TextFeatures(context, torch.tensor([[True, True, False]]).expand(len(captions), -1))

    np.testing.assert_allclose(pooled_features(Padded(), ["x", "y"]), [[0.5, 0.5], [0.5, 0.5]])


def test_the_same_tokens_in_another_order_give_the_same_feature():
    words = [f"word{i}" for i in range(12)]
    orders = [" ".join(np.random.default_rng(seed).permutation(words)) for seed in range(20)]
    rows = pooled_features(WordEncoder(width=64, window=0, position=0.0), orders)
    assert len(np.unique(rows, axis=0)) == 1
