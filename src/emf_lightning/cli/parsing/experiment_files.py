"""Experiment files and their ``base:``.

A file names the files it builds on, relative to itself::

    base: ../parts/base.yaml      # or a list, in the order in which they apply
    base: shapes/emf              # an experiment of the package, if no file beside it has that name

Each file becomes one ``--config``, oldest first, so that the parser's rules hold: mappings merge deeply, later files
win, ``key+:`` appends to a list, ``callbacks-:`` and ``logger-:`` take a class out, and options after ``--config`` win
over all files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._actions import previous_config  # what the files before have set; there is no public way to it

from emf_lightning.cli.shipped import experiment_file, unknown

KEY = "base"
REMOVALS = ("callbacks-", "logger-")
"""Keys below ``trainer:`` that name the classes to take out of what earlier files have put there."""

_MERGE, _WORD = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
_OPTIONS = ("--config", "-c")


def config_files(experiment: str | Path) -> list[Path]:
    """Files of an experiment: its bases, oldest first, then itself; each once.

    Raises:
        ValueError: for a missing file, a cycle, or a ``base:`` that is no name or list of names.
    """
    files: list[Path] = []
    _collect(Path(experiment), (), files)
    return files


def _collect(file: Path, children: tuple[Path, ...], files: list[Path]) -> None:
    if file.resolve() in [child.resolve() for child in children]:
        chain = " -> ".join(str(path) for path in (*children, file))
        raise ValueError(f"{children[-1]}: `base:` runs in a circle, {chain}; take one of them out")
    for name in _bases(file):
        base = experiment_file(name, file.parent)
        if base is None:
            raise ValueError(
                f"{file}: base {name!r} is not there: no file {file.parent / name} (names are relative to "
                f"{file.parent}/){unknown(name)}"
            )
        _collect(base, (*children, file), files)
    if file.resolve() not in [known.resolve() for known in files]:
        files.append(file)


def _bases(file: Path) -> list[str]:
    settings = read_yaml(file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; an experiment is made of `key: value` lines")
    value = settings.get(KEY, [])
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: `base:` must be a file name or a list of file names, got {value!r}")
    return names


def read_yaml(file: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: for a file that is no YAML, or has a key twice, see ``check_keys``.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no YAML: it is not UTF-8 text") from error
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # any type for a value that is not what its tag says, a month 13 for example
        raise ValueError(f"{file}: no valid YAML: {' '.join(str(error).split())}") from error
    check_keys(text, str(file))
    return content


def check_keys(text: str, name: str) -> None:
    """Raises a ``ValueError`` for a key that one mapping of the YAML ``text``, called ``name``, has twice.

    The parser would drop the first. It takes ``a.b`` for ``b`` below ``a``, so that ``a`` may not stand beside it.
    """
    if not any(sign in text for sign in ":?{"):  # no mapping, as most values of options
        return
    nodes: list[yaml.Node | None] = [_composed(text)]
    seen: set[int] = set()  # an alias is the node of its anchor, and may hold itself
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            words = {key.value: key.start_mark.line + 1 for key, _ in node.value if key.tag == _WORD}
            for key, value in node.value:
                line, same = key.start_mark.line + 1, (key.tag, str(key.value))
                if isinstance(key, yaml.ScalarNode) and same in lines and key.tag != _MERGE:
                    raise ValueError(
                        f"{name}: the key {key.value!r} is there twice, in line {lines[same]} and in line {line}, and "
                        "the first would be lost; make one of them"
                    )
                lines[same] = line
                parts = str(key.value).split(".")
                outer = next((o for n in range(1, len(parts)) if (o := ".".join(parts[:n])) in words), None)
                if key.tag == _WORD and outer is not None:
                    raise ValueError(
                        f"{name}: the keys {outer!r} in line {words[outer]} and {key.value!r} in line {line} are about "
                        f"the same, and one of them would be lost; write {key.value!r} below {outer!r}"
                    )
                nodes += [key, value]


def _composed(text: str) -> yaml.Node | None:
    """The nodes of a YAML text, in a tenth of PyYAML's own time where it was built with libyaml."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeError):  # the message is PyYAML's own; libyaml takes no lone surrogates
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    return node


def check_every_text() -> None:
    """Makes the parser check the keys of every YAML text, also of a file that another file or an option names.

    The word None becomes null: the parser writes it where it hands a null of the command line on to a nested class,
    which would read a text.
    """
    from jsonargparse import set_loader
    from jsonargparse._loaders_dumpers import get_yaml_default_loader, yaml_load
    from jsonargparse._optionals import get_omegaconf_loader
    from jsonargparse._util import config_load_stack

    get_yaml_default_loader().add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), ["N"])  # type: ignore[no-untyped-call]
    for mode, load in {"yaml": yaml_load, "omegaconf+": get_omegaconf_loader("omegaconf+")}.items():  # type: ignore[no-untyped-call]

        def checked(text: str, load: Callable[[str], Any] = load) -> Any:
            stack = config_load_stack.get()
            check_keys(text, stack[-1][1] if stack else "a value")
            return load(text)

        set_loader(mode, checked, (yaml.YAMLError,))


