"""Lists of Python objects from all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer

T = TypeVar("T")


def all_gather_list(trainer: Trainer, items: Sequence[T]) -> list[T]:
    """The items of all ranks, on every rank; inverts round-robin sharding, where rank k holds ``items[k::ranks]``."""
    if trainer.world_size == 1:
        return list(items)
    parts: list[list[T]] = [[] for _ in range(trainer.world_size)]
    dist.all_gather_object(parts, list(items))
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]
