"""Accelerators that `emf plan` knows, and how many a machine has."""

from __future__ import annotations

from typing import Any

DEVICES = {"A100": (312, 80), "H100": (989, 80), "H200": (989, 141), "B200": (2250, 180)}
"""Name -> dense bf16 TFLOP/s and GB of memory, from the makers' data sheets."""


def devices_of_node(devices: Any) -> int | None:
    """Devices of a node that ``trainer.devices`` stands for: a number, a list, or their text; None for ``auto``, -1."""
    if isinstance(devices, list):
        return len(devices)
    given = [part.strip() for part in str(devices).split(",") if part.strip()]
    if "," in str(devices):
        return len(given)
    return int(given[0]) if given and given[0].isdigit() else None
