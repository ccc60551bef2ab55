"""Classes of one's own from the current folder: ``class_path: my_network.MyNet`` with my_network.py beside the work."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

_DOTTED = re.compile(r"([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+")


def find_own_classes(arguments: Sequence[str]) -> None:
    """Puts the current folder at the end of the import path, if ``arguments`` name a class of a module in it.

    It is for trusted files alone. A folder whose modules nobody names stays out: libraries try to import packages that
    are not installed, and a file or a folder of such a name, ``wandb`` for example, would run in their place.

    Args:
        arguments: with a ``--config`` for each file.
    """
    here = Path.cwd()
    named = {found[1] for value in _values(arguments) if (found := _DOTTED.fullmatch(value))}
    own = [name for name in named if (here / f"{name}.py").is_file() or (here / name / "__init__.py").is_file()]
    if str(here) not in sys.path and any(find_spec(name) is None for name in own):
        sys.path.append(str(here))


def _values(arguments: Sequence[str]) -> Iterator[str]:
    """Every plain text in the arguments and in the files that they name."""
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("-") else argument
        try:
            text = Path(value).read_text() if value.endswith((".yaml", ".yml")) and Path(value).is_file() else value
            strings = list(_strings(yaml.safe_load(text)))
        except Exception:  # of any type, for a value that is no YAML, such as a prompt
            continue
        yield from strings


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _strings(value)
