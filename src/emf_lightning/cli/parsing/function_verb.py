"""A function as a verb of the command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from emf_lightning.cli.parsing.errors import naming_options
from emf_lightning.cli.parsing.experiment_files import ExperimentFileParser, check_every_text
from emf_lightning.cli.parsing.nested_help import Help
from emf_lightning.cli.verbs import examples
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
        options = [f"--{name}={json.dumps(taken, ensure_ascii=False) if several else taken[0]}", *options[len(taken) :]]
    parser = function_parser(verb, function)
    check_every_text()
    with known_classes_only(imported=True), naming_options(parser):
        namespace = parser.instantiate(parser.parse_args(options))
    namespace.pop("config", None)
    return function(**{name: _at_home(value) for name, value in namespace.as_dict().items()})


def _at_home(value: Any) -> Any:
    """``value``, where a path's ``~`` stands for the user's home: a shell leaves it in ``--out=~/runs``."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return value.expanduser() if isinstance(value, Path) else value


def function_parser(verb: str, function: Callable[..., Any]) -> ArgumentParser:
    """The parser of a verb, from the function's signature and docstring."""
    about = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0]
    parser = ExperimentFileParser(
        prog=f"emf {verb}",
        usage=f"emf {verb} [options]",
        description=f"{about}\n\n{examples(verb)}",
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with values for the options below")
    parser.add_function_arguments(function, as_group=False)
    return parser
