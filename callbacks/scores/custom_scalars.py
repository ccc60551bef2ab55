"""TensorBoard's custom scalars: several curves in one chart."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

Layout = dict[str, dict[str, list[Any]]]
"""Category -> chart -> ``["Multiline", [tag, ...]]``; tags are regular expressions."""


def write_custom_scalars(trainer: Trainer) -> None:
    """Writes the charts of all callbacks' ``custom_scalars`` at once: TensorBoard keeps the last layout of a run."""
    layout: Layout = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "custom_scalars"):
            layout |= callback.custom_scalars()
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)


def multiline(tags: list[str]) -> list[Any]:
    """A chart of the curves whose whole tags match these regular expressions."""
    return ["Multiline", [f"^{tag}$" for tag in tags]]
