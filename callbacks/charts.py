"""TensorBoard's custom scalars: several curves in one chart."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

Layout = dict[str, dict[str, list[Any]]]
"""Category -> chart -> ``["Multiline", [tag, ...]]``; tags are regular expressions."""


@runtime_checkable
class Charted(Protocol):
    """A callback with charts of its own."""

    def charts(self) -> Layout:
        """What TensorBoard is to show under custom scalars."""


def plot_charts(trainer: Trainer) -> None:
    """Writes the charts of all callbacks together: TensorBoard keeps one layout a run, so each writes all of it."""
    if not trainer.is_global_zero:
        return
    layout: Layout = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Charted):
            layout |= callback.charts()
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)


def multiline(tags: list[str]) -> list[Any]:
    """A chart of the curves whose whole tags match these regular expressions."""
    return ["Multiline", [f"^{tag}$" for tag in tags]]
