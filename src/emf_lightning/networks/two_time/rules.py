"""The second time input: how a network that knows the time t learns of the interval's end r."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # diffusers takes seconds to import
    from emf_lightning.networks.sana_transformer import IntervalSanaTransformer
    from emf_lightning.networks.two_time.embedding import IntervalEmbedding

Modulation = tuple[Tensor, Tensor]
"""What a SANA is modulated by: the blocks' part, ``[B, 6 D]``, and the output norm's, ``[B, D]``."""


class IntervalInput(ABC):
    """A rule from (r, t) to what a SANA's blocks and its output norm are modulated by."""

    @abstractmethod
    def __call__(self, embedding: IntervalEmbedding, r: Tensor, t: Tensor, dtype: torch.dtype | None) -> Modulation:
        """The modulation at ``r`` and ``t``, ``[B]``."""

    def prepare(self, transformer: IntervalSanaTransformer) -> None:  # noqa: B027  # most rules ask for no more
        """Changes ``transformer`` once, where the rule does not stay within its time embedding."""


class AnchoredInterval(IntervalInput):
    """m(t) + m'(t - r) - m'(0): at r = t it is the pretrained embedding, bit for bit, and stays so in training."""

    def __call__(self, embedding: IntervalEmbedding, r: Tensor, t: Tensor, dtype: torch.dtype | None) -> Modulation:
        """The sum, with the length's embedding measured from length 0."""
        end = embedding.of_time(t, dtype)
        length, zero = (embedding.of_length(d, dtype) for d in (t - r, torch.zeros_like(t)))
        return end[0] + (length[0] - zero[0]), end[1] + (length[1] - zero[1])


class SummedInterval(IntervalInput):
    """m(t) + m'(t - r), the plain sum of EMF's release: for its checkpoints; it does not preserve the parent."""

    def __call__(self, embedding: IntervalEmbedding, r: Tensor, t: Tensor, dtype: torch.dtype | None) -> Modulation:
        """The plain sum."""
        end, length = embedding.of_time(t, dtype), embedding.of_length(t - r, dtype)
        return end[0] + length[0], end[1] + length[1]


class DecoupledInterval(IntervalInput):
    """m(t) for the first blocks and m(r) for the others and the output norm (Decoupled MeanFlow, arXiv 2510.24474).

    The first blocks read the state where it is, the others draw where it goes. There are no new parameters, and at
    r = t it is the parent, bit for bit.

    Args:
        blocks: d, how many blocks see t; the paper has 20 of 28.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"DecoupledInterval: blocks must be at least 1, got {blocks}: the first must see t")
        self.blocks = blocks

    def __call__(self, embedding: IntervalEmbedding, r: Tensor, t: Tensor, dtype: torch.dtype | None) -> Modulation:
        """Both modulations side by side, ``[B, 12 D]``, for the blocks to take their half of; and r's embedding."""
        start, end = embedding.of_time(t, dtype), embedding.of_time(r, dtype)
        return torch.cat([start[0], end[0]], dim=1), end[1]

    def prepare(self, transformer: IntervalSanaTransformer) -> None:
        """Lets each block take its half of the modulation, and drops the interval's embedding: it has no use here."""
        blocks = transformer.transformer_blocks
        if self.blocks > len(blocks):
            raise ValueError(f"DecoupledInterval: blocks={self.blocks}, but the network has {len(blocks)}")
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(_take_half, half=int(i >= self.blocks)))
        transformer.time_embed.interval = None


_MODULATION = 4
"""Place of the modulation among a SANA block's arguments, which diffusers hands over by position."""


def _take_half(block: nn.Module, arguments: tuple[Any, ...], half: int) -> tuple[Any, ...]:
    mine = arguments[_MODULATION].chunk(2, dim=1)[half]
    return (*arguments[:_MODULATION], mine, *arguments[_MODULATION + 1 :])
