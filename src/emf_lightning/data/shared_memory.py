"""Memory for the tensors of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor; in a loader worker, in memory that the trainer's process reads without a further copy.

    As ``torch.utils.data.default_collate`` makes its batches.
    """
    if get_worker_info() is None or 0 in shape:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
