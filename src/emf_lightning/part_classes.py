"""The classes that a file from elsewhere may name: decided before any of them is imported or called."""

from __future__ import annotations

import inspect
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, is_dataclass
from enum import Enum
from importlib import import_module
from os import PathLike
from typing import Any, get_args, get_type_hints

Spec = dict[str, Any]
"""A class and its arguments in the form of experiment files: ``class_path`` and ``init_args``."""

PACKAGES = ("flow", "latents", "networks", "text")
"""Packages below ``emf_lightning`` whose classes the parts of an exported folder may be of."""

_MODULES = tuple(f"{__package__}.{name}." for name in PACKAGES)

FLAG = "trust_remote_code"

_trusted: ContextVar[bool] = ContextVar(FLAG, default=False)


def trusted() -> bool:
    """Whether the user said that the files being read are trusted."""
    return _trusted.get()


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """A context in which files may name any class, if ``trust``, or only those that are known to be safe."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def takes(kind: type, name: str) -> bool:
    """Whether the constructor of ``kind`` takes the argument ``name``, itself or among further keywords for a base."""
    for base in kind.__mro__:
        init = vars(base).get("__init__")
        if init is not None:
            parameters = inspect.signature(init).parameters
            if name in parameters or all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
                return name in parameters
    return False


def spec_of(settings: Any) -> Spec:
    """The class of an object and the arguments that build it again: a dataclass's fields, or none.

    Raises:
        ValueError: for a constructor of its own, whose arguments cannot be read off the object.
    """
    kind = type(settings)
    for base in kind.__mro__[:-1]:
        if "__dataclass_params__" in vars(base):
            break
        if "__init__" in vars(base):
            raise ValueError(
                f"{kind.__name__} has a constructor of its own, so that a run or an export could not build it again: "
                "make it a dataclass (@dataclass(frozen=True)) whose fields are its settings"
            )
    arguments = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else {}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": plain(arguments)}


def plain(value: Any) -> Any:
    """Arguments as JSON holds them: a path is a text, a tuple or a set a list, an enumeration's value its name."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, Enum):
        return value.name
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, PathLike) else value


def builder(spec: Any, kinds: tuple[type, ...], place: str) -> Callable[[], Any]:
    """Checks every class that ``spec`` names, at any depth, without importing a module from outside this package.

    The class of ``spec`` must be a subclass of one of ``kinds``, those of its arguments subclasses of what the
    parameters are annotated with. Inside ``trusting(True)`` any class will do.

    Args:
        spec: ``class_path`` and ``init_args``, or any other value, which may hold such specs.
        kinds: the classes that ``place`` takes; none where it takes plain values.
        place: the file and the key, for messages.

    Returns:
        A function that builds the object, its arguments alike: what was checked and nothing else. Values that are no
        spec stay as they are.

    Raises:
        ValueError: for a class from outside this package, or one that does not fit its place; when it is built, for
            arguments that the class does not have.
    """
    if isinstance(spec, (list, tuple)):
        items = [builder(item, kinds, place) for item in spec]
        return lambda: type(spec)(build() for build in items)
    if not isinstance(spec, dict):
        return lambda: spec
    if "class_path" not in spec:
        values = {name: builder(value, kinds, f"{place}: {name}") for name, value in spec.items()}
        return lambda: {name: build() for name, build in values.items()}
    kind = _class(spec["class_path"], kinds, place)
    given = spec.get("init_args") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{place}: init_args must be names and values, got {_short(given)}")
    arguments = {n: builder(value, _parameter_kinds(kind, n), f"{place}: {n}") for n, value in given.items()}
    typed = trusted()

    def build() -> Any:
        values = {name: argument() for name, argument in arguments.items()}
        if typed:  # this package's own classes take plain values
            values = {name: _parsed(value, _hint(kind, name)) for name, value in values.items()}
        try:
            return kind(**values)
        except TypeError as error:
            raise ValueError(f"{place}: {error}; export the run again") from error

    return build


def _class(path: Any, kinds: tuple[type, ...], place: str) -> type:
    """The class that ``path`` names: of this package and a subclass of one of ``kinds``, unless the file is trusted."""
    module, _, name = str(path).rpartition(".")
    if trusted():
        try:
            return getattr(import_module(module), name)  # type: ignore[no-any-return]
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{place}: class_path {_short(path)} cannot be imported ({error}); put its file where Python finds it, "
                "e.g. into the current folder"
            ) from error
    public = module == __package__ and name in import_module(__package__).__all__
    if not public and not module.startswith(_MODULES):
        raise ValueError(
            f"{place}: class_path {_short(path)} is from outside {__package__}'s {', '.join(PACKAGES)}, and loading it "
            f"may run any code; if you trust who wrote the file, say so with {FLAG}"
        )
    try:
        # a module's own names: no way through to the names of a module that it imports
        found = getattr(import_module(module), name) if public else vars(import_module(module)).get(name)
    except ImportError:
        found = None
    if not isinstance(found, type) or not f"{found.__module__}.".startswith(_MODULES):
        raise ValueError(f"{place}: class_path {_short(path)} names no class of {', '.join(PACKAGES)}")
    if not issubclass(found, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds) or "plain values, not classes"
        raise ValueError(f"{place}: takes {wanted}, but its class_path is {_short(path)}")
    return found


def _parameter_kinds(kind: type, name: str) -> tuple[type, ...]:
    """The classes of this package with which the parameter ``name`` of a class, or of its bases, is annotated."""
    if trusted():
        return ()
    return tuple(one for one in _classes(_hint(kind, name)) if one.__module__.partition(".")[0] == __package__)


def _hint(kind: type, name: str) -> Any:
    """The annotation of the parameter ``name`` of a class, or of its bases; None where there is none."""
    for base in kind.__mro__:
        init = vars(base).get("__init__")
        if init is not None and name in inspect.signature(init).parameters:
            try:
                return get_type_hints(init, vars(sys.modules[base.__module__])).get(name)
            except NameError:  # a name for type checkers alone
                return None
    return None


def _parsed(value: Any, hint: Any) -> Any:
    """``value`` of JSON as the command line reads it for ``hint``, e.g. a dataclass or a path, or as it is."""
    from jsonargparse import ArgumentParser  # here: few folders are of classes that need it

    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        return parser.instantiate(parser.parse_object({"value": value})).value
    except Exception:  # not of this kind, e.g. a part that is built already: the constructor says what is wrong
        return value


def _classes(hint: Any) -> Iterator[type]:
    if inspect.isclass(hint):
        yield hint
    for inner in get_args(hint):
        yield from _classes(inner)


def _short(value: Any) -> str:
    return ascii(value) if len(ascii(value)) <= 80 else f"{ascii(value)[:77]}..."
