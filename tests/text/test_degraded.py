from __future__ import annotations

import pytest
import torch

from emf_lightning.text.degraded import DegradedEncoder
from emf_lightning.text.words import WordEncoder

CAPTIONS = ["a red circle", "a blue square above a ring", ""]
WORDS = WordEncoder(width=64, length=8)


def test_without_noise_and_sharing_it_is_the_encoder_itself():
    plain, degraded = WORDS(CAPTIONS), DegradedEncoder(WORDS)(CAPTIONS)
    torch.testing.assert_close(degraded.context, plain.context)
    assert torch.equal(degraded.mask, plain.mask)


def test_noise_lowers_the_cosine_with_the_clean_token_as_stated():
    clean, noisy = WORDS(CAPTIONS), DegradedEncoder(WORDS, noise=2.0)(CAPTIONS)
    cosines = torch.nn.functional.cosine_similarity(clean.context[clean.mask], noisy.context[clean.mask])
    assert cosines.mean().item() == pytest.approx(1 / 5**0.5, abs=0.05)
    sizes = noisy.context[clean.mask].square().mean(1).sqrt() / clean.context[clean.mask].square().mean(1).sqrt()
    assert sizes.mean().item() == pytest.approx(1, abs=0.1)


def test_a_caption_has_its_own_noise_whatever_its_company():
    encoder = DegradedEncoder(WORDS, noise=1.0, shared=2.0)
    assert torch.equal(encoder(CAPTIONS).context[1], encoder(CAPTIONS[1:2]).context[0])
    red, other = encoder(["a red circle", "a red cross"]).context
    assert (red[1] - other[1]).abs().max() > 1, "the same word in the same place"


def test_a_shared_vector_makes_all_tokens_alike_and_padding_stays_empty():
    text = DegradedEncoder(WORDS, shared=10.0)(CAPTIONS)
    tokens = torch.nn.functional.normalize(text.context[text.mask], dim=1)
    assert (tokens @ tokens.T).min() > 0.9
    assert text.context[~text.mask].abs().max() == 0


def test_the_fingerprint_knows_every_setting():
    prints = {
        DegradedEncoder(WORDS, **arguments).fingerprint
        for arguments in ({}, {"noise": 1.0}, {"shared": 1.0}, {"seed": 1})
    }
    assert len(prints) == 4
    with pytest.raises(ValueError, match="must not be negative"):
        DegradedEncoder(WORDS, noise=-1)
