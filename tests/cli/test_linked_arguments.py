"""The data tell a network its shapes, also through ``**settings``."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.parsing.emf_cli import add_linked_arguments
from emf_lightning.cli.sizes import sized
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.part_classes import trusting


class Gated(SanaFlowMap):
    def __init__(self, gate: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.gate = gate


def test_a_network_that_passes_settings_on_is_told_its_shapes() -> None:
    net = Namespace(class_path=f"{__name__}.Gated", init_args=Namespace(gate=2.0))
    config = Namespace(model=Namespace(init_args=Namespace(net=net)))

    add_linked_arguments(config)

    shapes = dict.fromkeys(("latent_channels", "latent_size", "context_width"))
    assert vars(config.model.init_args.net.init_args) == {"gate": 2.0} | shapes


def test_a_plan_builds_it_in_these_shapes() -> None:
    net = Namespace(class_path=f"{__name__}.Gated", init_args=Namespace(gate=2.0))

    with trusting(True):
        planned = sized(net, FlowMapNetwork, latent_channels=8, latent_size=12, context_width=16)

    assert (planned.gate, planned.latent_channels, planned.latent_size, planned.context_width) == (2.0, 8, 12, 16)
