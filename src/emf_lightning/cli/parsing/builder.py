"""The model and the data of an experiment, for verbs that do not train."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.parsing.emf_cli import EMFCLI, add_linked_arguments


class BuildingCLI(EMFCLI):
    """Builds the model and the data of an experiment as `emf fit` does, but no trainer.

    Attributes:
        settings: the configuration of the experiment.
    """

    settings: Namespace

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.settings = config.clone()
        for name in ("callbacks", "logger", "strategy", "plugins", "profiler"):  # parts of the trainer
            config.trainer[name] = None
        add_linked_arguments(config)

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Builds no trainer."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""
