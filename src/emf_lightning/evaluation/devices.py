"""Devices of the evaluation networks."""

from __future__ import annotations

import os

import torch


def device_of(name: str | None) -> torch.device:
    """The device ``name``; by default this process's GPU, or the CPU where there is none.

    Launchers set the process's GPU in ``LOCAL_RANK`` or ``SLURM_LOCALID`` before it is made the current device.

    Raises:
        ValueError: for a name that is no device of this machine.
    """
    if name is None and torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", torch.cuda.current_device()))
        name = f"cuda:{int(local) % torch.cuda.device_count()}"
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # another name; no GPU or no driver
        raise ValueError(f"device: {name!r} is not there ({str(error).splitlines()[0]}); give cpu, or cuda") from error
    return device
