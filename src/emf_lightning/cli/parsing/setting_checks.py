"""Settings that cannot work, said before anything is built."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import ModelParallelStrategy

from emf_lightning.cli.devices import devices_of_node
from emf_lightning.cli.parsing.parser_errors import class_of


def check_devices(devices: Any, accelerator: Any) -> None:
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


def check_sharding(strategy: Any, devices: Any, num_nodes: int) -> bool:
    """True if ``strategy`` shards the network.

    Raises:
        ValueError: if its sizes are not those of data parallelism over all devices: Lightning would form tensor ranks,
            which would train on different data without an error.
    """
    if not isinstance(strategy, Namespace) or not issubclass(class_of(strategy.class_path), ModelParallelStrategy):
        return False
    sizes = [strategy.init_args[f"{kind}_parallel_size"] for kind in ("data", "tensor")]
    there = devices_of_node(devices)
    if "auto" in sizes or sizes[1] != 1 or (there is not None and sizes[0] != there * num_nodes):
        wanted = "devices x num_nodes" if there is None else there * num_nodes
        raise ValueError(
            f"trainer.strategy: data_parallel_size is {sizes[0]} and tensor_parallel_size {sizes[1]}, on {num_nodes} x "
            f"{devices} devices; these networks shard over data only: set them to {wanted} and 1 (auto would train "
            "wrongly, each device for itself)"
        )
    return True


_UNWRITTEN = "Unable to serialize instance"
"""The beginning of jsonargparse's text in place of a default that it cannot write."""


def check_val_interval(trainer: Namespace) -> None:
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


def check_warmup(config: Namespace) -> None:
    """Raises if a learning rate would still rise at the last step: its warm-up is as long as training, or longer."""
    planned = config.trainer.max_steps
    for place, kind, settings in _parts(config.model.as_dict(), "model") if planned > 0 else ():
        for name, steps in _warmups(kind, settings).items():
            if steps >= planned:
                raise ValueError(
                    f"{place}: {kind} raises the learning rate for {steps:g} steps ({name}), but training ends after "
                    f"{planned}: set {name} below trainer.max_steps, or train longer"
                )


def check_schedule(config: Namespace) -> None:
    """Raises if a schedule has reached a rate of 0 before training ends; warns where it has reached its last rate.

    A run's ``config.yaml`` has the number of steps itself in place of ``${trainer.max_steps}``.
    """
    planned = config.trainer.max_steps
    for place, kind, settings in _parts(config.model.as_dict(), "model") if planned > 0 else ():
        total = settings.get("total") if kind == "WarmupCosine" else None
        if type(total) is int and total < planned:
            said = (
                f"{place}: WarmupCosine falls to {settings.get('final', 0.02):g} of the rate within {total} steps, and "
                f"training goes on to {planned}: set its total to {planned}"
            )
            if settings.get("final", 0.02) == 0:
                raise ValueError(said)
            warnings.warn(said, stacklevel=2)


def _warmups(kind: str, settings: dict[str, Any]) -> dict[str, float]:
    """Argument -> steps in which a schedule raises the learning rate."""
    found = {name: value for name, value in settings.items() if "warmup" in name}
    if kind == "LinearLR" and settings.get("start_factor", 0) < settings.get("end_factor", 1):
        found["total_iters"] = settings.get("total_iters")
    if kind == "OneCycleLR" and settings.get("total_steps") and isinstance(settings.get("pct_start"), float):
        found["pct_start of total_steps"] = settings["pct_start"] * settings["total_steps"]
    return {name: value for name, value in found.items() if type(value) in (int, float)}


def _parts(node: Any, place: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, class, arguments) of every part below ``node``."""
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from _parts(item, f"{place}.{number}")
    elif isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            yield place, node["class_path"].rpartition(".")[2], node.get("init_args") or {}
        for key, value in node.items():
            yield from _parts(value, place if key == "init_args" else f"{place}.{key}")


def check_defaults(config: Namespace) -> None:
    """Raises where an argument's default is an object that YAML cannot hold, of which the parser keeps a remark."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                check(inner, f"{place}.{key}" if place else str(key))
        elif isinstance(value, list):
            for inner in value:
                check(inner, place)
        elif isinstance(value, str) and value.startswith(_UNWRITTEN):
            raise ValueError(
                f"{place}: its default is an object that a configuration cannot hold "
                f"({value.removeprefix(_UNWRITTEN).strip()}); give it a value in the experiment"
            )

    check(config.as_dict(), "")
