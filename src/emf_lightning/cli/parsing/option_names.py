"""The options of an experiment by their whole names, and the nearest to a misspelled one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

_HABITS = {"learning_rate": "lr", "checkpoint": "ckpt_path", "resume": "run", "epochs": "max_epochs"}
"""Names of other programs, and ours."""

_FEW = 8
"""Options of a part that are listed, if there are no more."""

_DEPTH = 4
"""Parts within parts down to which options are listed."""


def nearest_option(name: str, options: Sequence[str]) -> str | list[str] | None:
    """The option that ``name`` most likely means: the same last word, or a similar one; or all those of its part.

    Args:
        name: as it was typed, without dashes.
        options: of the verb, as its help lists them.
    """
    known = [option.removeprefix("--") for option in options]
    if "model" in known:
        known += dict.fromkeys(option for kind in _modules() for option in _options(kind, "model.init_args", 0))
    short = {_without_init_args(option): option for option in reversed(known)}
    asked = _without_init_args(name)
    word = asked.rpartition(".")[2]
    word = _HABITS.get(word, word)
    same = [option for option in known if option.rpartition(".")[2] == word]
    words = {option.rpartition(".")[2] for option in known}
    like = get_close_matches(word, words, n=1, cutoff=0.75)
    whole = get_close_matches(asked, short, n=1, cutoff=0.8)
    group = asked.rpartition(".")[0]
    if not same and (inside := [option for option in known if _within(option, group)]):
        near = get_close_matches(word, [option.rpartition(".")[2] for option in inside], n=1)
        named = {option.rpartition(".")[2]: option for option in reversed(inside)}
        if near or len(named) <= _FEW:
            return named[near[0]] if near else sorted(named.values())
    if not same and whole:
        return short[whole[0]]
    same = same or [option for option in known if like and option.rpartition(".")[2] == like[0]]
    # in the part that was named, if it has such an option; else the one that is nearest to the root
    return min(same, key=lambda option: (not _within(option, group), option.count("."), len(option)), default=None)


def _within(option: str, group: str) -> bool:
    return bool(group) and f".{_without_init_args(option).rpartition('.')[0]}".endswith(f".{group}")


def _without_init_args(option: str) -> str:
    return option.replace(".init_args", "")


def _modules() -> list[type]:
    from emf_lightning.modules.flow_map import FlowMapModule

    return [FlowMapModule, *_subclasses(FlowMapModule)]


def _subclasses(kind: type) -> Iterator[type]:
    for child in list[type](kind.__subclasses__()):
        if child.__module__.startswith("emf_lightning."):
            yield child
        yield from _subclasses(child)


def _options(kind: type, prefix: str, depth: int) -> Iterator[str]:
    """The arguments of a class and of the parts that it takes, each after ``prefix``."""
    try:
        hints = get_type_hints(kind.__init__, vars(sys.modules[kind.__module__]))  # type: ignore[misc]
    except NameError:  # a name for type checkers alone
        hints = {}
    for name in list(inspect.signature(kind).parameters):
        yield f"{prefix}.{name}"
        for part in _parts(hints.get(name)) if depth < _DEPTH else ():
            if is_dataclass(part) and not part.__subclasses__():
                yield from _options(part, f"{prefix}.{name}", depth + 1)
            else:
                for found in (part, *_subclasses(part)):
                    yield from _options(found, f"{prefix}.{name}.init_args", depth + 1)


def _parts(hint: Any) -> Iterator[type]:
    """The classes of this package, and of optimisers and schedules, in an annotation."""
    if inspect.isclass(hint) and hint.__module__.startswith("emf_lightning."):
        yield hint
    elif inspect.isclass(hint) and hint.__module__.startswith("torch.optim."):
        from torch.optim import AdamW, Optimizer

        yield AdamW if hint is Optimizer else hint
    for inner in get_args(hint):
        yield from _parts(inner)
