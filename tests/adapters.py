"""Tiny networks with adapters on a parent in a folder, one of each backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from emf_lightning.networks.adapter import Adapter
from emf_lightning.networks.diffusers_flow_map import DiffusersFlowMap
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval
from emf_lightning.networks.two_time.two_time_embedding import INTERVAL
from tests.networks.test_two_time import INSIDE, KINDS, network, stir

SANA = SanaArchitecture(2, 2, 8, 2, 8, patch_size=2)
NAMES = ("SANA", *KINDS)


def built(name: str, **settings: Any) -> DiffusersFlowMap:
    """A network of latents ``[4 or 3, 8, 8]`` and features of width 16, at a smooth time scale."""
    settings = {"time_scale": 5.0 / INSIDE.get(name, 1)} | settings
    if name != "SANA":
        return network(name, **({"interval": AnchoredInterval()} | settings))
    torch.manual_seed(0)
    source = {} if "pretrained" in settings else {"architecture": SANA}
    return SanaFlowMap(**source, latent_channels=4, latent_size=8, context_width=16, **settings)


def parent(name: str, folder: Path, **settings: Any) -> DiffusersFlowMap:
    """A flow without intervals, saved in ``folder``."""
    net = stir(built(name, **({} if name == "SANA" else {"interval": None}), **settings))
    if name != "SANA":
        net.save_pretrained(folder)
        return net.eval()
    config = {key: value for key, value in net.transformer.config.items() if not key.startswith("_")}
    stock = SanaTransformer2DModel(**config)
    stock.load_state_dict({name: each for name, each in net.transformer.state_dict().items() if INTERVAL not in name})
    stock.save_pretrained(str(folder))
    return net.eval()


def adapted(name: str, folder: Path, **settings: Any) -> DiffusersFlowMap:
    """New adapters on the parent in ``folder``, of a scale that is not 1."""
    return built(name, **({"pretrained": str(folder), "adapter": Adapter(4, alpha=6.0)} | settings)).eval()


@torch.no_grad()
def train(net: nn.Module) -> None:
    """Changes what trains."""
    generator = torch.Generator().manual_seed(5)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def inputs(name: str, batch: int = 3) -> tuple[Tensor, ...]:
    """z, r < t, and context with its mask."""
    torch.manual_seed(1)
    t = 0.1 + 0.8 * torch.rand(batch)
    channels = 4 if name == "SANA" else KINDS[name][2]
    z, context = torch.randn(batch, channels, 8, 8), torch.randn(batch, 7, 16)
    return z, t * torch.rand(batch), t, context, torch.ones(batch, 7, dtype=torch.bool)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
