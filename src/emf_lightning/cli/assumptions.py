"""What `emf plan` takes in place of weights whose configuration is not here, and the sentence that says so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import nn

from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.parsing.experiment_files import expand
from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.shipped import experiment_file
from emf_lightning.cli.sizes import sized
from emf_lightning.pretrained.files import config_of
from emf_lightning.pretrained.sizes_alone import sizes_alone

_OF_A_RUN = re.compile(r"(?:.*/)?runs/(.+?)/version_\d+/")


class PlanningCLI(BuildingCLI):
    """Reads an experiment as `emf fit` does and builds nothing."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""


def sized_or_assumed(place: str, part: Namespace, kind: type, **linked: Any) -> tuple[Any, Namespace, list[str]]:
    """The sized ``part`` at ``place`` of a configuration, the part that was built, and a sentence for each assumption.

    Weights that are not here are those that an experiment will write, or the class's own default.

    Raises:
        ValueError: where there is neither, and for everything else that is wrong with the part.
    """
    try:
        return sized(part, kind, **linked), part, []
    except ValueError:
        key, name = _weights(part)
        if key is None or _is_here(part, key):
            raise
        assumed, source = _instead(place, part, key, name)
        if assumed is None or _weights(assumed)[1] == name:
            raise
    built, assumed, further = sized_or_assumed(place, assumed, kind, **linked)
    option = f"--{place}.init_args.{key}"
    note = f"{place}: {name} is not here; planned with {source}: name another with {option}, a folder or a hub name"
    return built, assumed, [f"{note} of which `hf download NAME config.json` was done", *further]


def _weights(part: Namespace) -> tuple[str | None, str]:
    """The argument that names the part's weights, and the name."""
    for key in ("pretrained", "model"):
        value = part.get(f"init_args.{key}")
        name = value.get("path", value.get("init_args.path")) if isinstance(value, Namespace) else value
        if name:
            return key, str(name)
    return None, ""


def _is_here(part: Namespace, key: str) -> bool:
    value = part.init_args[key]
    inner = value.get("init_args", value) if isinstance(value, Namespace) else part.init_args
    try:
        with sizes_alone(own=False):
            config_of(_weights(part)[1], inner.get("subfolder"))
    except OSError:
        return False
    return True


def _instead(place: str, part: Namespace, key: str, name: str) -> tuple[Namespace | None, str]:
    """``part`` with other weights or another size, and what these are; None if nothing is known of it."""
    found = _OF_A_RUN.match(name)
    if found and (file := experiment_file(found[1])):
        settings = PlanningCLI.run(["fit", *expand(["--config", str(file)])]).settings
        parent = settings.get(place)
        names = ("architecture", "pretrained", "model", "subfolder")
        sizes = {k: parent.init_args.get(k) for k in names if k in part.init_args}
        if parent.get("init_args.finetuning.reset_text_projection"):  # the weights it started from had another width
            finetuning = (part.get("init_args.finetuning") or parent.init_args.finetuning).clone()
            finetuning.reset_text_projection = True
            sizes["finetuning"] = finetuning
        if parent.class_path.rpartition(".")[2] == part.class_path.rpartition(".")[2] and _weights(parent)[1] != name:
            return _with(part, sizes), f"that of {_short(file)}, which writes it"
    kind = class_of(part.class_path)
    known = (inspect.signature(base).parameters for base in kind.__mro__ if issubclass(base, nn.Module))
    default = next(parameters[key].default for parameters in known if key in parameters)
    if default in (name, inspect.Parameter.empty):
        return None, ""
    return _with(part, {key: default}), str(default or f"the default size of {kind.__name__}")


def _with(part: Namespace, arguments: dict[str, Any]) -> Namespace:
    changed = part.clone()
    for key, value in arguments.items():
        changed.init_args[key] = value
    return changed


def _short(file: Path) -> str:
    return "/".join(file.parts[file.parts.index("experiments") :]) if "experiments" in file.parts else str(file)
