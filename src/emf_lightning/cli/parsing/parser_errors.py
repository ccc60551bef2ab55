"""The parser's errors in one line: key, error, and the nearest valid name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import get_args, get_type_hints

from jsonargparse import ArgumentParser

from emf_lightning.cli.parsing.option_names import nearest_option
from emf_lightning.import_policy import refusal
from emf_lightning.part_classes import FLAG, trusted
from emf_lightning.renames import ARGUMENTS, CLASSES

_KEY = re.compile(r'Parser key "(.+?)"')
_CLASS = re.compile(r"Problem with given class_path '(.+?)'|Got value: Namespace\(.*?class_path='(.+?)'")
_OPTION = re.compile(r"Option '(.+?)' is not accepted")
_GROUP = re.compile(r"(?:Group '(.+?)'|Subcommand '.+?') does not accept option '(.+?)'")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_TYPE = re.compile(r"Expected an? (.*?)\. Got value: (.*)")
_LIST = re.compile(r"Expected a list$|must be list, got [^\[]")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_ANY_CLASS = "- a class path (str)"
_VERB = re.compile(r"\b(?:fit|validate|test|predict)\.")
_UNINFORMATIVE = (
    "Expected a path but",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass of",
    "Problem with given class_path",
    "Does not validate against",
)
_ROOTS = ("model", "data", "trainer", "seed_everything", "ckpt_path", "weights_only")
_TYPE_NAMES = {"trainer": "lightning.pytorch.Trainer", "data": "emf_lightning.data.datamodule.CaptionImageData"}


def parser_error(text: str, options: Sequence[str] = ()) -> str:
    """One line for jsonargparse's indented tree of alternatives: the first one with a definite error.

    Args:
        text: of the parser's error.
        options: of the verb, such as ``--trainer.max_steps``.
    """
    roots = _ROOTS if "--model" in options or not options else [option.removeprefix("--") for option in options]
    if refused := refusal(text):  # before the search for a class, which would import it
        return refused
    path: list[str] = []  # as in YAML, with init_args
    owner: type | None = None
    for line in map(str.strip, text.splitlines()):
        path += _KEY.findall(line)
        where = ".".join(key for key in path if key != "init_args")
        if found := _CLASS.search(line):
            name = found[1] or found[2]
            if (owner := _find_class(name)) is None:
                return f"{where}: {_unknown_class(name)}"
            if path and path[-1] != "init_args" and not is_dataclass(owner):
                path.append("init_args")
        if found := _GROUP.search(line):
            group, _, option = ".".join(filter(None, found.groups())).rpartition(".")
            if path and owner:  # a dataclass among the arguments of a nested class
                return _first_unknown(path, owner, [*group.split("."), option])
            root, *inner = [*group.split("."), option] if group else [option]
            if inner and root in _ROOTS:
                return _first_unknown([root], _find_class(_TYPE_NAMES.get(root)), inner)
            return _unknown_option([], None, root, roots)
        if found := _UNRECOGNIZED.search(line):
            return _unrecognized(found[1], options)
        if found := _REQUIRED.search(line):
            remedy = "an experiment names them: --config FILE" if _VERB.search(found[0]) else "--help explains them"
            return f"{_VERB.sub('', found[0])}; {remedy}"
        if found := _OPTION.search(line):
            return _unknown_option(path, owner, found[1].partition(".")[0], roots)
        if found := _NO_CLASS.search(line):
            return f"{where}: {_unknown_class(found[1])}"
        if line == _ANY_CLASS and path:
            return f"{where}: names no class that fits here; write `class_path: NAME` beside its `init_args`"
        leaf = line.removeprefix("- ")
        if (leaf != line or leaf.startswith("Expected")) and not leaf.startswith(_UNINFORMATIVE):
            return f"{where}: {_simplified(leaf)}" if path else _simplified(leaf)
    return _simplified(text)


def _unrecognized(word: str, options: Sequence[str]) -> str:
    """Message for a word of the command line that is no option of the verb, nor the value of one."""
    if not word.startswith("--"):
        return f"{word} is no option, nor the value of one; name experiments right after the verb, or with --config"
    name, given, _ = word.removeprefix("--").partition("=")
    if given and name in (FLAG, "dry_run"):
        return f"--{name} takes no value: give it alone, or leave it out"
    group, _, option = name.rpartition(".")
    owner = _find_class(_TYPE_NAMES.get(group))
    if owner is not None and (new := ARGUMENTS.get((owner.__name__, option))):
        return _renamed([group], option, new)
    found = nearest_option(name, options)
    if isinstance(found, list):
        return f"there is no option --{name}; there are --{', --'.join(found)}"
    return f"there is no option --{name}; " + (f"did you mean --{found}?" if found else "--help lists them")


def _renamed(path: list[str], option: str, new: str) -> str:
    old, is_sentence = ".".join([*path, option]), " " in new.partition("; ")[0]
    return f"{old}: {new}" if is_sentence else f"{old} is now {'.'.join([*path, new])}"


def _first_unknown(path: list[str], owner: type | None, keys: list[str]) -> str:
    """Message for the first of ``keys``, each within the one before, that the class ``owner`` at ``path`` lacks."""
    key, *inner = keys
    if inner and (owner is None or key in inspect.signature(owner).parameters):
        return _first_unknown([*path, key], None if owner is None else _type_of(owner, key), inner)
    return _unknown_option(path, owner, key, ())


def _unknown_option(path: list[str], owner: type | None, option: str, roots: Sequence[str] = _ROOTS) -> str:
    """Message for an option that the class ``owner`` at ``path`` does not have; names its new name if renamed."""
    kinds = owner.__mro__ if owner else ()
    for new in filter(None, (ARGUMENTS.get((kind.__name__, option)) for kind in kinds)):
        return _renamed(path, option, new)
    where = ".".join(key for key in path if key != "init_args")
    name = f"{owner.__name__} has" if owner else "there is"
    suggestion = _suggestion(option, _options(owner) if owner else roots)
    return f"{where + ': ' if where else ''}{name} no option {option!r}{suggestion}"


def _unknown_class(name: str) -> str:
    """Message for a class that does not exist or does not fit; names the new class if it was renamed or moved."""
    known, short = _class_names(), name.rpartition(".")[2]
    if new := CLASSES.get(name) or CLASSES.get(short) or (short if short != name and short in known else None):
        return f"{name} is now {new}"
    if name in known:
        return f"{name} is a class of another kind; --help lists those that fit"
    return f"there is no class {name!r}{_suggestion(short, known)}"


def _suggestion(word: str, choices: Iterable[str]) -> str:
    names = sorted(choices)
    if near := get_close_matches(word, names, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= 16 else "; --help lists them"


def _options(kind: type) -> list[str]:
    """Names of the arguments of a class."""
    names: list[str] = ArgumentParser().add_class_arguments(kind, fail_untyped=False)
    return names


def _type_of(kind: type, parameter: str) -> type | None:
    """The class with which a parameter of the class ``kind`` is annotated."""
    try:
        hint = get_type_hints(kind.__init__)[parameter]  # type: ignore[misc]
    except (KeyError, NameError):
        return None
    return next((one for one in (hint, *get_args(hint)) if inspect.isclass(one) and one is not type(None)), None)


def class_of(class_path: str) -> type:
    """The class that a full ``class_path`` names.

    Raises:
        ValueError: for anything else; also, unless files are trusted, for a module that is not imported, as those of
            all classes are that the parser has let through.
    """
    module, _, name = class_path.rpartition(".")
    if trusted() and module:
        with suppress(ImportError):
            import_module(module)
    found = getattr(sys.modules.get(module), name, None)
    if not isinstance(found, type):
        raise ValueError(f"class_path {class_path!r} names no class that is known here; write its whole path")
    return found


def _find_class(class_path: str | None) -> type | None:
    try:
        return class_of(class_path) if class_path else None
    except ValueError:
        return None


def _class_names() -> set[str]:
    """Names of the classes that YAML can call by their short names."""
    modules = [
        m for name, m in sys.modules.items() if name.startswith(("emf_lightning.", "lightning.pytorch.callbacks."))
    ]
    return {name for m in modules for name, value in vars(m).items() if inspect.isclass(value) and name[0] != "_"}


def _simplified(text: str) -> str:
    """``text`` in one line, with short names of types and without the dump of the value at its end."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(text.split()))
    text = re.sub(r"(?:typing|collections\.abc)\.", "", text)
    text = _TYPE.sub(r"must be \1, got \2", text.partition(" Given value type:")[0])
    return f"{text}; a list is written [A, B], with one value [A]" if _LIST.search(text) else text
