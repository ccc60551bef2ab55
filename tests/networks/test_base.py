from __future__ import annotations

import pytest
from torch import Tensor

from emf_lightning.networks.base import FlowMapNetwork


class Unsaved(FlowMapNetwork):
    def backbone(self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return z


class Timeless(Unsaved):
    def save_pretrained(self, directory) -> None:
        pass


def test_a_network_must_say_how_it_is_saved():
    with pytest.raises(TypeError, match="save_pretrained"):
        Unsaved()


def test_fitting_time_anew_without_a_time_embedding_names_the_remedy():
    with pytest.raises(ValueError, match=r"Timeless has no time embedding .* time_scale=5; leave it out"):
        Timeless().refit_time(5)
