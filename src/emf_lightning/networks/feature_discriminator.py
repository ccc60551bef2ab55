"""A discriminator on the features of a frozen flow-matching network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import Discriminator
from emf_lightning.networks.frozen import FrozenNetwork


class FeatureDiscriminator(Discriminator):
    """Heads on the tokens of some blocks of a frozen flow-matching network (LADD, arXiv 2403.12015).

    A head reads every token by itself; the caption enters by projection (arXiv 1802.05637). A sample's logit is the
    mean over tokens and blocks.

    Attributes:
        backbone: the frozen network, a copy of ``net``; no checkpoint holds it.

    Args:
        net: the generator as it starts.
        blocks: numbers of its blocks, from 0; by default every other one.
        width: hidden units of a head.
        conditional: whether the logits depend on the caption.

    Raises:
        ValueError: for a network without such blocks.
    """

    def __init__(
        self, net: FlowMapNetwork, blocks: Sequence[int] | None = None, width: int = 128, conditional: bool = True
    ) -> None:
        super().__init__()
        there = len(net.blocks)
        chosen = list(range(1, there, 2)) if blocks is None else list(blocks)
        rule = f"blocks must be some of 0 to {there - 1}, got {chosen}"
        require(self, bool(chosen) and all(0 <= k < there for k in chosen) and len(set(chosen)) == len(chosen), rule)
        self.block_numbers = chosen
        self.backbone = FrozenNetwork(net)
        widths = self._feature_widths(net)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.SiLU()) for features in widths
        )
        self.logits = nn.ModuleList(nn.Linear(width, 1) for _ in widths)
        self.captions = nn.ModuleList(
            nn.Linear(net.context_width, width, bias=False) for _ in (widths if conditional else ())
        )

    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B]``."""
        features = self._features(self.backbone.on(z.device), z, t, context, mask)
        tokens = context.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        votes = []
        for k, (head, logit, feature) in enumerate(zip(self.heads, self.logits, features, strict=True)):
            h = head(feature)
            vote = logit(h)[..., 0]
            if self.captions:
                caption = self.captions[k](tokens.to(h.dtype))
                vote = vote + (h * caption[:, None]).sum(2) / h.shape[2] ** 0.5
            votes.append(vote.mean(1))
        return torch.stack(votes).mean(0)

    def _features(self, net: FlowMapNetwork, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> list[Tensor]:
        """Tokens ``[B, N, D]`` of the chosen blocks at (z, t)."""
        found: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for k in self.block_numbers:

                def keep(block: nn.Module, inputs: Any, output: Any, k: int = k) -> None:
                    found[k] = _tokens(output)

                hooks.enter_context(net.blocks[k].register_forward_hook(keep))
            net(z, t, t, context, mask)
        return [found[k] for k in self.block_numbers]

    def _feature_widths(self, net: FlowMapNetwork) -> list[int]:
        """Widths of the chosen blocks' tokens, from a pass that computes nothing."""
        meta = copy.deepcopy(net).to("meta").eval()
        side, width = net.latent_size, net.context_width
        z, t = torch.empty(1, net.latent_channels, side, side, device="meta"), torch.empty(1, device="meta")
        context, mask = torch.empty(1, 1, width, device="meta"), torch.ones(1, 1, device="meta", dtype=torch.bool)
        with torch.no_grad():
            return [feature.shape[2] for feature in self._features(meta, z, t, context, mask)]


def _tokens(output: Any) -> Tensor:
    """A block's output as tokens ``[B, N, D]``: its last tensor, of an image ``[B, D, H, W]`` the pixels.

    Down blocks of UNets have a tuple of residuals behind the tensor.
    """
    tensor: Tensor = output if isinstance(output, Tensor) else [one for one in output if isinstance(one, Tensor)][-1]
    return tensor.flatten(2).transpose(1, 2) if tensor.ndim == 4 else tensor