def without_base(text: str) -> str:
    """The document without its ``base:``, a key unknown to the parser; line numbers of a block style stay."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(document, yaml.MappingNode):
        return text
    for key, value in document.value:
        if key.value == KEY:
            document.value.remove((key, value))
            if not document.value:
                return "{}"
            start, end = key.start_mark.index, value.end_mark.index
            plain = start < end and key.start_mark.column == document.start_mark.column and "&" not in text[start:end]
            if document.flow_style or not plain:  # a cut would leave a comma, a ?, or a name of what is gone
                return str(yaml.serialize(document))
            return text[:start] + "\n" * text.count("\n", start, end) + text[end:]
    return text


def settings_of(experiments: Sequence[Path]) -> list[Any]:
    """The settings of the files of all experiments, each experiment's oldest first, without their ``base:``."""
    files = [file for experiment in experiments for file in config_files(experiment)]
    return [yaml.safe_load(without_base(file.read_text(encoding="utf-8"))) for file in files]


def without_removals(text: str) -> tuple[str, dict[str, list[str]]]:
    """The document without its ``REMOVALS``, and the class names in each of them.

    Raises:
        ValueError: for a removal that is no class name or list of these.
    """
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    removals: dict[str, list[str]] = {}
    for section, values in document.value if isinstance(document, yaml.MappingNode) else ():
        if section.value == "trainer" and isinstance(values, yaml.MappingNode):
            removals = {
                key.value: _class_names(key.value, names) for key, names in values.value if key.value in REMOVALS
            }
            values.value[:] = [pair for pair in values.value if pair[0].value not in REMOVALS]
    return (yaml.serialize(document) if removals else text), removals


def _class_names(key: str, node: yaml.Node) -> list[str]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(one, yaml.ScalarNode) for one in nodes):
        raise ValueError(f"trainer.{key}: takes class names, e.g. `{key}: [FewStepSampling]`")
    return [one.value for one in nodes]


def remove(items: list[Any], names: Sequence[str], key: str) -> list[Any]:
    """``items``, each with a ``class_path``, without those of the classes ``names``.

    Raises:
        ValueError: for a name that none of them has.
    """
    for name in names:
        there = [item["class_path"].rpartition(".")[2] for item in items]
        if name.rpartition(".")[2] not in there:
            raise ValueError(f"trainer.{key}: there is no {name!r} to take out; there are {', '.join(there) or 'none'}")
        items = [item for item, known in zip(items, there, strict=True) if known != name.rpartition(".")[2]]
    return items


class ExperimentFileParser(ArgumentParser):
    """Parser of files whose ``base:`` ``expand`` has followed; their ``callbacks-:`` take out what came before."""

    def parse_string(self, content: str, path: str | os.PathLike = "", *args: Any, **kwargs: Any) -> Any:
        text, removals = without_removals(without_base(content))
        before = previous_config.get()
        for key, names in removals.items():
            place = f"trainer.{key.removesuffix('-')}"
            there = before.get(place) if before else None
            items = there if isinstance(there, list) else [there] if isinstance(there, Namespace) else []
            left = remove(items, names, key)
            if before is not None:
                before[place] = left or None
        return super().parse_string(text, path, *args, **kwargs)


def expand(arguments: Sequence[str]) -> list[str]:
    """The command line with one ``--config`` for each file of every experiment.

    A base that an earlier ``--config`` has applied is not applied again, so that two experiments may share it. A YAML
    text in place of a file stays as it is.
    """
    expanded: list[str] = []
    given: list[Path] = []
    for option, value in _pairs(arguments):
        if option is not None and _is_text(value):
            check_keys(value, option)
        if option is None or _is_text(value):
            expanded += [value] if option is None else [option, value]
            continue
        if (file := experiment_file(value)) is None:
            raise ValueError(f"{option} {value}: no such file{unknown(value)}")
        *bases, experiment = config_files(file)
        for file in (*[base for base in bases if base.resolve() not in given], experiment):
            expanded += [option, str(file)]
            given.append(file.resolve())
    return expanded


def _is_text(value: str) -> bool:
    """True for a YAML text in place of a file."""
    return "\n" in value or value.lstrip().startswith("{")


def with_options(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with ``--config`` before each experiment that follows the verb as a mere word.

    `--trainer.callbacks- NAME` becomes the file that says the same.
    """
    verb, *options = arguments
    words = list(takewhile(lambda word: not word.startswith("-"), options))
    named = [part for word in words for part in ("--run" if Path(word).is_dir() else "--config", word)]
    rest: list[str] = []
    following = iter(options[len(words) :])
    for option in following:
        name, equals, value = option.partition("=")
        if name not in [f"--trainer.{key}" for key in REMOVALS]:
            rest.append(option)
        elif (given := value if equals else next(following, None)) is None:
            raise ValueError(f"{name}: names no class")
        else:
            rest += ["--config", f"{{trainer: {{{name.rpartition('.')[2]}: [{given.strip('[]')}]}}}}"]
    return [verb, *named, *rest]


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """(option, value) for each ``--config FILE`` or ``--config=FILE``; (None, argument) for all others."""
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in _OPTIONS:
            yield None, argument
        elif (following := value if equals else next(rest, None)) is None:
            raise ValueError(f"{option}: names no file")
        else:
            yield option, following
