from __future__ import annotations

import numpy as np
import pytest
import torch

from emf_lightning.evaluation.encoders.controls import ConstantEncoder
from emf_lightning.evaluation.encoders.disentanglement import _contrast, disentanglement, remove_units
from emf_lightning.text.base import TextFeatures
from emf_lightning.text.words import WordEncoder

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
            part = remove_units(prompt, "word", 0.5, np.random.default_rng((seed, number))).split()
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
    found = [_contrast(*prompts(60, seed)) for seed in range(120)]
    for truth, estimates in ((unrelated, [e[1] for e in found]), (contrast, [e[2] for e in found])):
        assert 0.88 < np.mean([e.low <= truth <= e.high for e in estimates]) < 0.99
        assert np.mean([e.mean for e in estimates]) == pytest.approx(truth, abs=0.02)


def test_sentences_may_be_removed():
    prompt = "A cat sits. A dog runs! Is it day?"
    assert remove_units(prompt, "sentence", 0.34, np.random.default_rng(0)) in {
        "A dog runs! Is it day?",
        "A cat sits. Is it day?",
        "A cat sits. A dog runs!",
    }
    with pytest.raises(ValueError, match="fewer than two of 20 prompts have two sentences or more"):
        disentanglement(WordEncoder(width=16), PROMPTS, unit="sentence")
