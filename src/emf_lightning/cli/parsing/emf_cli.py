"""LightningCLI for the experiments of this package."""

from __future__ import annotations

import inspect
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from emf_lightning.callbacks.save_last_state import SaveLastState
from emf_lightning.callbacks.signal_stop import SignalStop
from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.parsing.experiment_files import without_base
from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.run_directory import open_run
from emf_lightning.cli.shipped import with_shipped_files
from emf_lightning.cli.verbs import TRAINER_VERBS
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.import_policy import known_classes_only
from emf_lightning.modules.checkpoint import read_checkpoint
from emf_lightning.modules.checkpoint_files import WholeCheckpointIO, whole_checkpoint
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.part_classes import FLAG, trusted

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
)
"""Patterns of warnings that concern no user."""

PARTS_HELP = (
    "The options of a part: --model.help=CLASS, --model.net.help=CLASS; of a part of a part, with the classes of an "
    "experiment: --config FILE --model.net.architecture.help."
)
"""Shown by `emf fit --help`."""

LINKED_ARGUMENTS = ("context_width", "latent_channels", "latent_size")
"""Attributes of the datamodule that become arguments of the network, if it has them."""

CLI = TypeVar("CLI", bound="EMFCLI")


class ExperimentParser(LightningArgumentParser):
    """Parser of experiment files without their ``base:``, which ``experiment_files.expand`` has followed before."""

    def parse_string(self, content: str, path: str | os.PathLike = "", *args: Any, **kwargs: Any) -> Any:
        return super().parse_string(without_base(content) if path else content, path, *args, **kwargs)

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
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "logger": _parser_log(),
                **{verb: {"description": f"{line}. {PARTS_HELP}"} for verb, line in TRAINER_VERBS.items()},
            },
            # a resumed run writes into the directory that it already has
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the optimiser is the model's
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED_ARGUMENTS:
            parser.link_arguments(f"data.{name}", f"model.init_args.net.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses ``args`` without Lightning's warning that ``sys.argv`` is given as well."""
        assert isinstance(args, list)
        self.arguments = args[1:]
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Ignores the checkpoint's hyperparameters, which Lightning would let override the command line."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the verb in the run's own directory; a signal ends ``fit`` without loss."""
        fitting, config = subcommand == "fit", self.config[subcommand]
        if config.trainer.fast_dev_run:
            super()._run_subcommand(subcommand)
            return
        path, lock = open_run(self.trainer, config, fitting)
        self.config_init[subcommand]["ckpt_path"] = path
        if path and Path(path).is_file():
            self.config_init[subcommand]["ckpt_path"] = str(whole_checkpoint(Path(path)))
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        stop = SignalStop(["fit", *_without_place(self.arguments)])
        if fitting:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.insert(0, SaveLastState())
            callbacks.append(stop)  # after all others, also after ModelCheckpoint
            stop.install(self.trainer)
        try:
            super()._run_subcommand(subcommand)
        finally:
            stop.restore()
            if lock is not None:
                lock.close()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        add_linked_arguments(config)
        _check_devices(config.trainer.devices, config.trainer.accelerator)
        sharded = _check_sharding(config.trainer.strategy, config.trainer.devices, config.trainer.num_nodes)
        if self.subcommand == "fit":
            _check_val_interval(config.trainer)
        if not trusted():
            config["weights_only"] = True  # also of a checkpoint that the file names, or that Lightning finds
        _check_checkpoint(config.get("ckpt_path"), sharded)


def add_linked_arguments(config: Namespace) -> None:
    """Adds the network's linked arguments to ``config`` as null.

    Links apply to existing arguments only, and parser_mode omegaconf+ drops those of nested classes (jsonargparse
    4.53): the network would keep its defaults, while the saved configuration would show the linked values.
    """
    net = config.get("model.init_args.net")
    if isinstance(net, Namespace):
        known = inspect.signature(class_of(net.class_path)).parameters
        for name in LINKED_ARGUMENTS:
            if name in known:
                net[f"init_args.{name}"] = None


def _without_place(arguments: list[str]) -> list[str]:
    """``arguments`` without the checkpoint and the version of the run directory."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in ("--ckpt_path", "--trainer.logger.init_args.version"):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


def _check_devices(devices: Any, accelerator: Any) -> None:
    """Raises if the machine has fewer devices than asked for: Lightning would start as many CPU processes."""
    numbers = devices if isinstance(devices, list) else re.findall(r"-?\d+", str(devices))
    if isinstance(devices, list) or "," in str(devices):
        wanted = max(map(int, numbers), default=0) + 1  # device indices
    else:
        wanted = int(numbers[0]) if numbers else 1
    if accelerator == "cpu" and numbers != [str(devices)] and devices != "auto":
        raise ValueError(f"trainer.devices is {devices}: on CPUs it is the number of processes, 1 or more")
    there = torch.accelerator.device_count()
    if accelerator in ("gpu", "cuda", "mps") and there == 0:
        raise ValueError(f"trainer.accelerator is {accelerator}, but torch sees no GPU here: leave it at auto")
    if accelerator in ("auto", "gpu", "cuda") and wanted > max(there, 1):
        raise ValueError(
            f"trainer.devices is {devices}, but this machine has {there or 'no'} GPU{'s' if there > 1 else ''}: leave "
            f"it at auto, or run {wanted} processes on its {os.cpu_count()} CPU cores with --trainer.accelerator cpu"
        )


def _check_sharding(strategy: Any, devices: Any, num_nodes: int) -> bool:
    """True if ``strategy`` shards the network.

    Raises:
        ValueError: if its sizes are not those of data parallelism over all devices: Lightning would form tensor ranks,
            which would train on different data without an error.
    """
    if not isinstance(strategy, Namespace) or not strategy.class_path.endswith(".ModelParallelStrategy"):
        return False
    sizes = [strategy.init_args[f"{kind}_parallel_size"] for kind in ("data", "tensor")]
    there = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else None
    if "auto" in sizes or sizes[1] != 1 or (there is not None and sizes[0] != there * num_nodes):
        wanted = "devices x num_nodes" if there is None else there * num_nodes
        raise ValueError(
            f"trainer.strategy: data_parallel_size is {sizes[0]} and tensor_parallel_size {sizes[1]}, on {num_nodes} x "
            f"{devices} devices; these networks shard over data only: set them to {wanted} and 1 (auto would train "
            "wrongly, each device for itself)"
        )
    return True


def _check_checkpoint(path: str | None, sharded: bool) -> None:
    """Raises if no checkpoint at ``path`` fits the strategy, before anything is built."""
    if path == "best":
        raise ValueError(
            "ckpt_path: which one is the best is known only where it was trained; give the path of a .ckpt"
        )
    if path in ("hpc", "registry"):
        raise ValueError(f"ckpt_path: {path} is not used here; give `last`, or the path of a .ckpt")
    if not path or path == "last":
        return  # the newest checkpoint of this run
    if not Path(path).is_dir():
        read_checkpoint(whole_checkpoint(Path(path)), "ckpt_path")
    elif not sharded:
        raise ValueError(
            f"ckpt_path: {path} is a sharded checkpoint: add --config experiments/devices/fsdp2.yaml, on any number of "
            f"devices, or make one file of it: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    elif not trusted():
        raise ValueError(
            f"ckpt_path: {path} is a sharded checkpoint, whose index is a pickle, and reading it may run any code; if "
            f"you trust who wrote it, add --{FLAG}"
        )


def _check_val_interval(trainer: Namespace) -> None:
    """Raises if training ends before its first validation, checkpoint and scores."""
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if epochs is not None or not isinstance(interval, int) or trainer.fast_dev_run or trainer.limit_val_batches == 0:
        return
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    if 0 < batches < interval:
        raise ValueError(
            f"trainer.val_check_interval is {interval} batches, but training ends after {batches}: nothing would be "
            f"validated, scored or saved on the way; give --trainer.val_check_interval {batches} or less"
        )


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
    if record.levelno == logging.DEBUG and "discarding init_args" in message and "${" in message:
        raise ValueError(
            f"{message.removeprefix('Due to ')}: values with ${{...}} do not survive a change of class; "
            "write them out, or build on a file with the same class_path"
        )
    return True


def _is_not_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
