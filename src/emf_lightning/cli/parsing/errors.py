"""One-line messages for errors that the user can fix."""

from __future__ import annotations

import os
import re
import traceback
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from emf_lightning.cli.parsing.parser_errors import parser_error
from emf_lightning.cli.shards import missing_shards
from emf_lightning.cli.verbs import OWN_OPTIONS
from emf_lightning.files import full_disk
from emf_lightning.modules.checkpoint import first_difference
from emf_lightning.part_classes import FLAG

OPTIONS = "options_of_the_verb"
"""Attribute of a parser's error with the options that the verb has."""

_PACKAGE = Path(__file__).resolve().parents[2]
_PACKAGE_FOLDERS = (f"{_PACKAGE}/", f"{(_PACKAGE / 'callbacks').resolve()}/")  # callbacks/ is linked into the package
_KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal|exited unexpectedly)")
_MISSING = re.compile(r"Problem with given class_path '([\w.]+)'.*?`(pip install [^`]+)`", re.DOTALL)
_WORKER = re.compile(r"Caught (\w+) in .*?Original Traceback.*\n\1: (.*)", re.DOTALL)


@contextmanager
def naming_options(parser: ArgumentParser) -> Iterator[None]:
    """A context whose parser errors know the options of ``parser``, for the nearest one."""
    try:
        yield
    except ArgumentError as error:
        names = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        setattr(error, OPTIONS, names)
        raise


def user_message(error: BaseException, verb: str = "") -> str | None:
    """One line with the error and its remedy; None for a defect, which needs its traceback.

    The user can fix errors of the command line and of the Trainer's configuration, ``ValueError``s of this package,
    files that are missing or not accessible, and checkpoints that do not fit the configuration.
    """
    if found := _package_error(error):
        return _one_line(str(found)) + missing_shards(str(found))
    if missing := _MISSING.search(str(error)):
        return f"{missing[1].rpartition('.')[2]} needs a package that is not installed: {missing[2]}"
    if isinstance(error, RecursionError):
        return "a value is nested too deeply, or holds itself by a YAML alias; write it out"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ArgumentError):
        return parser_error(str(error), [*getattr(error, OPTIONS, ()), *OWN_OPTIONS.get(verb, ())])
    if "MisconfigurationException" in kinds:
        return _one_line(str(error))
    if "OmegaConfBaseException" in kinds:
        return _interpolation(str(error))
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error):
        return (
            f"the checkpoint belongs to another configuration: {first_difference(error)}; "
            "give the config.yaml that lies beside it in its run directory, or another --ckpt_path"
        )
    if (number := full_disk(error)) is not None:
        where = getattr(error, "filename", None) or "a disk that is written to"
        return f"{where}: {os.strerror(number).lower()}; make room, or write elsewhere"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'cannot be read').lower()}; check the path and its permissions"
    if isinstance(error, RuntimeError) and (killed := _KILLED.search(str(error))):
        return (
            f"a data worker (process {killed[1]}) was killed, often for want of memory: go on with --ckpt_path last, "
            "with smaller data.num_workers or data.shuffle_block"
        )
    if isinstance(error, FileNotFoundError):
        return _one_line(str(error))
    if isinstance(error, ValueError) and (worker := _WORKER.search(str(error))):
        return _one_line(worker[2])
    return None


def _package_error(error: BaseException | None) -> ValueError | None:
    """The ``ValueError`` of this package in the chain of causes of ``error``, or None."""
    while error is not None:
        if isinstance(error, ValueError) and raised_in_package(error):
            return error
        error = error.__cause__
    return None


def raised_in_package(error: BaseException) -> bool:
    """Whether a line of this package raised ``error``."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and str(Path(frames[-1].filename).resolve()).startswith(_PACKAGE_FOLDERS)


def constructor_error(error: BaseException) -> BaseException | None:
    """The error of a class's constructor, with the traceback from there on; None where the parser called none.

    The parser reports it as one of several reasons why a value does not fit, which are of no use here.
    """
    raised: BaseException | None = error
    while raised is not None and (calls := _calls(raised)):
        last = max((place for place, call in enumerate(calls) if _of_parser(call)), default=-1)
        if last < len(calls) - 1:
            return raised.with_traceback(calls[last + 1]) if last >= 0 else None
        raised = raised.__cause__ or raised.__context__
    return None


def _calls(error: BaseException) -> list[TracebackType]:
    calls, call = [], error.__traceback__
    while call is not None:
        calls.append(call)
        call = call.tb_next
    return calls


def _of_parser(call: TracebackType) -> bool:
    return str(call.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "jsonargparse"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _interpolation(text: str) -> str:
    """OmegaConf's message with absolute keys as the user wrote them, without the verb."""
    where = re.search(r"full_key: \w+\.(\S+)", text)
    key = re.search(r"resolved to '\w+\.(.+?)'", text) or re.search(r"Interpolation key '(.+?)' not found", text)
    if resolver := re.search(r"Unsupported interpolation type (\S+)", text):
        return (
            f"{where[1] if where else 'a value'}: ${{{resolver[1]}:...}} may read the environment or run code; write "
            f"the value itself, or if you trust who wrote the files, add --{FLAG}"
        )
    message = f"there is no value ${{{key[1]}}}" if key else _one_line(text.partition("full_key")[0])
    return f"{where[1]}: {message}" if where else message
