"""Where the networks of the evaluation run."""

from __future__ import annotations

import os

import torch


def device_of(name: str | None) -> torch.device:
    """The device called ``name``; without a name this process's GPU, or the CPU where there is none.

    Which GPU is a process's is known before anyone has made it the current one: launchers say so in the environment.
    """
    if name is None and torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", torch.cuda.current_device()))
        name = f"cuda:{int(local) % torch.cuda.device_count()}"
    return torch.device(name or "cpu")
