"""A function as a verb of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser


def call(function: Callable[..., Any], arguments: list[str]) -> Any:
    """What ``function`` returns for ``arguments``; its own parameters are the options, its docstring their help.

    Args:
        function: typed, with a Google docstring.
        arguments: the verb, then the options.
    """
    verb, *options = arguments
    description = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog=f"emf {verb}", description=description, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with values for the options below")
    parser.add_function_arguments(function, as_group=False)
    namespace = parser.instantiate(parser.parse_args(options))
    namespace.pop("config", None)
    return function(**namespace.as_dict())
