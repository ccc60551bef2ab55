import warnings

import pytest

from emf_lightning.text.base import Truncation


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
