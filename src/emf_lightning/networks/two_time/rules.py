"""The second time input: rules from (r, t) to the modulation of a network that knows the time t."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Modulation = Tensor | tuple[Tensor, ...]
"""A time embedding ``[B, D]``, or the tensors that a backbone makes of it.

PixArt and SANA make two: adaLN modulation of the blocks, ``[B, 6 D]``, and the output norm's embedding, ``[B, D]``.
"""

Embed = Callable[[Tensor], Modulation]
"""A time embedding, of times ``[B]``."""


class IntervalInput(ABC):
    """A rule from (r, t) to a backbone's time embedding; it knows no backbone.

    Attributes:
        embeds_length: whether the rule uses m', the embedding of t - r.
        blocks_at_t: for rules with two embeddings for the blocks side by side, ``[B, 2 D]``, the number of leading
            blocks that take the first; the others take the second. None for rules with one.
        preserves_parent: whether a network with one time, given this rule, keeps its output at r = t.
    """

    embeds_length: bool = True
    preserves_parent: bool = True
    blocks_at_t: int | None = None

    @abstractmethod
    def __call__(self, embed_time: Embed, embed_length: Embed, r: Tensor, t: Tensor) -> Modulation:
        """The embedding at ``r`` and ``t``, ``[B]``, from m, ``embed_time``, and m', ``embed_length`` of t - r."""


def combined(combine: Callable[..., Tensor], *modulations: Modulation) -> Modulation:
    """``combine`` of the modulations' tensors, one by one."""
    if isinstance(modulations[0], Tensor):
        return combine(*modulations)
    return tuple(map(combine, *modulations))


class AnchoredInterval(IntervalInput):
    """m(t) + m'(t - r) - m'(0): at r = t it is the pretrained embedding, bit for bit, and stays so in training."""

    def __call__(self, embed_time: Embed, embed_length: Embed, r: Tensor, t: Tensor) -> Modulation:
        end, length, zero = embed_time(t), embed_length(t - r), embed_length(torch.zeros_like(t))
        return combined(lambda a, b, c: a + (b - c), end, length, zero)


class SummedInterval(IntervalInput):
    """m(t) + m'(t - r), the plain sum of EMF's release: for its checkpoints; it does not preserve the parent."""

    preserves_parent = False

    def __call__(self, embed_time: Embed, embed_length: Embed, r: Tensor, t: Tensor) -> Modulation:
        return combined(torch.add, embed_time(t), embed_length(t - r))


class DecoupledInterval(IntervalInput):
    """m(t) for the first blocks and m(r) for the others and the output norm (Decoupled MeanFlow, arXiv 2510.24474).

    The first blocks encode the state at t, the others decode for r. There are no new parameters, and at r = t it is
    the parent, bit for bit.

    Args:
        blocks: d, the number of blocks that see t; the paper has 20 of 28.
    """

    embeds_length = False

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"DecoupledInterval: blocks must be at least 1, got {blocks}: the first must see t")
        self.blocks = blocks

    @property
    def blocks_at_t(self) -> int:  # type: ignore[override]
        return self.blocks

    def __call__(self, embed_time: Embed, embed_length: Embed, r: Tensor, t: Tensor) -> Modulation:
        """Both embeddings for the blocks side by side, ``[B, 2 D]``, t's first; other tensors are r's."""
        start, end = embed_time(t), embed_time(r)
        if isinstance(start, Tensor) and isinstance(end, Tensor):
            return torch.cat([start, end], dim=1)
        return torch.cat([start[0], end[0]], dim=1), *end[1:]
