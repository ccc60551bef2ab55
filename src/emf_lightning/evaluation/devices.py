"""Where the networks of the evaluation run."""

from __future__ import annotations

import torch


def device_of(name: str | None) -> torch.device:
    """The device called ``name``; without a name this process's GPU, or the CPU where there is none."""
    if name is None:
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
