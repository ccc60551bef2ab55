from __future__ import annotations

import pytest
from torch import Tensor

from emf_lightning.networks.base import FlowMapNetwork


class Timeless(FlowMapNetwork):
    def backbone(self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return z


def test_fitting_time_anew_without_a_time_embedding_names_the_remedy():
    with pytest.raises(ValueError, match=r"Timeless has no time embedding .* time_scale=5; leave it out"):
        Timeless().refit_time(5)
