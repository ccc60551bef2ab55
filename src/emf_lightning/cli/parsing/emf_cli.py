"""LightningCLI for the experiments of this package."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy

from emf_lightning.callbacks.save_last_state import SaveLastState
from emf_lightning.callbacks.signal_stop import SignalStop
from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.parsing.errors import naming_options
from emf_lightning.cli.parsing.experiment_files import ExperimentFileParser, check_every_text
from emf_lightning.cli.parsing.experiment_loggers import complete_loggers
from emf_lightning.cli.parsing.nested_help import Help
from emf_lightning.cli.parsing.own_state import OwnStateOnly
from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.parsing.run_log import AS_PARSED, RunLog, prepare_logging
from emf_lightning.cli.parsing.setting_checks import (
    check_defaults,
    check_devices,
    check_schedule,
    check_sharding,
    check_val_interval,
    check_warmup,
)
from emf_lightning.cli.parsing.verb_options import add_options, choose, set_prediction
from emf_lightning.cli.run_directory import open_run
from emf_lightning.cli.runs import OPTION
from emf_lightning.cli.shipped import with_shipped_files
from emf_lightning.cli.verbs import TRAINER_VERBS, examples
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.import_policy import known_classes_only
from emf_lightning.modules.checkpoint import read_checkpoint
from emf_lightning.modules.checkpoint_files import WholeCheckpointIO, whole_checkpoint
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharded_checkpoint import ShardedCheckpoints, check_index
from emf_lightning.part_classes import takes, trusted

CLASS_PACKAGES = ("callbacks", "evaluation", "flow", "latents", "modules", "networks", "text")
"""Packages whose classes YAML can name without their module."""

IGNORED_WARNINGS = (
    ".*using the WeightAveraging callback, but loading a checkpoint outside",  # its weights are already the averages
    ".*using the WeightAveraging callback with a model that overrides",  # WeightEMA averages sharded weights itself
    "Using ModelCheckpoint with manual optimization",  # the weights after the step are saved, as intended
    "The dirpath has changed from",  # each run has its own directory
    ".*LeafSpec",  # from Lightning's use of torch
    ".torch.jit.script. is deprecated",  # from torch's forward-mode derivatives
    ".*does not have many workers",  # the experiment sets data.num_workers
    "Experiment logs directory",  # a resumed run's rows are kept
    "Total length of .* across ranks is zero",  # the experiment has no validation shards
    "predict returned None",  # callbacks write the images
    "Precision .* is not supported by the model summary",  # about a size in MB that it estimates
)
"""Patterns of warnings that concern no user."""

PARTS_HELP = """\
options of a part:         --model.help=CLASS, --model.net.help=CLASS
with its own parts, too:   --config FILE --model.net.architecture.help"""
"""Shown by `emf fit --help`."""

LINKED_ARGUMENTS = ("context_width", "latent_channels", "latent_size")
"""Attributes of the datamodule that become arguments of the network, if it has them."""

_CHANGE = re.compile(r"Due to class_path change from '([\w.]+)' to '([\w.]+)', discarding init_args")
_LOST = re.compile(r"'?(\w+)'?(?:=|: )(?:\[[^\]]*?)?['\"]([^'\"]*\$\{[^'\"]*)['\"]")
"""A key and a value with ``${`` in the text of a mapping or a namespace."""

CLI = TypeVar("CLI", bound="EMFCLI")


class ExperimentParser(ExperimentFileParser, LightningArgumentParser):
    """Parser of the files of an experiment that trains."""

    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Any:
        return super().instantiate(with_shipped_files(namespace), *args, **kwargs)


class EMFCLI(LightningCLI):
    """`emf fit|validate|test|predict`: trains or runs a ``FlowMapModule`` on ``CaptionImageData``."""

    @classmethod
    def run(cls: type[CLI], arguments: list[str]) -> CLI:
        """Parses ``arguments`` (verb, then options), builds the objects and runs the verb."""
        import_classes(*CLASS_PACKAGES)
        # keeps `${a.b}` absolute within a file, although the parser nests its values below the verb
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        register_type(torch.device, fail_already_registered=False)  # the default of many callbacks' arguments
        check_every_text()
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_not_advertisement)
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        with known_classes_only():
            return cls._parse_and_run(arguments)

    @classmethod
    def _parse_and_run(cls: type[CLI], arguments: list[str]) -> CLI:
        return cls(
            FlowMapModule,
            CaptionImageData,
            subclass_mode_model=True,
            parser_class=ExperimentParser,
            # omegaconf+ resolves interpolations after all files and overrides; plain omegaconf does so file by file
            parser_kwargs={
                "prog": "emf",
                "formatter_class": Help,
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "logger": _parser_log(),
                arguments[0]: {"description": _description(arguments[0])},
            },
            save_config_callback=RunLog,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the optimiser is the model's
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb that is run alone: parsers of the others would take as long as all of the parsing."""
        return {verb: skipped for verb, skipped in super().subcommands().items() if verb in self.parser_kwargs}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        add_options(parser, subcommand)
        parser.usage = f"emf {subcommand} EXPERIMENT.yaml|--run RUN [options]"
        parts = ("model", "data", "trainer")  # after what is ours
        places = {
            id(group): parts.index(name.partition(".")[0])
            for name, group in (parser.groups or {}).items()
            if name.partition(".")[0] in parts
        }
        parser._action_groups = sorted(parser._action_groups, key=lambda group: places.get(id(group), -1))
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED_ARGUMENTS:
            parser.link_arguments(f"data.{name}", f"model.init_args.net.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses ``args`` without Lightning's warning that ``sys.argv`` is given as well."""
        assert isinstance(args, list)
        self.arguments = args[1:]
        with naming_options(self._subcommand_parsers[args[0]]):
            self.config = parser.parse_args(args)
        for name in ("trainer", "data"):  # the parser takes anything here
            if not isinstance(found := self.config[args[0]].get(name), Namespace):
                raise ValueError(f"{name}: takes settings, `key: value`, not {str(found)[:80]}")

    def _dump_config(self) -> None:
        """Gives a network without arguments of its own a place for its linked ones, which Lightning records there."""
        if hasattr(self, "config_dump"):
            return
        text = self.parser.dump(self.config, skip_link_targets=False, **AS_PARSED)
        self.config_dump = yaml.safe_load(text)[self.config.subcommand]
        net = self.config_dump.get("model", {}).get("init_args", {}).get("net")
        if isinstance(net, dict) and "class_path" in net:
            net.setdefault("init_args", {})

    def _parse_ckpt_path(self) -> None:
        """Ignores the checkpoint's hyperparameters, which Lightning would let override the command line."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the verb in the run's own directory; a signal ends ``fit`` without loss."""
        fitting, config = subcommand == "fit", self.config[subcommand]
        if config.trainer.fast_dev_run:
            with TemporaryDirectory() as folder:  # Lightning saves checkpoints all the same, and callbacks their files
                self.trainer._default_root_dir = folder  # type: ignore[attr-defined]
                super()._run_subcommand(subcommand)
            return
        self.trainer._checkpoint_connector = OwnStateOnly(self.trainer)
        run = open_run(self.trainer, config, fitting, self.chosen.checkpoint, self.chosen.directory)
        prepare_logging(self.trainer)
        path = self.config_init[subcommand]["ckpt_path"] = run.checkpoint
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        stop = SignalStop(["fit", *_without_place(self.arguments)])
        if fitting:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.insert(0, SaveLastState(same_run=self.chosen.directory is not None))
            callbacks.append(stop)  # after all others, also after ModelCheckpoint
            stop.install(self.trainer)
        else:  # the step at which Lightning logs an evaluation
            step = _check_checkpoint(path, True) if self.chosen.checkpoint == "last" else self.chosen.step
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = step
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self.trainer.global_step <= self.chosen.step:
                run.remove_if_empty()
            raise
        finally:
            stop.restore()
            run.close()

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything must lie in 0 .. {2**32 - 1:,}, got {seed}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.chosen = choose(config, self.subcommand == "fit", self.arguments)
        if self.subcommand == "predict":
            set_prediction(config)
        add_linked_arguments(config)
        check_defaults(config)
        complete_loggers(config.trainer)
        check_devices(config.trainer.devices, config.trainer.accelerator)
        sharded = check_sharding(config.trainer.strategy, config.trainer.devices, config.trainer.num_nodes)
        if sharded and class_of(config.trainer.strategy.class_path) is ModelParallelStrategy:
            config.trainer.strategy.class_path = f"{ShardedCheckpoints.__module__}.{ShardedCheckpoints.__qualname__}"
        if self.subcommand == "fit":
            check_val_interval(config.trainer)
            check_warmup(config)
            check_schedule(config)
        if not trusted():
            config["weights_only"] = True  # also of a checkpoint that the file names, or that Lightning finds
        self.chosen.step = _check_checkpoint(self.chosen.checkpoint, sharded)


def add_linked_arguments(config: Namespace) -> None:
    """Adds the network's linked arguments to ``config`` as null.

    Links apply to existing arguments only, and parser_mode omegaconf+ drops those of nested classes (jsonargparse
    4.53): the network would keep its defaults, while the saved configuration would show the linked values.
    """
    net = config.get("model.init_args.net")
    if isinstance(net, Namespace):
        kind = class_of(net.class_path)
        for name in LINKED_ARGUMENTS:
            if takes(kind, name):
                net[f"init_args.{name}"] = None


def _description(verb: str) -> str:
    return f"{TRAINER_VERBS[verb]}\n\n{examples(verb)}\n\n{PARTS_HELP}"


def _without_place(arguments: list[str]) -> list[str]:
    """``arguments`` without the checkpoint and the version of the run directory, and what ``--run`` stands for."""
    if any(argument.partition("=")[0] == OPTION for argument in arguments):
        arguments = arguments[2:]
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in ("--ckpt_path", "--trainer.logger.init_args.version"):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


def _check_checkpoint(path: str | None, sharded: bool) -> int:
    """The step of the checkpoint at ``path``, 0 where it is not known yet.

    Raises:
        ValueError: if no checkpoint there fits the strategy, before anything is built.
    """
    if path == "best":
        raise ValueError(
            "ckpt_path: which one is the best is known only where it was trained; give the path of a .ckpt"
        )
    if path in ("hpc", "registry"):
        raise ValueError(f"ckpt_path: {path} is not used here; give `last`, or the path of a .ckpt")
    if not path or path == "last":
        return 0  # the newest checkpoint of this run
    if not sharded or not Path(path).is_dir():
        step = read_checkpoint(whole_checkpoint(Path(path)), "ckpt_path").get("global_step")
        return step if isinstance(step, int) else 0
    if not Path(path).name.startswith("last"):  # in place of which another may be used
        check_index(Path(path))
    return 0


def _parser_log() -> logging.Logger:
    log = logging.getLogger(__name__)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(logging.NullHandler())  # every logged error is raised as well
    log.addFilter(_refuse_lost_interpolations)
    return log


def _refuse_lost_interpolations(record: logging.LogRecord) -> bool:
    """Raises if the parser drops a value with ``${...}``, which it only logs (jsonargparse 4.53).

    If a later file changes a ``class_path``, the parser keeps the ``init_args`` that the new class accepts. It checks
    types before it resolves interpolations: `total: ${trainer.max_steps}` is no number yet and gets its default.
    """
    message = record.getMessage()
    if record.levelno == logging.DEBUG and (change := _CHANGE.match(message)) and (lost := _LOST.findall(message)):
        keys = ", ".join(dict.fromkeys(f"{key}: {re.sub(r'[$][{][.]+', '${', value)}" for key, value in lost))
        old, new = (name.rpartition(".")[2] for name in change.groups())
        raise ValueError(
            f"{keys} of {old} would be lost: values with ${{...}} do not survive a change of class, here to {new}; "
            f"write them again below `class_path: {new}` as plain values, or build on a file with the same class_path"
        )
    return True


def _is_not_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
