import warnings

import pytest
import torch

from emf_lightning.text.base import TextFeatures, Truncation
from emf_lightning.text.words import WordEncoder


def test_the_first_truncation_warns_with_the_count_so_far_and_later_ones_only_count():
    truncation = Truncation("SomeEncoder", length=77)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truncation.add(captions=1000, truncated=0)
    with pytest.warns(UserWarning, match=r"SomeEncoder: 3 of 1,064 captions so far .* length=77"):
        truncation.add(captions=64, truncated=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truncation.add(captions=64, truncated=2)
    assert (truncation.captions, truncation.truncated) == (1128, 5)


def test_a_tokenizers_mask_of_whole_numbers_and_float64_features_are_the_usual_ones():
    class Plain(WordEncoder):
        def encode(self, captions):
            features = super().encode(captions)
            return TextFeatures(features.context.double(), features.mask.long())

    captions = ["a red circle", "", "two squares"]
    usual, found = WordEncoder(width=8, length=4)(captions), Plain(width=8, length=4)(captions)
    assert found.mask.dtype == torch.bool and found.context.dtype == torch.float32
    assert torch.equal(found.context, usual.context) and torch.equal(found.mask, usual.mask)
    found.context[0, 0] = torch.nan
    assert found.finite_or(usual[:1])[1].tolist() == [False, True, True]
