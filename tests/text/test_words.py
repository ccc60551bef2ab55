import warnings

import pytest
import torch
from torch.nn import functional as F

from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.words import WordEncoder, words_of


def test_a_token_is_the_decayed_sum_of_permuted_neighbours_at_unit_variance():
    encoder = WordEncoder(width=16, length=6, window=2, decay=0.7, position=0.3)
    words = ["a", "red", "cube", "under", "it"]
    P = torch.eye(16, dtype=torch.float64)[encoder._forward_shifts[1]]
    w = [encoder._vector(f"word {word}").double() for word in words]
    for i in range(len(words)):
        token = 0.3 * encoder._vector(f"position {i}").double()
        for k in range(-2, 3):
            if 0 <= i + k < len(words):
                # P^-1 is P's transpose: a word before and the same word after are different directions.
                token = token + 0.7 ** abs(k) * torch.linalg.matrix_power(P if k >= 0 else P.T, abs(k)) @ w[i + k]
        found = encoder([" ".join(words)]).context[0, i]
        torch.testing.assert_close(found.double(), token / token.std(), atol=1e-5, rtol=1e-5)


def test_another_encoder_of_the_same_settings_gives_the_same_features():
    captions = ["a photo of a red cube", "two rings", NULL_CAPTION]
    first, second = WordEncoder(width=32)(captions), WordEncoder(width=32)(list(reversed(captions)))
    assert torch.equal(first.context, second.context.flip(0))
    assert torch.equal(first.mask, second.mask.flip(0))


def test_the_order_of_words_changes_the_tokens():
    encoder = WordEncoder(width=64)
    features = encoder(["red cube and blue ball", "blue cube and red ball"])
    cube = F.cosine_similarity(features.context[0, 1], features.context[1, 1], dim=0)
    assert cube < 0.9


def test_without_window_and_position_it_is_a_bag_of_words():
    encoder = WordEncoder(width=64, length=5, window=0, position=0.0)
    features = encoder(["red cube and blue ball", "blue ball and red cube"])
    assert torch.equal(features.context[0, :2], features.context[1, 3:])


def test_different_words_are_nearly_orthogonal_and_shared_collapses_them():
    caption = ["red cube green ball blue ring star heart"]
    tokens = WordEncoder(width=512, window=0, position=0.0)(caption)
    collapsed = WordEncoder(width=512, window=0, position=0.0, shared=5.0)(caption)

    def largest_and_mean(features):
        rows = F.normalize(features.context[features.mask], dim=1)
        cosines = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
        return cosines.abs().max(), cosines.mean()

    assert largest_and_mean(tokens)[0] < 0.25
    assert largest_and_mean(collapsed)[1] > 0.9


def test_case_and_punctuation_do_not_count():
    encoder = WordEncoder(width=16)
    features = encoder(["A red, red cube!", "a red red cube"])
    assert torch.equal(features.context[0], features.context[1])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red_cube, 2 x!", ["a", "red", "cube", "2", "x"]),
        ("Ein Mädchen im Café", ["ein", "mädchen", "im", "café"]),
        ("Красный круг", ["красный", "круг"]),
        ("赤い円", ["赤", "い", "円"]),
        ("一只红色 fox", ["一", "只", "红", "色", "fox"]),
        ("लाल घन", ["लाल", "घन"]),
        ("cafe\u0301", ["café"]),
        ("a Red heart \u2764\ufe0f on Lego\u2122 ICE", ["a", "red", "heart", "on", "lego", "ice"]),
    ],
)
def test_words_of_every_script_count(caption, words):
    assert words_of(caption) == words
    assert not torch.equal(WordEncoder(16)([caption]).context, WordEncoder(16)([""]).context)


def test_the_null_caption_is_one_token_of_its_own():
    encoder = WordEncoder(width=64)
    null = encoder([NULL_CAPTION])
    assert null.mask.sum() == 1
    assert null.mask[0, 0]
    word = encoder(["null"]).context[0, 0]
    assert F.cosine_similarity(null.context[0, 0], word, dim=0) < 0.9


def test_padding_is_masked_and_zero():
    features = WordEncoder(width=16, length=7)(["two red rings", "a b c d e f g"])
    assert features.context.shape == (2, 7, 16)
    assert features.mask.sum(dim=1).tolist() == [3, 7]
    assert features.mask[0, :3].all()
    assert not features.context[0, 3:].any()


def test_truncated_captions_are_counted_and_warned_of_once():
    encoder = WordEncoder(width=16, length=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["just three words"])
    with pytest.warns(UserWarning, match="raise `length`"):
        features = encoder(["one word too many", "one"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["again one word too many"])
    assert encoder.truncated == 2
    assert torch.equal(features.mask.sum(dim=1), torch.tensor([3, 1]))


@pytest.mark.parametrize(
    "other",
    [{"width": 24}, {"length": 9}, {"window": 2}, {"decay": 0.5}, {"position": 0.0}, {"shared": 1.0}, {"seed": 1}],
    ids=lambda other: next(iter(other)),
)
def test_every_setting_is_in_the_fingerprint(other):
    assert WordEncoder(width=16).fingerprint == WordEncoder(width=16).fingerprint
    assert WordEncoder(**{"width": 16, **other}).fingerprint != WordEncoder(width=16).fingerprint


@pytest.mark.parametrize("bad", [{"width": 4}, {"length": 0}, {"window": -1}], ids=str)
def test_senseless_settings_are_refused(bad):
    with pytest.raises(ValueError, match="WordEncoder"):
        WordEncoder(**bad)


def test_it_is_frozen_and_stays_in_eval_mode():
    encoder = WordEncoder(width=16).train()
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.state_dict()


class Ragged(WordEncoder):
    """Pads to the longest of the batch."""

    def encode(self, captions):
        features = super().encode(captions)
        longest = int(features.mask.sum(1).max())
        return TextFeatures(features.context[:, :longest], features.mask[:, :longest])


def test_an_encoder_of_another_shape_than_it_says_is_named():
    with pytest.raises(ValueError, match=r"Ragged: encode gave features \(1, 2, 8\) .* they are \(1, 6, 8\)"):
        Ragged(width=8, length=6)(["red circle"])
