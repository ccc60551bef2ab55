"""`emf schema`: a JSON schema of experiment files, for editors."""

from __future__ import annotations

import json
from importlib import import_module
from inspect import isabstract, isclass
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser
from jsonargparse._completions_jsonschema import ParserJsonschema  # the public way in has no choice of the classes
from jsonargparse._typehints import get_all_subclass_paths, get_callable_return_type

from emf_lightning.cli.parsing.experiment_files import KEY, REMOVALS
from emf_lightning.cli.parsing.function_verb import function_parser
from emf_lightning.cli.verbs import EXPERIMENT_VERBS, FUNCTION_VERBS, TRAINER_VERBS
from emf_lightning.files import write_atomic

REFERENCE = {"type": "string", "pattern": r"\$\{.+\}"}
"""``${a.b}`` in place of any value."""

NAMES = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

_PACKAGES = ("emf_lightning.", "lightning.pytorch.", "torch.optim.")
"""Packages whose classes the schema knows."""

_OWN = r"^(?!emf_lightning\.|lightning\.|torch\.).+\..+"
"""A class of one's own, whose arguments nobody knows."""


def schema(verb: str = "fit", out: Path | None = None) -> None:
    """Write a JSON schema of experiment files, by which editors complete and check them.

    The first line of an experiment names it: `# yaml-language-server: $schema=emf.schema.json`.

    Args:
        verb: whose files: fit, whose schema holds for validate, test, predict, cache and plan, too; or encoders, score.
        out: file to write; by default the schema is printed.
    """
    text = json.dumps(file_schema(verb), indent=1)
    if out is None:
        print(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, f"{text}\n")
        print(f"{out}: name it in the first line of an experiment: # yaml-language-server: $schema={out}")


def file_schema(verb: str) -> dict[str, Any]:
    """The schema of the files of ``verb``: what the parser takes, and what files may hold beside that.

    A file may be a part of an experiment, so nothing is required; any value may be ``${a.b}``; a class has its short
    name; lists have ``key+``.

    Raises:
        ValueError: for a verb that reads no files.
    """
    found = _loosened(FileSchema().generate(parser_of(verb)))  # type: ignore[no-untyped-call]
    found["properties"][KEY] = NAMES | {"description": "files that this one builds on, oldest first, relative to it"}
    if trainer := found["properties"].get("trainer"):
        remark = {"description": "classes to take out of what the files before have put here"}
        trainer["properties"] |= dict.fromkeys(REMOVALS, NAMES | remark)
    return found


def parser_of(verb: str) -> ArgumentParser:
    """The parser of a verb."""
    if verb in TRAINER_VERBS or verb in EXPERIMENT_VERBS:  # which read the files of a training
        from emf_lightning.cli.parsing.builder import ParserCLI

        return ParserCLI.parser_of(verb if verb in TRAINER_VERBS else "fit")
    if verb in FUNCTION_VERBS:
        return function_parser(verb, getattr(import_module(f"emf_lightning.cli.{verb}"), verb))
    raise ValueError(f"verb: {verb!r} reads no files; take fit, {', '.join(FUNCTION_VERBS)}")


class FileSchema(ParserJsonschema):
    """jsonargparse's schema, with short names of classes, and without those of other libraries."""

    def callable_schema(self, typehint: Any, action: Any) -> dict[str, Any]:
        returned = get_callable_return_type(typehint)  # type: ignore[no-untyped-call]
        kinds = [kind for kind in get_args(returned) or (returned,) if isclass(kind)]
        return {"anyOf": [{"type": "string"}, *(self.class_ref(kind, action, subclass=True) for kind in kinds)]}

    def subclass_def(self, class_type: type, action: Any) -> dict[str, Any]:
        own: dict[str, Any] = {"type": "string", "pattern": _OWN}
        unknown = {"type": "object", "properties": {"class_path": own, "init_args": {"type": "object"}}}
        if not class_type.__module__.startswith(_PACKAGES):
            return {"anyOf": [{"type": "string"}, {"type": "object"}]}
        names: list[str] = []
        forms: list[dict[str, Any]] = []
        alone: list[dict[str, Any]] = []
        for path in get_all_subclass_paths(class_type):
            module, _, name = path.rpartition(".")
            kind = getattr(import_module(module), name, None) if path.startswith(_PACKAGES) else None
            if kind is not None:  # Lightning makes further ones while it trains
                names += [path.rpartition(".")[2], path]
                form = self.class_path_schema(path, action)
                form["properties"]["class_path"] = {"enum": names[-2:]}
                forms.append(form)
                if kind is class_type and not isabstract(kind):  # its arguments alone will do
                    alone.append(form["properties"]["init_args"])
        return {"anyOf": [{"enum": names}, own, *forms, *alone, unknown]}


def _loosened(node: Any) -> Any:
    """``node`` without required keys, except classes, and with references and ``key+`` for each property."""
    if isinstance(node, list):
        return [_loosened(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _loosened(value) for key, value in node.items() if key not in ("required", "properties")}
    if "properties" in node:
        found["properties"] = {}
        for name, value in node["properties"].items():
            value = _loosened(value)
            found["properties"][name] = value if name in ("class_path", "$schema") else _or_reference(value)
            if _takes_list(value):
                found["properties"][f"{name}+"] = value
        if "pattern" in node["properties"].get("class_path", ()):  # a class of one's own: only by its name
            found["required"] = ["class_path"]
    return found


def _or_reference(value: dict[str, Any]) -> dict[str, Any]:
    """``value``, or a reference in its place; the description stays beside both."""
    about = {key: value[key] for key in ("description", "default") if key in value}
    inner = {key: item for key, item in value.items() if key not in about}
    return about | {"anyOf": [inner, REFERENCE]} if inner and inner.get("type") not in ("object", "string") else value


def _takes_list(value: dict[str, Any]) -> bool:
    kinds = [value, *value.get("anyOf", ())]
    return any("array" in kind.get("type", ()) for kind in kinds)
