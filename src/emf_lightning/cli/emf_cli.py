"""Lightning's command line, told what this project's experiments need."""

from __future__ import annotations

import inspect
import logging
import os
import re
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from emf_lightning.cli.experiment_files import without_base
from emf_lightning.cli.parser_errors import class_of
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.modules.checkpoint import read_checkpoint
from emf_lightning.modules.flow_map import FlowMapModule

CHOICES = ("callbacks", "evaluation", "flow", "latents", "modules", "networks", "text")
"""Packages whose classes an experiment chooses from, by their short names."""

HARMLESS = (
    ".*using the WeightAveraging callback, but loading a checkpoint outside",  # its weights are the averages
    ".*using the WeightAveraging callback with a model that overrides",  # it shards only where that is refused
    "Using ModelCheckpoint with manual optimization",  # the weights after the step are the ones wanted
    "The dirpath has changed from",  # each run has a directory of its own
    ".*LeafSpec",  # Lightning's own business with torch
    ".torch.jit.script. is deprecated",  # torch's own, in its forward-mode derivatives
    ".*does not have many workers",  # shards are read by as many as the experiment says
)
"""Beginnings of warnings that say nothing to the user."""

LINKED = ("context_width", "latent_channels", "latent_size")
"""What the network learns from the data: attributes of the datamodule, arguments of the networks that have them."""


class ExperimentParser(LightningArgumentParser):
    """A parser that reads experiment files; their ``base:`` was followed before, see ``experiments.py``."""

    def parse_string(self, content: str, path: str | os.PathLike = "", *args: Any, **kwargs: Any) -> Any:
        return super().parse_string(without_base(content, str(path)) if path else content, path, *args, **kwargs)


class EMFCLI(LightningCLI):
    """`emf fit|validate|test|predict`: a ``FlowMapModule`` chosen in YAML, on ``CaptionImageData``."""

    @classmethod
    def run(cls, arguments: list[str]) -> EMFCLI:
        """Parses ``arguments`` (verb, then options), builds the objects and runs the verb."""
        for package in CHOICES:
            for module in walk_packages(
                import_module(f"emf_lightning.{package}").__path__, f"emf_lightning.{package}."
            ):
                import_module(module.name)  # the parser resolves the short names of classes that it can find
        # `${a.b}` means the same wherever it stands, although the parser nests what it reads below the verb
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message)
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
            },
            # a resumed run writes into the directory that it already has
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the optimiser is the model's
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.net.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Without Lightning's warning that both ``args`` and ``sys.argv`` are given: ``main`` always gives them."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the configuration says what is built, the checkpoint only fills it.

        Lightning would let the checkpoint's hyperparameters override the experiment and the command line.
        """

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        open_link_targets(config)
        _check_devices(config.trainer.devices, config.trainer.accelerator)
        sharded = _check_sharding(config.trainer.strategy, config.trainer.devices, config.trainer.num_nodes)
        if self.subcommand == "fit":
            _check_rhythm(config.trainer)
        _check_checkpoint(config.get("ckpt_path"), sharded)


def open_link_targets(config: Namespace) -> None:
    """Gives the network's linked arguments a place in ``config``.

    A link is applied to arguments that are there, and parser_mode omegaconf+ takes out those of nested classes
    (jsonargparse 4.53): without this the network would keep its defaults, and the run's record say otherwise.
    """
    net = config.get("model.init_args.net")
    if isinstance(net, Namespace):
        known = inspect.signature(class_of(net.class_path)).parameters
        for name in LINKED:
            if name in known:
                net[f"init_args.{name}"] = None


def _check_devices(devices: Any, accelerator: Any) -> None:
    """Raises where there are fewer devices than asked for: Lightning would start as many CPU processes."""
    numbers = devices if isinstance(devices, list) else re.findall(r"-?\d+", str(devices))
    if isinstance(devices, list) or "," in str(devices):
        wanted = max(map(int, numbers), default=0) + 1  # these very devices
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
    """Whether ``strategy`` shards the network.

    Raises:
        ValueError: where its sizes are not those of data parallelism over all devices: Lightning would make tensor
            ranks of them, and these would train on different data without a word.
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
    """Raises where no checkpoint at ``path`` suits the strategy: now, rather than after everything is built."""
    if path == "best":
        raise ValueError(
            "ckpt_path: which one is the best is known only where it was trained; give the path of a .ckpt"
        )
    if not path or path in ("last", "hpc", "registry"):
        return  # Lightning's words, and its to look up
    if not Path(path).is_dir():
        read_checkpoint(path, "ckpt_path")
    elif not sharded:
        raise ValueError(
            f"ckpt_path: {path} is a sharded checkpoint: add --config experiments/devices/fsdp2.yaml, on any number of "
            f"devices, or make one file of it: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )


def _check_rhythm(trainer: Namespace) -> None:
    """Raises where training ends before its first validation, which would be its first checkpoint and scores, too."""
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
    log.addHandler(logging.NullHandler())  # errors are raised, too
    log.addFilter(_no_interpolation_is_lost)
    return log


def _no_interpolation_is_lost(record: logging.LogRecord) -> bool:
    """Raises where the parser drops a value with ``${...}``, which it does without a word (jsonargparse 4.53).

    Where a later file changes a ``class_path``, it keeps the ``init_args`` that the new class accepts, and checks that
    before interpolations are resolved: `total: ${trainer.max_steps}` is then no number, and the default comes back.
    """
    message = record.getMessage()
    if record.levelno == logging.DEBUG and "discarding init_args" in message and "${" in message:
        raise ValueError(
            f"{message.removeprefix('Due to ')}: values with ${{...}} do not survive a change of class; "
            "write them out, or build on a file with the same class_path"
        )
    return True


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
