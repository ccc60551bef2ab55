"""Experiment files and their ``base:``.

A file names the files it builds on, relative to itself::

    base: ../parts/base.yaml      # or a list, in the order in which they apply
    base: shapes/emf              # an experiment of the package, if no file beside it has that name

Each file becomes one ``--config``, oldest first, so that the parser's rules hold: mappings merge deeply, later files
win, ``key+:`` appends to a list, and options after ``--config`` win over all files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from emf_lightning.cli.shipped import experiment_file, unknown

KEY = "base"
_MERGE = "tag:yaml.org,2002:merge"
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
        ValueError: for a file that is no YAML, or has a key twice: the parser would drop the first.
    """
    try:
        text = file.read_text(encoding="utf-8")
        check_keys(text, str(file))
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no YAML: it is not UTF-8 text") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: no valid YAML: {' '.join(str(error).split())}") from error


def check_keys(text: str, name: str) -> None:
    """Raises a ``ValueError`` for a key that one mapping of the YAML ``text``, called ``name``, has twice."""
    nodes: list[yaml.Node | None] = [yaml.compose(text, Loader=yaml.SafeLoader)]
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
            for key, value in node.value:
                line, same = key.start_mark.line + 1, (key.tag, str(key.value))
                if isinstance(key, yaml.ScalarNode) and same in lines and key.tag != _MERGE:
                    raise ValueError(
                        f"{name}: the key {key.value!r} is there twice, in line {lines[same]} and in line {line}, and "
                        "the first would be lost; make one of them"
                    )
                lines[same] = line
                nodes += [key, value]


def without_base(text: str) -> str:
    """The document without its ``base:``, a key unknown to the parser; line numbers stay."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in document.value if isinstance(document, yaml.MappingNode) else ():
        if key.value == KEY:
            start, end = key.start_mark.index, value.end_mark.index
            rest = text[:start] + "\n" * text.count("\n", start, end) + text[end:]
            return rest if yaml.compose(rest, Loader=yaml.SafeLoader) is not None else "{}"
    return text


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
