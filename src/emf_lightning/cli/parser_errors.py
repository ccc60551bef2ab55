"""The parser's errors in one line: where, what, and what was probably meant."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import get_args, get_type_hints

_KEY = re.compile(r'Parser key "(.+?)"')
_CLASS = re.compile(r"Problem with given class_path '(.+?)'|Got value: Namespace\(.*?class_path='(.+?)'")
_OPTION = re.compile(r"Option '(.+?)' is not accepted")
_GROUP = re.compile(r"(?:Group '(.+?)'|Subcommand '.+?') does not accept option '(.+?)'")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_TYPE = re.compile(r"Expected an? (.*?)\. Got value: (.*)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_ANY_CLASS = "- a class path (str)"
_VERB = re.compile(r"\b(?:fit|validate|test|predict)\.")
_NOT_DEFINITE = (
    "Expected a path but",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass of",
    "Problem with given class_path",
    "Does not validate against",
)
_ROOTS = ("model", "data", "trainer", "seed_everything", "ckpt_path", "weights_only")
_TYPE_NAMES = {"trainer": "lightning.pytorch.Trainer", "data": "emf_lightning.data.datamodule.CaptionImageData"}


def parser_error(text: str) -> str:
    """One line for jsonargparse's indented tree of alternatives: the first alternative that says something definite."""
    keys: list[str] = []
    owner: str | None = None
    for line in map(str.strip, text.splitlines()):
        keys += _KEY.findall(line)
        if found := _CLASS.search(line):
            owner = found[1] or found[2]
        if found := _GROUP.search(line):
            where, _, option = ".".join(filter(None, found.groups())).rpartition(".")
            if keys and owner:  # a group of a nested class: a dataclass among its arguments
                return _unknown_option(".".join([*keys, where]), _type_of(owner, where), option)
            root = where.partition(".")[0]
            if root in ("", *_ROOTS):
                return _unknown_option(where, _TYPE_NAMES.get(where), option)
            return _unknown_option("", None, root)
        if found := _REQUIRED.search(line):
            remedy = "an experiment names them: --config FILE" if _VERB.search(found[0]) else "--help explains them"
            return f"{_VERB.sub('', found[0])}; {remedy}"
        if found := _OPTION.search(line):
            return _unknown_option(".".join(keys), owner, found[1])
        if found := _NO_CLASS.search(line):
            known = _class_names()
            if found[1] in known:
                return f"{'.'.join(keys)}: {found[1]} is a class of another kind; --help lists those that fit"
            return f"{'.'.join(keys)}: there is no class {found[1]!r}{_meant(found[1], known)}"
        if line == _ANY_CLASS and keys:
            return f"{'.'.join(keys)}: names no class that fits here; write `class_path: NAME` beside its `init_args`"
        leaf = line.removeprefix("- ")
        if (leaf != line or leaf.startswith("Expected")) and not leaf.startswith(_NOT_DEFINITE):
            return f"{'.'.join(keys)}: {_plain(leaf)}" if keys else _plain(leaf)
    return _plain(text)


def _unknown_option(where: str, owner: str | None, option: str) -> str:
    name = f"{owner.rpartition('.')[2]} has" if owner else "there is"
    meant = _meant(option, _options(owner) if owner else _ROOTS)
    return f"{where + ': ' if where else ''}{name} no option {option!r}{meant}"


def _meant(word: str, choices: Iterable[str]) -> str:
    names = sorted(choices)
    if near := get_close_matches(word, names, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= 16 else "; --help lists them"


def _options(class_path: str | None) -> list[str]:
    """The arguments of a class, where it can be imported."""
    if class_path is None:
        return []
    try:
        parameters = inspect.signature(class_of(class_path)).parameters.values()
    except (ImportError, AttributeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _type_of(class_path: str, parameter: str) -> str | None:
    """The full name of the class that a parameter of another class asks for."""
    try:
        hint = get_type_hints(class_of(class_path).__init__)[parameter]  # type: ignore[misc]
    except (ImportError, AttributeError, KeyError, NameError):
        return None
    kinds = [kind for kind in (hint, *get_args(hint)) if inspect.isclass(kind) and kind is not type(None)]
    return f"{kinds[0].__module__}.{kinds[0].__qualname__}" if kinds else None


def class_of(class_path: str) -> type:
    """The class that a full ``class_path`` names."""
    module, _, name = class_path.rpartition(".")
    found = getattr(import_module(module), name)
    assert isinstance(found, type)
    return found


def _class_names() -> set[str]:
    """The names of the classes that YAML can call by their short names."""
    modules = [
        m for name, m in sys.modules.items() if name.startswith(("emf_lightning.", "lightning.pytorch.callbacks."))
    ]
    return {name for m in modules for name, value in vars(m).items() if inspect.isclass(value) and name[0] != "_"}


def _plain(text: str) -> str:
    """``text`` in one line, with types as YAML users call them, and without the dump of the value at its end."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(text.split()))
    text = re.sub(r"(?:typing|collections\.abc)\.", "", text)
    return _TYPE.sub(r"must be \1, got \2", text.partition(" Given value type:")[0])
