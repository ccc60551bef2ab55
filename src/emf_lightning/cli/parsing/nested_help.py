"""Help, also for parts of parts: `emf fit --config FILE --model.net.architecture.help`."""

from __future__ import annotations

import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import DefaultHelpFormatter

_HELP = re.compile(r"--(model|data\.\w+|trainer\.\w+)((?:\.\w+)*)\.help(?:=(.+))?")


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help whose description keeps its lines, so that examples can be copied."""


def with_classes(arguments: Sequence[str]) -> list[str]:
    """Names the class of each part on the way to the part whose help is asked for.

    jsonargparse wants `--model.help=MeanFlow --model.net.help=SanaFlowMap --model.net.architecture.help`. The classes
    come from such options or from the experiment's files.

    Args:
        arguments: the verb, then options, with a ``--config`` for each file; returned unchanged if none asks for help.

    Raises:
        ValueError: if the class of a part on the way is not known.
    """
    verb, *options = arguments
    documents: list[Any] = []
    classes: dict[tuple[str, ...], str | None] = {}
    for option, following in pairwise([*options, "--"]):
        if found := _HELP.fullmatch(option):
            keys = [key for key in f"{found[1]}{found[2]}".split(".") if key != "init_args"]
            classes[tuple(keys)] = found[3] or (None if following.startswith("-") else following)
        elif option in ("--config", "-c"):
            documents.append(yaml.safe_load(Path(following).read_text() if Path(following).is_file() else following))
    if not classes:
        return list(arguments)
    asked = list(classes)[-1]
    chain = []
    for length in range(1 if asked[0] == "model" else 2, len(asked) + 1):
        way = asked[:length]
        name = classes.get(way) or _class_at(documents, way) or ("FlowMapModule" if way == ("model",) else None)
        if name is None and way != asked:
            part = f"--{'.'.join(way)}.help"
            raise ValueError(
                f"--{'.'.join(asked)}.help: name an experiment, --config FILE, or the class before it, {part}=CLASS"
            )
        chain.append(f"--{'.'.join(way)}.help" + (f"={name}" if name else ""))
    return [verb, *chain]


def _class_at(documents: list[Any], way: Sequence[str]) -> str | None:
    """Class of the part at ``way`` in the last document that names it."""
    for node in reversed(documents):
        for key in way:
            node = node.get(key, (node.get("init_args") or {}).get(key)) if isinstance(node, dict) else None
        name = node.get("class_path") if isinstance(node, dict) else node
        if isinstance(name, str):
            return name
    return None
