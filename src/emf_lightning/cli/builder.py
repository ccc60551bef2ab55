"""An experiment's objects without a run: for verbs that look at a model rather than train it."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.emf_cli import EMFCLI, open_link_targets

_BUILT_BY_THE_TRAINER = ("callbacks", "logger", "strategy", "plugins", "profiler")


class BuildingCLI(EMFCLI):
    """Builds the model and the data of an experiment as `emf fit` does, and nothing else.

    Attributes:
        settings: the experiment's whole configuration.
    """

    settings: Namespace

    @classmethod
    def run(cls, arguments: list[str]) -> BuildingCLI:
        """The experiment that `emf fit` would run with ``arguments``, built."""
        built = super().run(arguments)
        assert isinstance(built, cls)
        return built

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.settings = config.clone()
        for name in _BUILT_BY_THE_TRAINER:
            config.trainer[name] = None
        open_link_targets(config)

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """None: there is nothing to run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""
