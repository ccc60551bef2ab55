"""The model and the data of an experiment, and its parser, for verbs that do not train."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

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


class DataCLI(BuildingCLI):
    """Builds the data of an experiment as `emf fit` does, but neither model nor trainer."""

    def instantiate_classes(self) -> None:
        config = self.config.clone()
        for section in ("model", "trainer"):
            del config[self.subcommand][section]
        self.config_init = self.parser.instantiate_classes(config)
        self.datamodule = self._get(self.config_init, "data")


class ParserCLI(BuildingCLI):
    """Makes the parsers of the trainer's verbs, and parses and builds nothing."""

    @classmethod
    def parser_of(cls, verb: str) -> LightningArgumentParser:
        """The parser of one of ``TRAINER_VERBS``, with the classes that files can name."""
        return cls.run([verb])._subcommand_parsers[verb]

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.config = Namespace(subcommand=args[0])  # type: ignore[no-untyped-call]

    def _set_seed(self) -> None:
        """Sets no seed."""

    def before_instantiate_classes(self) -> None:
        """Reads no settings."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""
