"""Lightning checkpoints: reading them, and comparing them with a configuration before they are loaded."""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emf_lightning.digests import check_digests

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from emf_lightning.networks.base import FlowMapNetwork

PARAMETRIZATION = "flow_map"
"""Key of a checkpoint under which it describes its weights."""

PARENT = "parent"
"""Key of a checkpoint under which one of adapters names the weights that they change."""

_PLAIN = {"adapter": "none"}
"""What the description of a network without adapters leaves out."""

_EARLIER_MODELS = {
    "MeanFlow": {"model": "FlowMapModule", "objective": "MeanFlow"},
    "FlowMatching": {"model": "FlowMapModule", "objective": "FlowMatching"},
    "ImprovedMeanFlow": {"model": "FlowMapModule", "objective": "ImprovedMeanFlow"},
}
"""Classes that earlier versions trained with, and their names today."""

_MISMATCH = re.compile(r"size mismatch for (\S+): .*?shape (\S+\(\[.*?\]\)) from checkpoint, .*?(\S+\(\[.*?\]\))")
_KEYS = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)")


def read_checkpoint(path: str | Path, argument: str) -> dict[str, Any]:
    """The checkpoint at ``path``; its tensors are on the CPU, and read from the file when they are used.

    Raises:
        ValueError: for a missing file, other content and a sharded checkpoint; the message begins with ``argument``.
    """
    import torch

    remedy = "give the path of a .ckpt file that `emf fit` wrote"
    if Path(path).is_dir():
        check_digests(Path(path))
        sharded = "add --config experiments/devices/fsdp2.yaml, on any number of devices, or make"
        raise ValueError(
            f"{argument}: {path} is a sharded checkpoint: {sharded if argument == 'ckpt_path' else 'make'} one file of "
            f"it: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if not Path(path).is_file():
        raise ValueError(f"{argument}: no checkpoint at {path}; {remedy}")
    if damage := damage_of(Path(path)):
        raise ValueError(f"{argument}: {path} cannot be read as a checkpoint: {damage}; {remedy}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # its type depends on which bytes are wrong
        raise ValueError(
            f"{argument}: {path} cannot be read as a checkpoint ({type(error).__name__}): it is something else or was "
            f"cut short; {remedy}"
        ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{argument}: {path} holds no model's weights; {remedy}")
    return dict(checkpoint)


def damage_of(path: Path) -> str | None:
    """A sentence about the damage of a checkpoint file; None where it is whole, or nothing in it tells.

    ``torch.load`` does not compare the checksums (CRC32) that ``torch.save`` writes beside each tensor. Reads the file
    once, unless it changes: a second for some 1.5 GB.
    """
    found = path.stat()
    return _damage(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache
def _damage(path: Path, *version: int) -> str | None:
    with path.open("rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                return None if file.read(1) == b"\x80" else "it was cut short"  # a pickle: torch before 1.6
            with zipfile.ZipFile(file) as archive:
                # torch reads nothing from an entry that is marked as a folder, and returns what the memory held
                folder = next((entry.filename for entry in archive.infolist() if entry.external_attr & 0x10), None)
                damaged = folder or archive.testzip()
        except Exception as error:  # its type depends on which bytes are wrong
            if isinstance(error, OSError) and error.errno == errno.EIO:
                raise
            return f"it is damaged ({type(error).__name__})"
    return None if damaged is None else f"it is damaged: {damaged} is not the content that was saved"


def check_finite(checkpoint: Mapping[str, Any], step: int, previous: str | None) -> None:
    """Raises a ``ValueError`` for weights that are not finite: a checkpoint of them would replace a good one.

    A collective: where weights are sharded, a rank sees its part alone, and all refuse what one refuses.

    Args:
        checkpoint: with the weights in ``state_dict``, and in ``current_model_state`` beside averages.
        step: optimiser steps taken, for the message.
        previous: path of the checkpoint before.
    """
    import torch.distributed as dist

    name = _first_non_finite(checkpoint)
    if dist.is_initialized():
        names: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(names, name)
        name = next(filter(None, names), None)
    if name is not None:
        last = f"go on from {previous}" if previous else "start anew"
        raise ValueError(
            f"at step {step} the weights are not finite ({name} is the first): they are not saved, and "
            f"training ends; {last} with a lower learning rate or net.time_scale, or in fp32"
        )


def _first_non_finite(checkpoint: Mapping[str, Any]) -> str | None:
    import torch

    for key in ("state_dict", "current_model_state"):
        for name, value in checkpoint.get(key, {}).items():
            local = getattr(value, "_local_tensor", value)  # this rank's part of a sharded tensor
            if isinstance(local, torch.Tensor) and not torch.isfinite(local).all():
                return str(name)
    return None


def parametrization_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a checkpoint's weights, in today's names; empty where it has none."""
    about = _PLAIN | dict(checkpoint.get(PARAMETRIZATION, {}))
    return about | _EARLIER_MODELS.get(about.get("model", ""), {})


def described(net: FlowMapNetwork) -> dict[str, Any]:
    """The description of a network, as ``parametrization_of`` reads it from a checkpoint."""
    return _PLAIN | {"interval": "none"} | net.parametrization


def check_parametrization(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises a ``ValueError`` where training cannot go on from a checkpoint that describes itself as ``theirs``."""
    if clash := disagreement(theirs, ours):
        raise ValueError(
            f"ckpt_path: the checkpoint belongs to another configuration: {clash}; give the config.yaml that lies "
            "beside it in its run directory, or start from its weights alone with --model.init_args.init_from"
        )


def check_kinds(theirs: Mapping[str, Any], **ours: object) -> None:
    """Checks that each object in ``ours`` is of the class that the checkpoint names, or of a subclass.

    Raises:
        ValueError: naming the first that is not.
    """
    related = {name: {kind.__name__ for kind in type(part).__mro__} for name, part in ours.items()}
    check_parametrization(
        theirs, {name: type(part).__name__ for name, part in ours.items() if theirs.get(name) not in related[name]}
    )


def load_network(net: FlowMapNetwork, path: str) -> None:
    """Loads the network weights of the Lightning checkpoint at ``path``, its EMA's where it has one, into ``net``.

    Raises:
        ValueError: where it cannot be read, or holds another network.
    """
    saved = read_checkpoint(path, "init_from")
    weights = {n.removeprefix("net."): value for n, value in saved["state_dict"].items() if n.startswith("net.")}
    own = net.state_dict()
    weights = {name: own[name] for name in net.parent_weights} | weights
    problem = f"init_from: {path} holds a network of another configuration than model.net"
    if clash := disagreement(parametrization_of(saved), described(net)):
        raise ValueError(f"{problem}: {clash}; make them agree")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{problem}: {first_difference(error)}") from error


def leave_out_parents(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Takes the weights under adapters out of a checkpoint, which names them instead."""
    from emf_lightning.networks.adapter import parent_names  # imports torch

    known = parent_names(module)
    for state in _states(checkpoint):
        for name in known & state.keys():
            del state[name]
    if parents := {str(part.parent) for part in module.modules() if getattr(part, "parent", None) is not None}:
        checkpoint[PARENT] = min(parents)


def put_parents_back(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Puts the weights under adapters, as ``module`` has them, into a checkpoint that leaves them out."""
    from emf_lightning.networks.adapter import parent_names

    if known := parent_names(module):
        own = module.state_dict()
        for state in _states(checkpoint):
            state.update({name: own[name] for name in known - state.keys()})


def _states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The weights, and where these are averages the live ones beside them."""
    return [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]


def live_weights(path: str | Path) -> dict[str, Any] | None:
    """The network's weights of the last optimiser step in a checkpoint that holds averages beside them, else None.

    Raises:
        ValueError: where it cannot be read.
    """
    saved = read_checkpoint(path, "checkpoint")
    if "averaging_state" not in saved or "current_model_state" not in saved:
        return None
    state = saved["current_model_state"]
    return {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}


def disagreement(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """A sentence about the first key that both have with different values; None where there is none."""
    names = (name for name in ours if name in theirs and theirs[name] != ours[name])
    return next((f"its {name} is {theirs[name]}, not {ours[name]}" for name in names), None)


def first_difference(error: RuntimeError) -> str:
    """The first difference in an error of ``load_state_dict``, and the number of others."""
    differences = []
    for line in map(str.strip, str(error).splitlines()[1:]):
        if mismatch := _MISMATCH.search(line):
            differences.append(f"{mismatch[1]} is {mismatch[2]} there and {mismatch[3]} here")
        elif keys := _KEYS.search(line):
            there, here = ("is not there", "here") if keys[1] == "Missing" else ("is there", "not here")
            differences += [f"{name} {there} but {here}" for name in re.findall(r'"(.+?)"', keys[2])]
        elif line:
            differences.append(line)
    more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
    return " ".join((differences or [str(error)])[0].split()) + more
