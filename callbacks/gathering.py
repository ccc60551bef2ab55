"""Results of all ranks in one list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer

T = TypeVar("T")


def gathered(trainer: Trainer, items: Sequence[T]) -> list[T]:
    """The items of all ranks, on every rank, in the order in which round-robin sharding dealt them out.

    That is the order of the whole list of which rank k holds ``items[k::ranks]``.
    """
    if trainer.world_size == 1:
        return list(items)
    parts: list[list[T]] = [[] for _ in range(trainer.world_size)]
    dist.all_gather_object(parts, list(items))
    longest = max(map(len, parts))
    return [part[row] for row in range(longest) for part in parts if row < len(part)]
