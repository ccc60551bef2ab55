"""A function as a verb of the command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from emf_lightning.cli.parsing.experiment_files import check_every_text
from emf_lightning.import_policy import known_classes_only


def call(function: Callable[..., Any], arguments: list[str]) -> Any:
    """Calls ``function`` with parsed ``arguments``: its parameters are the options, its docstring their help.

    Args:
        function: typed, with a Google docstring.
        arguments: the verb, then the options; words before the first option belong to the first parameter.
    """
    verb, *options = arguments
    if words := list(takewhile(lambda word: not word.startswith("-"), options)):
        name, parameter = next(iter(inspect.signature(function).parameters.items()))
        several = str(parameter.annotation).startswith("list")
        taken = words if several else words[:1]
        options = [f"--{name}={json.dumps(taken) if several else taken[0]}", *options[len(taken) :]]
    description = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog=f"emf {verb}", description=description, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with values for the options below")
    parser.add_function_arguments(function, as_group=False)
    check_every_text()
    with known_classes_only(imported=True):
        namespace = parser.instantiate(parser.parse_args(options))
    namespace.pop("config", None)
    return function(**namespace.as_dict())
